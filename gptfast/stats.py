"""Numbers that travel with the stream: what one request took, and what a run took together.

Decode figures never include compilation, loading or prefill. All times are seconds on the monotonic
clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch

from gptfast.device import free_memory


@dataclass
class RequestStats:
    """The life of one request. `num_cached_tokens` of the prompt were already in the cache of an
    earlier request.
    """

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    submitted_at: float = field(default_factory=perf_counter)
    started_at: float | None = None
    token_times: list[float] = field(default_factory=list)

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_times)

    @property
    def ttft_s(self) -> float | None:
        """Submission to first token, waiting for a row included."""
        return self.token_times[0] - self.submitted_at if self.token_times else None

    @property
    def prefill_span(self) -> tuple[float, float] | None:
        """From when a row was assigned to the first token."""
        if self.started_at is None or not self.token_times:
            return None
        return self.started_at, self.token_times[0]

    @property
    def prefill_s(self) -> float | None:
        return _covered([self.prefill_span]) if self.prefill_span else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between successive tokens."""
        return [after - before for before, after in pairwise(self.token_times)]

    def as_dict(self) -> dict[str, Any]:
        gaps = self.gaps_s
        prefilled = self.num_prompt_tokens - self.num_cached_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "new_tokens": self.num_new_tokens,
            "ttft_s": self.ttft_s,
            "prefill_tok_s": _ratio(prefilled, self.prefill_s),
            "decode_tok_s": _ratio(len(gaps), sum(gaps)),
            "itl_p50_ms": _milliseconds(percentile(gaps, 0.50)),
            "itl_p99_ms": _milliseconds(percentile(gaps, 0.99)),
        }


