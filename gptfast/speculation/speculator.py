"""Speculator: decode steps that may yield several tokens a row. A drafter proposes k tokens, the
target verifies them in one pass; here is how many, when, and what it took.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from gptfast.compiler import without_collection
from gptfast.kernels.cpu_step import MAX_TOKENS
from gptfast.runner import ModelRunner
from gptfast.sampling import Plan, SamplingParams
from gptfast.speculation.controller import Controller
from gptfast.speculation.drafts import Drafter, Text
from gptfast.speculation.verify import Verifier
from gptfast.stats import SpeculationStats

MAX_SPECULATE_K = 15
# k is chosen up to this, and so that a verification stays within the kernels that are flat.
LARGEST_ADAPTIVE_K = 8
CALIBRATION_ROUNDS = 3

Mark = float | torch.cuda.Event  # a moment, on the host or on the device
# Of each row that decodes its kind (how sure its draft is) and how many tokens can be proposed.
Proposals = Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Round:
    """A round under way. Where k tokens were drafted, `packed` [B, 1 + k + 1] has of each row the
    number of its new tokens (0 where it is idle), then these, and `logits` are [B, k + 1, V]. A
    plain step has [B] tokens and logits [B, V].
    """

    num_drafted: int
    proposals: Proposals
    packed: Tensor
    logits: Tensor
    marks: tuple[Mark, Mark, Mark]  # begun, drafted, verified


class Speculator:
    """Rounds of drafting and verification over the rows of a ModelRunner.

    `fixed_k` None: k follows what drafts and their verification cost and how many are accepted (see
    controller.py).
    """

    def __init__(
        self, name: str, runner: ModelRunner, drafter: Drafter, fixed_k: int | None
    ) -> None:
        self._name, self._runner, self._drafter = name, runner, drafter
        flat = MAX_TOKENS // runner.cache.num_rows - 1
        self._most = max(1, min(LARGEST_ADAPTIVE_K, flat)) if fixed_k is None else fixed_k
        self._verify = Verifier(runner)
        self._controller = Controller(self._most, fixed_k, drafter.is_lookup)
        self._warm: set[Plan] = set()
        self._is_calibrated = False
        self._fixed_k, self._waits = fixed_k, False
        self._stats = SpeculationStats(name, drafter.bytes_per_step)
        config = runner.model.config
        ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
        # Beyond it the length of a text rotates it: a token verified among others would be turned
        # by the length of them all.
        depends = any(rope.depends_on_length for rope in ropes)
        self._longest = config.max_reusable_length if depends else None

    def start_row(self, row: int, prompt_ids: list[int]) -> None:
        self._drafter.start_row(row, prompt_ids)

    def prefill(self, row: int, prompt_ids: list[int], num_read: int) -> None:
        """The target has read so many tokens of a row's prompt. A draft that rests reads later."""
        if self._fixed_k is not None or not self._controller.is_off:
            self._drafter.prefill(row, prompt_ids, num_read)

    def forget(self, row: int) -> None:
        """Drops what an idle row remembers."""
        self._drafter.forget(row)

    @property
    def stats(self) -> SpeculationStats:
        """Since they were reset, and what is to be said of it now."""
        self._stats.note = self._controller.reason()
        return self._stats

    def reset_stats(self) -> None:
        plain_step_s = self._stats.plain_step_s
        self._stats = SpeculationStats(self._name, self._drafter.bytes_per_step, plain_step_s)

    # -- a round --

    def wants_texts(self, rows: Iterable[int]) -> bool:
        """Whether the host should know all tokens of these rows before their next round."""
        is_certain = self._fixed_k is not None or self._drafter.is_lookup
        return self._waits or (is_certain and self._drafter.wants_texts(rows))

    def begin(self, texts: dict[int, Text], num_used: int, room: int, complete: bool) -> Round:
        """One round for the rows of `texts`, of which none holds more than `num_used` tokens and
        one may take `room` more. `complete` says that the host knows all tokens.
        """
        proposals = self._drafter.look(texts, self._most)
        k = self._controller.choose([kind for kind, _ in proposals.values()])
        k = min(k, max((found for _, found in proposals.values()), default=0))
        # At one k, which tokens are drafted depends on a row alone: so a seed gives one text.
        if room <= 1 and self._fixed_k is None:
            k = 0
        if self._longest is not None and num_used + k > self._longest:
            k = 0
        self._waits = k > 0 and not complete and self._drafter.wants_texts(texts)
        if self._waits:
            k = 0
        if k == 0:
            self._drafter.rest()
            return self._plain_round(proposals, num_used)
        plan = self._runner.sampling.plan()
        self._warm_up(plan)
        begun = self._mark()
        self._drafter.read(texts)
        return Round(k, proposals, *self._drafted_round(k, plan, num_used, begun))

    def _plain_round(self, proposals: Proposals, num_used: int) -> Round:
        begun = self._mark()
        tokens, logits = self._runner.decode(num_used)
        return Round(0, proposals, tokens, logits, (begun, begun, self._mark()))

    def _drafted_round(
        self, k: int, plan: Plan, num_used: int, begun: Mark
    ) -> tuple[Tensor, Tensor, tuple[Mark, Mark, Mark]]:
        drafted, distributions = self._drafter.draft(k, plan, num_used + k)
        ended = self._mark()
        bound = self._runner.main.set_bound(num_used + k, k + 1)
        # A captured verification reads its drafts where they were then.
        gathers = self._runner.needs_logits(plan)
        key = ("verify", plan, k, bound, drafted.data_ptr(), gathers)
        packed, logits = self._runner.replay(
            key, lambda: self._verify(drafted, distributions, plan)
        )
        return packed, logits, (begun, ended, self._mark())

    def observe(self, ended: Round, accepted: Mapping[int, tuple[int, int]]) -> None:
        """What became of a round that the host has read: of each row how many drafted tokens could
        have been accepted, and how many were.
        """
        draft_s, verify_s = _seconds(ended.marks)
        outcomes = [(ended.proposals[row][0], tried, num) for row, (tried, num) in accepted.items()]
        self._controller.observe(ended.num_drafted, outcomes, draft_s, verify_s)
        self._stats.add(ended.num_drafted, outcomes, draft_s, verify_s)

    # -- before the first round --

    @torch.no_grad()
    @without_collection()
    def warm_up(self, plans: Iterable[Plan]) -> None:
        """Compiles now what rounds of these plans need."""
        for plan in sorted(set(plans)):
            self._warm_up(plan)

    def _warm_up(self, plan: Plan) -> None:
        if plan in self._warm or not self._runner.compiled:
            return
        start = perf_counter()
        with self._all_idle():
            for k in self._lengths(every=self._runner.device.type == "cuda"):
                drafted, distributions = self._drafter.warm_up(k, plan)
                self._runner.main.set_bound(1, k + 1)
                self._verify(drafted, distributions, plan)
        self._warm.add(plan)
        self._runner.compile_s += perf_counter() - start

    @torch.no_grad()
    def calibrate(self) -> None:
        """Times plain and drafted rounds, the first time that it is called. All rows are idle: they
        run on padding, which leaves no trace.
        """
        if self._is_calibrated:
            return
        self._runner.warm_up([SamplingParams(temperature=0)])
        self._warm_up("greedy")
        tried = (0, *self._lengths(every=False))
        times: dict[int, list[tuple[float, float]]] = {k: [] for k in tried}
        for _ in range(1 + CALIBRATION_ROUNDS):
            for k in tried:
                if k == 0:
                    marks = self._plain_round({}, 1).marks
                else:
                    marks = self._drafted_round(k, "greedy", 1, self._mark())[2]
                times[k].append(_seconds(marks))
        # The first round fills caches and is left out.
        drafted = {k: median(draft for draft, _ in pairs[1:]) for k, pairs in times.items()}
        verified = {k: median(verify for _, verify in pairs[1:]) for k, pairs in times.items()}
        plain_s = self._stats.plain_step_s = verified.pop(0)
        self._controller.calibrated(plain_s, drafted[self._most] / self._most, verified)
        self._is_calibrated = True

    def _lengths(self, every: bool) -> Sequence[int]:
        """The k of rounds to come: `every` one, each with kernels of its own, or the extremes."""
        if self._fixed_k is not None:
            return (self._fixed_k,)
        return range(1, self._most + 1) if every else sorted({1, self._most})

    @contextmanager
    def _all_idle(self) -> Iterator[None]:
        """Rows stand at the spare slot in the `with` block: a step changes nothing of them."""
        positions = self._runner.positions.clone()
        self._runner.positions.fill_(self._runner.cache.max_seq_len)
        try:
            yield
        finally:
            self._runner.positions.copy_(positions)

    def _mark(self) -> Mark:
        if self._runner.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._runner.device))
        return event


def _seconds(marks: tuple[Mark, Mark, Mark]) -> tuple[float, float]:
    """Between the first two marks and between the last two."""
    first, second, third = marks
    return _between(first, second), _between(second, third)


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
