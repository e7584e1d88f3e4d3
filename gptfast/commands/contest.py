"""Several engines at the same work in the same run: the measuring half of `gptfast bench`.

Knows how to ask an engine for tokens and what to make of their times; prints nothing. All of them
do the same rounds, one after the other, with a probe of the memory's speed between them: figures of
one run may be compared, those of two runs on a shared machine may not.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch

from gptfast import __version__
from gptfast.device import peak_memory
from gptfast.engine import Engine
from gptfast.joint import choose_sums
from gptfast.model import Transformer
from gptfast.sampling import SamplingParams
from gptfast.stats import DecodeCounters, RequestStats, RunStats

# Figures of which a run reports the median of its rounds.
ROUND_KEYS = (
    "decode_tok_s prefill_tok_s ttft_s itl_p50_ms itl_p99_ms "
    "bandwidth_gb_s read_bandwidth_gb_s bandwidth_fraction"
).split()


@dataclass(frozen=True)
class Work:
    """A round: one long prompt to its first token, then a short prompt per row, decoded greedily
    for `num_new_tokens`.
    """

    long_prompt: list[int]
    short_prompts: list[list[int]]
    num_new_tokens: int

    @staticmethod
    def random(
        vocab_size: int, prefill_tokens: int, num_rows: int, prompt_tokens: int, num_new_tokens: int
    ) -> "Work":
        """Random token ids, the same ones in every run."""
        generator = torch.Generator().manual_seed(0)

        def ids(*shape: int) -> list[Any]:
            return torch.randint(vocab_size, shape, generator=generator).tolist()

        return Work(ids(prefill_tokens), ids(num_rows, prompt_tokens), num_new_tokens)

    @property
    def max_seq_len(self) -> int:
        """Tokens that a row has to hold."""
        return max(len(self.long_prompt) + 1, len(self.short_prompts[0]) + self.num_new_tokens)


@dataclass(frozen=True)
class Traffic:
    """What a decode step has to read, whoever does it."""

    weight_bytes: int
    cache_bytes_per_token: int

    @staticmethod
    def of(engine: Engine) -> "Traffic":
        return Traffic(engine.model.bytes_per_step, engine.runner.cache.bytes_per_token)


@dataclass(frozen=True)
class Trace:
    """What an engine made of some prompts: new token ids of each, and when they came."""

    token_ids: list[list[int]]
    requests: list[RequestStats]


class Contestant(Protocol):
    """An engine with its model loaded. `compile_s` is None where the engine does not tell; then
    what the first round took longer than the second stands for it.
    """

    name: str
    version: str
    load_s: float

    @property
    def compile_s(self) -> float | None: ...

    def run(self, prompts: Sequence[list[int]], num_new_tokens: int) -> Trace:
        """Continues all prompts together, greedily and past any end-of-sequence token, reading
        each from its beginning.
        """


class Gptfast:
    """This engine; `load` makes its model. `run` is what any caller of the loop does."""

    name, version = "gptfast", __version__

    def __init__(
        self,
        load: Callable[[], Transformer],
        num_rows: int,
        max_seq_len: int,
        compile: bool,
        kv_cache_dtype: str = "auto",
    ) -> None:
        start = perf_counter()
        self.model = load()
        choose_sums(self.model.group, self.model)
        self.load_s = perf_counter() - start
        self.engine = Engine(self.model, num_rows, max_seq_len, compile, kv_cache_dtype)
        self.engine.runner.warm_up([_greedy(1)])

    @property
    def compile_s(self) -> float:
        return self.engine.runner.compile_s

    def run(self, prompts: Sequence[list[int]], num_new_tokens: int) -> Trace:
        self.engine.forget()
        return self.continue_all(prompts, num_new_tokens)

    def continue_all(self, prompts: Sequence[list[int]], num_new_tokens: int) -> Trace:
        """As `run`, but what the cache holds of a prompt is not read again."""
        params = _greedy(num_new_tokens)
        ids = [self.engine.submit(prompt, params) for prompt in prompts]
        tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
        stats: dict[int, RequestStats] = {}
        while self.engine.has_work:
            for event in self.engine.step():
                tokens[event.request_id] += event.token_ids
                stats[event.request_id] = event.stats
        return Trace([tokens[i] for i in ids], [stats[i] for i in ids])


def _greedy(num_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)


@dataclass
class Result:
    """A contestant's figures, round by round, and the tokens it decoded."""

    contestant: Contestant
    peak_memory_bytes: int
    compile_s: float
    token_ids: list[list[int]]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The medians of the rounds, and the rounds themselves."""
        per_round = [{key: figures[key] for key in ROUND_KEYS} for figures in self.rounds]
        return {
            "version": self.contestant.version,
            **{key: median(figures[key] for figures in per_round) for key in ROUND_KEYS},
            "bytes_per_token": self.rounds[0]["bytes_per_token"],
            "peak_memory_bytes": self.peak_memory_bytes,
            "load_s": self.contestant.load_s,
            "compile_s": self.compile_s,
            "per_round": per_round,
        }


def enter(
    build: Callable[[], Contestant], work: Work, device: torch.device, idle_bytes: int
) -> Result:
    """Builds a contestant and lets it do the work unmeasured, so that what happens only once
    (compilation, page faults, growing pools) is over.

    Its peak memory is that of this time, without what was held before it came, and with the
    `idle_bytes` of a process that holds no model.
    """
    held = resident_memory(device)
    _reset_peak_memory(device)
    contestant = build()
    first, _ = _timed(contestant, work)
    second, token_ids = _timed(contestant, work)
    compile_s = contestant.compile_s
    if compile_s is None:
        compile_s = max(0.0, first - second)
    peak = peak_memory(device) - held + idle_bytes
    return Result(contestant, peak, compile_s, token_ids)


def hold_rounds(
    results: Sequence[Result],
    work: Work,
    traffic: Traffic,
    num_rounds: int,
    probe: Callable[[], float],
) -> None:
    """Rounds A B A B ...; `probe` tells the device's bytes per second before and after each."""
    before = probe()
    for _ in range(num_rounds):
        for result in results:
            prefill, decode = _work_once(result.contestant, work)
            after = probe()
            bandwidth = (before + after) / 2
            result.rounds.append(_figures(result, traffic, prefill, decode, bandwidth))
            before = after


