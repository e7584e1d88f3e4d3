"""ModelRunner: the device's side of the loop. Knows rows, tensors and graphs; knows no requests.

It owns what a step reads and writes (cache, sampling state, last tokens, positions), the functions
of a step, eager or compiled, and the rule that nothing recompiles once they are warm.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.cache import KVCache
from gptfast.compiler import compile_alone, without_collection
from gptfast.fused import fused_step
from gptfast.model import Block, Transformer
from gptfast.sampling import Plan, SamplingParams, SamplingState, sample

# A piece of prompt is padded to one of these lengths: few shapes, at most half of one wasted.
PREFILL_SHAPES = (16, 32, 64, 128, 256, 512)
LARGEST_PIECE = PREFILL_SHAPES[-1]
SMALLEST_BOUND = 256


class ModelRunner:
    """Advances `num_rows` rows of up to `max_seq_len` tokens. An idle row sits at the spare slot.

    A decode step is a fused one where the model has it (see fused.py): on a CPU always, on CUDA
    where it is compiled.

    Compiled graphs: blocks at one token a row (one graph for all blocks of a kind), blocks at two
    or more tokens (any number), the head, and a sampler for each plan; beside a fused step only
    blocks at two or more tokens and samplers. On CUDA the whole decode step replays as one graph.
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
        self.cache = KVCache.allocate(
            model.config, num_rows, max_seq_len, model.dtype, model.device, kv_cache_dtype
        )
        self.sampling = SamplingState(num_rows, model.config.vocab_size, self.device)
        self.tokens = torch.zeros(num_rows, 1, dtype=torch.int64, device=self.device)
        self.positions = torch.full_like(self.tokens, max_seq_len)
        self.compile_s = 0.0
        self._blocks: dict[Hashable, Callable[..., Tensor]] = {}  # compiled, by kind of block
        self._logits: Callable[..., Tensor] = model.logits
        self._sample: Callable[..., Tensor] = sample
        self._warm: set[Plan] = set()
        self._graphs: dict[tuple[Plan, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        # On CUDA it is many small kernels, worth their launches in a graph only.
        fuses = compile or self.device.type == "cpu"
        self._step = fused_step(model, self.cache) if fuses else None
        if compile:
            self.cache.mark_static()
            self._blocks = {
                kind: compile_alone(_run_block, self.device)
                for kind in dict.fromkeys(block.kind for block in model.blocks)
            }
            if self._step is None:
                self._logits = partial(compile_alone(_run_logits, self.device), model)
            self._sample = compile_alone(sample, self.device)

    # -- rows --

    def start_row(
        self, row: int, prompt_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> None:
        """Gives a row to a prompt; its tokens are read by `prefill` afterwards."""
        self.sampling.set_row(row, params, prompt_ids, seed)
        self.cache.lengths[row] = len(prompt_ids)

    def stop_row(self, row: int) -> None:
        self.positions[row] = self.cache.max_seq_len
        self.sampling.clear_row(row)

    # -- steps --

    def prefill(self, piece: Sequence[int], start: int, row: int) -> Tensor:
        """Reads a piece of at most 512 tokens into a row from position `start` on.

        Returns hidden states [1, padded length, dim].
        """
        length = next(shape for shape in PREFILL_SHAPES if shape >= len(piece))
        padding = length - len(piece)
        places = range(start, start + len(piece))
        self.cache.bound.fill_(self._bound(start + len(piece)))
        tokens = torch.tensor([[*piece, *([0] * padding)]])
        positions = torch.tensor([[*places, *([self.cache.max_seq_len] * padding)]])
        return self._hidden(tokens.to(self.device), positions.to(self.device), self.cache.row(row))

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
        logits = self._logits(hidden.index_select(1, index))[:, 0]
        state, position = self.sampling.row(row), self.cache.lengths[row : row + 1]
        token = self._draw(logits, state, position, plan)
        if plan == "full":  # the only plan that reads counts
            state.count(token, torch.ones_like(token, dtype=torch.bool))
        self.tokens[row] = token
        self.positions[row] = position
        return token, logits

    def decode(self, num_used: int) -> tuple[Tensor, Tensor]:
        """One token for every row; idle rows run along -> tokens [B], logits [B, V].

        No row holds more than `num_used` tokens when the step begins.
        """
        plan, bound = self.sampling.plan(), self._bound(num_used)
        if self._step is not None:
            bound = self.cache.max_seq_len  # it knows the lengths on the device: one graph for all
        self._warm_up(plan)
        self.cache.bound.fill_(bound)
        if not (self.compiled and self.device.type == "cuda"):
            return self._decode(plan)
        graph, tokens, logits = self._graph(plan, bound)
        graph.replay()
        return tokens, logits

    def _bound(self, num_used: int) -> int:
        """`num_used` rounded up to a power of two, so that there are few CUDA graphs."""
        return min(self.cache.max_seq_len, max(SMALLEST_BOUND, 1 << (num_used - 1).bit_length()))

    def _decode(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The whole step, from last tokens to next ones, without the host."""
        positions = self.positions[:, 0]
        active = positions < self.cache.max_seq_len
        self.cache.lengths.add_(active)
        best = None
        if self._step is None:
            logits = self._logits(self._hidden(self.tokens, self.positions, self.cache))[:, 0]
        else:
            logits, best = self._step(self.tokens, self.positions)
            logits = logits[:, 0]
        if best is not None and plan == "greedy":
            tokens = best[:, 0]
        else:
            # A token's random bits belong to the place it takes: the same alone and in a batch.
            tokens = self._draw(logits, self.sampling, positions + 1, plan)
        if plan == "full":
            self.sampling.count(tokens, active)
        self.tokens.copy_(tokens.unsqueeze(1))
        self.positions.add_(active.unsqueeze(1))
        return tokens, logits

    def _draw(self, logits: Tensor, state: SamplingState, positions: Tensor, plan: Plan) -> Tensor:
        """As `sample`. Beside a CPU's fused step, which finds the best token itself, the greedy
        plan is worth no graph: it needs one token a prompt.
        """
        is_rare = plan == "greedy" and self._step is not None and self.device.type == "cpu"
        return (sample if is_rare else self._sample)(logits, state, positions, plan)

    def _hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return self.model.hidden(
            tokens, positions, cache, self._run_compiled if self.compiled else None
        )

    def _run_compiled(self, block: Block, x: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        if x.size(1) > 1:
            for tensor in (x, positions, *(rest[0] or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self._blocks[block.kind](block, x, positions, *rest)

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
                if self._step is None:
                    hidden = self._hidden(tokens, padding, cache)
                else:  # so that its kernels are compiled before they are captured
                    self._step(tokens, padding)
            self._draw(self._logits(hidden)[:, 0], state, places, plan)
        self._warm.add(plan)
        self.compile_s += perf_counter() - start

    def _graph(self, plan: Plan, bound: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """The decode step as one CUDA graph. Capturing runs nothing, so no row is disturbed."""
        if (plan, bound) not in self._graphs:
            start = perf_counter()
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=stream):
                tokens, logits = self._decode(plan)
            self._graphs[plan, bound] = graph, tokens, logits
            self.compile_s += perf_counter() - start
        return self._graphs[plan, bound]


def _run_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _run_logits(model: Transformer, x: Tensor) -> Tensor:
    return model.logits(x)