@dataclass
class DecodeCounters:
    """Decode steps of an engine: seconds spent in them (host included, prefill not), tokens and
    steps.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0

    def reset(self) -> None:
        self.seconds, self.num_tokens, self.num_steps = 0.0, 0, 0


ENOUGH_STEPS = 8  # for their mean to be a plain step's time


@dataclass
class SpeculationStats:
    """What speculation did. `plain_steps` drafted nothing, `rounds` did; `by_position` has, of the
    first drafted token of a row, the second and so on, how often all before it were accepted and
    how often it was too. `plain_step_s` is the calibrated time of a plain step (0 = not known); it
    counts until there were plain steps enough.
    """

    draft: str
    draft_bytes_per_step: int = 0
    plain_step_s: float = 0.0
    rounds: int = 0
    plain_steps: int = 0
    row_rounds: int = 0
    num_draft_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[tuple[int, int]] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    plain_steps_worth: float = 0.0  # how many plain steps would have given the same
    note: str = ""

    def add(
        self,
        num_drafted: int,
        outcomes: Sequence[tuple[int, int, int]],
        draft_s: float,
        verify_s: float,
    ) -> None:
        """One round: the number of tokens drafted for each row, and of each row that decodes its
        kind, how many drafted tokens could be accepted and how many were. 0 drafted: a plain step.
        """
        if not outcomes:
            return
        accepted = sum(num_accepted for _, _, num_accepted in outcomes)
        self.plain_steps_worth += 1 + accepted / len(outcomes)
        if num_drafted == 0:
            self.plain_steps += 1
            self.plain_s += verify_s
            return
        self.rounds += 1
        self.row_rounds += len(outcomes)
        self.num_draft_steps += num_drafted
        self.drafted += sum(tried for _, tried, _ in outcomes)
        self.accepted += accepted
        self.draft_s += draft_s
        self.verify_s += verify_s
        for _, tried, num_accepted in outcomes:
            for i in range(min(tried, num_accepted + 1)):
                if i == len(self.by_position):
                    self.by_position.append((0, 0))
                reached, stayed = self.by_position[i]
                self.by_position[i] = (reached + 1, stayed + (i < num_accepted))

    def as_dict(self) -> dict[str, Any]:
        """Costs are plain steps a round; `speedup` is tokens per second over those of plain steps,
        the time of plain steps among the rounds included."""
        plain_step_s = self.plain_step_s
        if self.plain_steps >= ENOUGH_STEPS:  # of the same moment, context and sampling
            plain_step_s = self.plain_s / self.plain_steps
        round_s = plain_step_s * self.rounds
        seconds = self.draft_s + self.verify_s + self.plain_s
        return {
            "draft": self.draft,
            "draft_bytes_per_step": self.draft_bytes_per_step,
            "rounds": self.rounds,
            "plain_steps": self.plain_steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "acceptance_by_position": [stayed / reached for reached, stayed in self.by_position],
            "mean_accepted_length": (
                1 + self.accepted / self.row_rounds if self.row_rounds else None
            ),
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "plain_step_s": plain_step_s or None,
            "draft_cost": self.draft_s / round_s if round_s else None,
            "verify_cost": self.verify_s / round_s if round_s else None,
            "speedup": _ratio(self.plain_steps_worth * plain_step_s, seconds),
            "note": self.note,
        }


@dataclass
class RunStats:
    """Several requests together, with what only the whole run knows. Bytes per token: one decode
    step's weights and used cache, over the rows that share the step. Of several processes that
    share a model (`num_ranks`), bytes are those of each.
    """

    requests: Sequence[RequestStats]
    load_s: float
    compile_s: float
    decode: DecodeCounters
    weight_bytes: int
    cache_bytes_per_token: int
    peak_memory_bytes: int
    device_bandwidth: float | None = None
    speculation: SpeculationStats | None = None
    num_ranks: int = 1

    def as_dict(self) -> dict[str, Any]:
        gaps = [gap for request in self.requests for gap in request.gaps_s]
        prefill_s = _covered([r.prefill_span for r in self.requests if r.prefill_span])
        prefilled = sum(r.num_prompt_tokens - r.num_cached_tokens for r in self.requests)
        first = [request.ttft_s for request in self.requests if request.ttft_s is not None]
        decode_tok_s = _ratio(self.decode.num_tokens, self.decode.seconds)
        bandwidth = None
        if decode_tok_s is not None:
            bandwidth = self.bytes_per_token * decode_tok_s
        return {
            "prompt_tokens": sum(r.num_prompt_tokens for r in self.requests),
            "new_tokens": sum(r.num_new_tokens for r in self.requests),
            "decode_tok_s": decode_tok_s,
            "prefill_tok_s": _ratio(prefilled, prefill_s),
            "ttft_s": median(first) if first else None,
            "itl_p50_ms": _milliseconds(percentile(gaps, 0.50)),
            "itl_p99_ms": _milliseconds(percentile(gaps, 0.99)),
            "bytes_per_token": self.bytes_per_token,
            "bandwidth_gb_s": bandwidth / 1e9 if bandwidth is not None else None,
            "bandwidth_fraction": (
                bandwidth / self.device_bandwidth if bandwidth and self.device_bandwidth else None
            ),
            "peak_memory_bytes": self.peak_memory_bytes,
            "load_s": self.load_s,
            "compile_s": self.compile_s,
            "num_ranks": self.num_ranks,
            "speculation": self.speculation and self.speculation.as_dict(),
        }

    @property
    def bytes_per_token(self) -> int:
        if not self.decode.num_tokens or not self.requests:
            return self.weight_bytes
        used = [r.num_prompt_tokens + r.num_new_tokens / 2 for r in self.requests]
        num_tokens, read = self.decode.num_tokens, self.weight_bytes * self.decode.num_steps
        reads_of_cache = num_tokens
        if self.speculation is not None:
            read += self.speculation.draft_bytes_per_step * self.speculation.num_draft_steps
            reads_of_cache -= self.speculation.accepted  # these are read with another token
        read += int(self.cache_bytes_per_token * sum(used) / len(used)) * reads_of_cache
        return read // num_tokens


def read_bandwidth(device: torch.device, seconds: float = 0.25) -> float:
    """Bytes per second that `device` reads: the best of repeated sums over memory far larger than
    the caches.
    """
    num_bytes = (1 << 28) if device.type == "cpu" else (1 << 31)
    if (free := free_memory(device)) is not None:  # a model may have left little
        num_bytes = max(1 << 20, min(num_bytes, free // 2))
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    best, deadline = 0.0, perf_counter() + seconds
    while best == 0.0 or perf_counter() < deadline:
        start = perf_counter()
        buffer.sum().item()
        best = max(best, num_bytes / (perf_counter() - start))
    return best


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one span: requests that wait together wait once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _ratio(amount: float, seconds: float | None) -> float | None:
    return amount / seconds if seconds and amount else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
