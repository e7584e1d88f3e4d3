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


@dataclass
class RunStats:
    """Several requests together, with what only the whole run knows. Bytes per token: one decode
    step's weights and used cache, over the rows that share the step.
    """

    requests: Sequence[RequestStats]
    load_s: float
    compile_s: float
    decode: DecodeCounters
    weight_bytes: int
    cache_bytes_per_token: int
    peak_memory_bytes: int
    device_bandwidth: float | None = None

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
        }

    @property
    def bytes_per_token(self) -> int:
        if not self.decode.num_tokens or not self.requests:
            return self.weight_bytes
        used = [r.num_prompt_tokens + r.num_new_tokens / 2 for r in self.requests]
        rows = self.decode.num_tokens / self.decode.num_steps
        return int(self.weight_bytes / rows + self.cache_bytes_per_token * sum(used) / len(used))


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