def _timed(contestant: Contestant, work: Work) -> tuple[float, list[list[int]]]:
    """Seconds of one round, and the tokens it decoded."""
    start = perf_counter()
    _, decode = _work_once(contestant, work)
    return perf_counter() - start, decode.token_ids


def _work_once(contestant: Contestant, work: Work) -> tuple[Trace, Trace]:
    prefill = contestant.run([work.long_prompt], 1)
    return prefill, contestant.run(work.short_prompts, work.num_new_tokens)


def _figures(
    result: Result, traffic: Traffic, prefill: Trace, decode: Trace, bandwidth: float
) -> dict[str, Any]:
    """A round's numbers, by the definitions of RunStats for every contestant."""
    stats = RunStats(
        requests=decode.requests,
        load_s=result.contestant.load_s,
        compile_s=result.compile_s,
        decode=_decoding(decode.requests),
        weight_bytes=traffic.weight_bytes,
        cache_bytes_per_token=traffic.cache_bytes_per_token,
        peak_memory_bytes=result.peak_memory_bytes,
        device_bandwidth=bandwidth,
    )
    return stats.as_dict() | {
        "prefill_tok_s": prefill.requests[0].as_dict()["prefill_tok_s"],
        "read_bandwidth_gb_s": bandwidth / 1e9,
    }


def _decoding(requests: Sequence[RequestStats]) -> DecodeCounters:
    """From the moment every row has its first token to the last token: no prefill is in it."""
    start = max(request.token_times[0] for request in requests)
    after = [sum(time > start for time in request.token_times) for request in requests]
    seconds = max(request.token_times[-1] for request in requests) - start
    return DecodeCounters(seconds, sum(after), max(after))


def resident_memory(device: torch.device) -> int:
    """Bytes in use now, of the kind that `peak_memory` tells the peak of; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _reset_peak_memory(device: torch.device) -> None:
    """From here on the peak is counted anew; on a CPU only where Linux lets a process ask for it
    (see clear_refs in proc(5)), else it stays that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
