"""What drafts come from: a model with a cache of its own, a part or a coarser copy of the target
over the target's cache, or the text itself.

A drafter proposes k tokens behind each row's newest one. It may be wrong, never harmful: what it
proposes is verified.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.cache import cache_bytes_per_token
from gptfast.cached import LARGEST_PIECE, cached_beside, cached_model, common_prefix
from gptfast.device import format_bytes
from gptfast.model import Transformer
from gptfast.runner import ModelRunner
from gptfast.sampling import Plan, draw, first_argmax, uniform
from gptfast.speculation.accept import PURPOSE_DRAFT
from gptfast.speculation.ngram import NgramIndex

# A prompt and the new tokens behind it that the host knows.
Text = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Draft:
    """Where drafts come from, apart from any engine: prompt lookup (no model), or a model, which
    may run over the target's own cache.
    """

    name: str
    model: Transformer | None
    shares_cache: bool = False

    @property
    def text(self) -> str:
        """For people: the name, and how large a model it is."""
        if self.model is None:
            return f"{self.name} (no model)"
        return f"{self.name}, {format_bytes(self.model.bytes_per_step)} a token"

    @property
    def cache_bytes_per_token(self) -> int:
        """Of one row, in a cache of the draft's own."""
        if self.model is None or self.shares_cache:
            return 0
        return cache_bytes_per_token(self.model.config, self.model.dtype, "auto")

    def drafter(self, runner: ModelRunner) -> "Drafter":
        if self.model is None:
            return NgramDrafter(runner)
        return ModelDrafter(runner, self.model, self.shares_cache)


