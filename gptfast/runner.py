"""ModelRunner: the device's side of the loop. Knows rows, tensors and graphs; knows no requests.

It owns what a step reads and writes (cache, sampling state, last tokens, positions), the functions
of a step, eager or compiled, and the rule that nothing recompiles once they are warm.
"""

from collections.abc import Callable, Hashable, Sequence
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from gptfast.cached import LARGEST_PIECE, cached_model
from gptfast.compiler import compile_alone, without_collection
from gptfast.graphs import Graph, capture
from gptfast.model import Transformer
from gptfast.parallel import Group
from gptfast.sampling import Plan, SamplingParams, SamplingState, probabilities, sample

Results = TypeVar("Results", bound=tuple[Tensor | None, ...])


class ModelRunner:
    """Advances `num_rows` rows of up to `max_seq_len` tokens. An idle row sits at the spare slot.

    Compiled graphs: those of `main` (see cached.py), and a sampler for each plan. On CUDA the whole
    decode step replays as one graph.
    """

    def __init__(
        self,
        model: Transformer,
        num_rows: int,
        max_seq_len: int,
        compile: bool = False,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.model, self.device, self.compiled = model, model.device, compile
        self.main = cached_model(model.group, model, num_rows, max_seq_len, compile, kv_cache_dtype)
        self.cache = self.main.cache
        self.sampling = SamplingState(num_rows, model.config.vocab_size, self.device)
        # Of each row the newest token, which no step has read, its place, the token before it, and
        # how many tokens the row may come to.
        self.tokens = torch.zeros(num_rows, 1, dtype=torch.int64, device=self.device)
        self.positions = torch.full_like(self.tokens, max_seq_len)
        self.previous = torch.zeros_like(self.tokens)
        self.limits = torch.full_like(self.tokens, max_seq_len)
        # Whether somebody will look at the logits of a greedy step: ranks that share the
        # vocabulary need not gather them.
        self.shows_logits = True
        self.compile_s = 0.0
        self._sample: Callable[..., Tensor] = sample
        self._probabilities: Callable[..., Tensor] = probabilities
        self._warm: set[Plan] = set()
        self._graphs: dict[Hashable, tuple[Graph, tuple[Tensor | None, ...]]] = {}
        if compile:
            self._sample = compile_alone(sample, self.device)
            self._probabilities = compile_alone(probabilities, self.device)

    # -- rows --

    def start_row(
        self,
        row: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        limit: int | None = None,
    ) -> None:
        """Gives a row to a prompt; its tokens are read by `prefill` afterwards. With its new tokens
        it may come to `limit` (None: what it holds).
        """
        self.sampling.set_row(row, params, prompt_ids, seed)
        self.cache.lengths[row] = len(prompt_ids)
        self.previous[row] = prompt_ids[-1]
        self.limits[row] = self.cache.max_seq_len if limit is None else limit

    def stop_row(self, row: int) -> None:
        self.positions[row] = self.cache.max_seq_len
        self.sampling.clear_row(row)

    # -- steps --

    def prefill(self, piece: Sequence[int], start: int, row: int) -> Tensor:
        """As `CachedModel.prefill`."""
        return self.main.prefill(piece, start, row)

    def reread(self, token_ids: Sequence[int], row: int) -> None:
        """Computes a row's keys and values anew, as those of a text one token longer than
        `token_ids`. Nothing else of the row changes.
        """
        length = self.cache.lengths[row]
        length.fill_(len(token_ids) + 1)
        for start in range(0, len(token_ids), LARGEST_PIECE):
            self.prefill(token_ids[start : start + LARGEST_PIECE], start, row)
        length.fill_(len(token_ids))  # the next step adds its token

    def first_token(self, hidden: Tensor, last: int, row: int) -> tuple[Tensor, Tensor]:
        """Samples a row's first token from place `last` of its prompt's last piece and lets the row
        decode from there -> tokens [1], logits [1, V].
        """
        plan = self.sampling.plan()
        self._warm_up(plan)
        index = torch.tensor([last], device=self.device)
        logits = self.main.logits(hidden.index_select(1, index))[:, 0]
        state, position = self.sampling.row(row), self.cache.lengths[row : row + 1]
        token = self.draw(logits, state, position, plan)
        if plan == "full":  # the only plan that reads counts
            state.count(token, torch.ones_like(token, dtype=torch.bool))
        self.tokens[row] = token
        self.positions[row] = position
        return token, logits

    def decode(self, num_used: int) -> tuple[Tensor, Tensor]:
        """One token for every row; idle rows run along -> tokens [B], logits [B, V] (see
        `CachedModel.__call__`).

        No row holds more than `num_used` tokens when the step begins.
        """
        plan = self.sampling.plan()
        self._warm_up(plan)
        bound = self.main.set_bound(num_used)
        key = ("decode", plan, bound, self.needs_logits(plan))
        return self.replay(key, lambda: self._decode(plan))

    def _decode(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The whole step, from last tokens to next ones, without the host."""
        positions = self.positions[:, 0]
        active = positions < self.cache.max_seq_len
        self.cache.lengths.add_(active)
        logits, best = self.main(self.tokens, self.positions, self.needs_logits(plan))
        logits = logits[:, 0]
        if best is not None and plan == "greedy":
            tokens = best[:, 0]
        else:
            # A token's random bits belong to the place it takes: the same alone and in a batch.
            tokens = self.draw(logits, self.sampling, positions + 1, plan)
        if plan == "full":
            self.sampling.count(tokens, active)
        # Not of a row that is being read: there it is the prompt's last token.
        self.previous.copy_(torch.where(active.unsqueeze(1), self.tokens, self.previous))
        self.tokens.copy_(tokens.unsqueeze(1))
        self.positions.add_(active.unsqueeze(1))
        return tokens, logits

    # -- parts of a step, also of one that speculates --

    def draw(self, logits: Tensor, state: SamplingState, positions: Tensor, plan: Plan) -> Tensor:
        """As `sample`. Beside a CPU's fused step, which finds the best token itself, the greedy
        plan is worth no graph: it needs one token a prompt.
        """
        is_rare = plan == "greedy" and self.main.step is not None and self.device.type == "cpu"
        return (sample if is_rare else self._sample)(logits, state, positions, plan)

    def needs_logits(self, plan: Plan) -> bool:
        """Whether a step of this plan has to bring together more than the largest logits."""
        return self.model.group.is_alone or plan != "greedy" or self.shows_logits

    def probabilities(self, logits: Tensor, plan: Plan) -> Tensor:
        """As `sampling.probabilities`, of all rows."""
        return self._probabilities(logits, self.sampling, plan)

    def replay(
        self, key: Hashable, function: Callable[[], Results], group: Group | None = None
    ) -> Results:
        """What `function` returns. On CUDA, compiled, it is one graph for each `key`: captured
        once, then replayed, with results at the same addresses. Capturing runs nothing, so no row
        is disturbed. `group`: whose ranks all have a part in it (None: the model's).
        """
        group = self.model.group if group is None else group
        if not (self.compiled and self.device.type == "cuda") or group.staged:
            return function()
        if key not in self._graphs:
            start = perf_counter()
            self._graphs[key] = capture(group, self.device, function)
            self.compile_s += perf_counter() - start
        graph, results = self._graphs[key]
        graph.replay()
        return results  # type: ignore[return-value]  # what this key's function made

    # -- compilation --

    @torch.no_grad()
    @without_collection()
    def warm_up(self, requests: Sequence[SamplingParams]) -> None:
        """Compiles now what requests with these parameters need, not at the step that needs it."""
        for plan in sorted({params.plan for params in requests}):
            self._warm_up(plan)

    def _warm_up(self, plan: Plan) -> None:
        """Runs every graph of `plan` once on padding, which leaves no trace."""
        if plan in self._warm or not self.compiled:
            return
        start = perf_counter()
        if not self._warm:
            self.prefill([], 0, 0)
        # A prompt's first token is sampled for its row alone. Positions as the steps pass them, a
        # view or not: the compiler looks at the tensor behind a view, and would compile again.
        alone = (self.cache.row(0), self.sampling.row(0), self.cache.lengths[:1])
        together = (self.cache, self.sampling, self.positions[:, 0] + 1)
        for cache, state, places in (alone, together)[self.cache.num_rows == 1 :]:
            tokens = torch.zeros(cache.num_rows, 1, dtype=torch.int64, device=self.device)
            hidden = self.model.embed(tokens)
            if cache is self.cache:
                padding = torch.full_like(tokens, cache.max_seq_len)
                if self.main.step is None:
                    hidden = self.main.hidden(tokens, padding)
                else:  # so that its kernels are compiled before they are captured
                    self.main(tokens, padding)
            self.draw(self.main.logits(hidden)[:, 0], state, places, plan)
        self._warm.add(plan)
        self.compile_s += perf_counter() - start