class Drafter(Protocol):
    """Proposes tokens for the rows of a ModelRunner."""

    bytes_per_step: int  # of weights that drafting one token a row reads
    is_lookup: bool  # it reads the text alone, all of it: kinds are lengths of a match

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        """A row begins a new text."""

    def prefill(self, row: int, prompt_ids: Sequence[int], num_read: int) -> None:
        """The target has read so many tokens of a row's prompt: the draft may do so now."""

    def forget(self, row: int) -> None:
        """Drops what an idle row remembers."""

    def wants_texts(self, rows: Iterable[int]) -> bool:
        """Whether a round for these rows needs to know every token of them, and not only those that
        the host has read so far.
        """

    def look(self, texts: dict[int, Text], most: int) -> dict[int, tuple[int, int]]:
        """Looks at the texts of the rows that decode, by row, before a round of at most `most`
        tokens -> for each its kind (how sure its draft is, for the controller) and how many tokens
        can be proposed.
        """

    def read(self, texts: dict[int, Text]) -> None:
        """Reads what has not been read of the texts, before a round that drafts: after a rest."""

    def rest(self) -> None:
        """The round to come drafts nothing."""

    def draft(self, num_tokens: int, plan: Plan, num_used: int) -> tuple[Tensor, Tensor | None]:
        """-> drafted [B, k], -1 for none; and the distributions [B, k, V] they were drawn from, or
        None where nothing was drawn: then a drafted token is the only one that could be. No row
        will hold more than `num_used` tokens.
        """

    def warm_up(self, num_tokens: int, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """As `draft`, of idle rows and never captured: compiles what drafting needs."""


class NgramDrafter:
    """Prompt lookup: what followed when the text last said what it says now."""

    bytes_per_step, is_lookup = 0, True

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        num_rows = runner.cache.num_rows
        self._index = [NgramIndex() for _ in range(num_rows)]
        self._num_known = [0] * num_rows
        self._found: dict[int, list[int]] = {}
        self._drafted: dict[int, Tensor] = {}

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        self._index[row].clear()
        self._index[row].extend(prompt_ids)
        self._num_known[row] = 0

    def prefill(self, row: int, prompt_ids: Sequence[int], num_read: int) -> None:
        pass

    def forget(self, row: int) -> None:
        self._index[row].clear()

    def wants_texts(self, rows: Iterable[int]) -> bool:
        return True

    def look(self, texts: dict[int, Text], most: int) -> dict[int, tuple[int, int]]:
        kinds = {}
        for row, (_, new_ids) in texts.items():
            self._index[row].extend(new_ids[self._num_known[row] :])
            self._num_known[row] = len(new_ids)
            found, match = self._index[row].propose(most)
            self._found[row] = found
            kinds[row] = match, len(found)
        return kinds

    def read(self, texts: dict[int, Text]) -> None:
        self._found = {row: self._found[row] for row in texts}

    def rest(self) -> None:
        pass

    def draft(self, num_tokens: int, plan: Plan, num_used: int) -> tuple[Tensor, Tensor | None]:
        ids = torch.full((len(self._index), num_tokens), -1)
        for row, found in self._found.items():
            known = found[:num_tokens]
            ids[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
        if num_tokens not in self._drafted:  # at one address, as a captured verification needs
            self._drafted[num_tokens] = ids.to(self._runner.device)
        return self._drafted[num_tokens].copy_(ids), None

    def warm_up(self, num_tokens: int, plan: Plan) -> tuple[Tensor, Tensor | None]:
        return torch.full((len(self._index), num_tokens), -1, device=self._runner.device), None


class ModelDrafter:
    """A model drafts by the target's own sampling parameters.

    With a cache of its own it lags behind: the first of its steps reads the row's last two tokens,
    of which it need not have read the first. Over the target's cache (`shares_cache`: its blocks
    are the target's first ones, or coarser copies) it reads the newest token alone, and what it
    writes is written anew by the verification before that reads it.
    """

    is_lookup = False

    def __init__(self, runner: ModelRunner, model: Transformer, shares_cache: bool) -> None:
        self._runner, self._shares_cache = runner, shares_cache
        self.bytes_per_step = model.bytes_per_step
        if shares_cache:
            self.model = cached_beside(model.group, runner.main, model)
        else:
            num_rows = runner.cache.num_rows
            num_slots = min(runner.cache.max_seq_len, model.config.max_seq_len)
            self.model = cached_model(model.group, model, num_rows, num_slots, runner.compiled)
        # Models with one tokenizer may round its size up differently.
        self._last_id = model.config.vocab_size - 1
        self._num_missing = runner.model.config.vocab_size - model.config.vocab_size
        # Of each row, the tokens whose keys its own cache holds, and whether the last round's
        # drafting has left only the newest two unread.
        self._ids: list[list[int]] = [[] for _ in range(runner.cache.num_rows)]
        self._follows = [False] * runner.cache.num_rows

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        del self._ids[row][common_prefix(self._ids[row], prompt_ids) :]
        self._follows[row] = False

    def prefill(self, row: int, prompt_ids: Sequence[int], num_read: int) -> None:
        if not self._shares_cache:  # the prompt's last token is read by the first round
            self._read(row, prompt_ids[len(self._ids[row]) : min(num_read, len(prompt_ids) - 1)])

    def forget(self, row: int) -> None:
        self._ids[row] = []

    def wants_texts(self, rows: Iterable[int]) -> bool:
        return not self._shares_cache and not all(self._follows[row] for row in rows)

    def look(self, texts: dict[int, Text], most: int) -> dict[int, tuple[int, int]]:
        return dict.fromkeys(texts, (0, most))

    def read(self, texts: dict[int, Text]) -> None:
        if self._shares_cache:
            return
        for row, (prompt_ids, new_ids) in texts.items():
            num_held, num_prompt = len(self._ids[row]), len(prompt_ids)
            end = num_prompt + len(new_ids) - 2
            first_new = max(0, num_held - num_prompt)
            missing = [*prompt_ids[num_held:end], *new_ids[first_new : max(0, end - num_prompt)]]
            if self._follows[row]:
                self._ids[row] += missing
            else:
                self._read(row, missing)
            self._follows[row] = True

    def _read(self, row: int, ids: Sequence[int]) -> None:
        """Reads the next tokens of a row's text, as far as its context goes, in pieces."""
        cache, held = self.model.cache, self._ids[row]
        known = [min(token, self._last_id) for token in ids[: cache.max_seq_len - len(held)]]
        cache.lengths[row] = len(held) + len(known)
        for start in range(0, len(known), LARGEST_PIECE):
            self.model.prefill(known[start : start + LARGEST_PIECE], len(held) + start, row)
        held += ids[: len(known)]

    def rest(self) -> None:
        self._follows = [False] * len(self._follows)

    def warm_up(self, num_tokens: int, plan: Plan) -> tuple[Tensor, Tensor | None]:
        if not self._shares_cache:
            self.model.prefill([], 0, 0)
        self.model.set_bound(1)
        return self._draft(num_tokens, plan)

    def draft(self, num_tokens: int, plan: Plan, num_used: int) -> tuple[Tensor, Tensor | None]:
        key = ("draft", plan, num_tokens, self.model.set_bound(num_used))
        group = self.model.group  # rank 0 may draft alone
        return self._runner.replay(key, lambda: self._draft(num_tokens, plan), group)

    def _draft(self, num_tokens: int, plan: Plan) -> tuple[Tensor, Tensor | None]:
        runner, state = self._runner, self._runner.sampling
        last = runner.positions
        active = last < runner.cache.max_seq_len  # [B, 1]
        tokens, places = runner.tokens, self._slots(last, active)
        if not self._shares_cache:
            tokens = torch.cat((runner.previous, tokens), dim=1)
            places = torch.cat((self._slots(last - 1, active), places), dim=1)
        drafted, distributions = [], []
        for step in range(1, num_tokens + 1):
            known = tokens.clamp(max=self._last_id)
            logits, best = self.model(known, places, plan != "greedy" or self._num_missing > 0)
            if plan != "greedy":
                odds = runner.probabilities(self._fitted(logits[:, -1].clone()), plan)
                chosen = draw(odds, uniform(state.seed, last[:, 0] + step, PURPOSE_DRAFT))
                distributions.append(odds)
            elif best is not None and self._num_missing == 0:
                chosen = best[:, -1]
            else:
                chosen = first_argmax(self._fitted(logits[:, -1]))
            if plan == "full":
                state.count(chosen, active[:, 0])
            drafted.append(chosen)
            tokens, places = chosen.unsqueeze(1), self._slots(last + step, active)
        if plan == "full":  # the verification counts what is accepted
            for chosen in drafted:
                state.count(chosen, -active[:, 0].to(torch.int32))
        sampled = torch.stack(distributions, dim=1) if distributions else None
        return torch.stack(drafted, dim=1), sampled

    def _slots(self, positions: Tensor, active: Tensor) -> Tensor:
        """Where tokens go: the spare slot for those of idle rows and beyond the draft's context."""
        spare = self.model.cache.max_seq_len
        return torch.where(active, positions, spare).clamp(max=spare)

    def _fitted(self, logits: Tensor) -> Tensor:
        """[B, V of the draft] -> [B, V of the target]. What the draft lacks is never drafted."""
        missing = self._num_missing
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
