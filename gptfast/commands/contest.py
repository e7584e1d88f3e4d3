"""Several engines at the same work in the same run: the measuring half of `gptfast bench`.

Knows how to ask an engine for tokens and what to make of their times; prints nothing. All of them
do the same rounds, one after the other, with a probe of the memory's speed between them: figures of
one run may be compared, those of two runs on a shared machine may not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch

from gptfast.device import peak_memory
from gptfast.engine import Engine
from gptfast.model import Transformer
from gptfast.sampling import SamplingParams
from gptfast.stats import DecodeCounters, RequestStats, RunStats

# Figures of which a run reports the median of its rounds.
ROUND_KEYS = (
    "decode_tok_s prefill_tok_s ttft_s itl_p50_ms itl_p99_ms bandwidth_gb_s bandwidth_fraction"
).split()


@dataclass(frozen=True)
class Work:
    """A round: one long prompt to its first token, then a short prompt per row, decoded greedily
    for `num_new_tokens`.
    """

    long_prompt: list[int]
    short_prompts: list[list[int]]
    num_new_tokens: int
    weight_bytes: int
    cache_bytes_per_token: int

    @staticmethod
    def random(
        model: Transformer, num_rows: int, prompt_tokens: int, prefill_tokens: int, new_tokens: int
    ) -> "Work":
        """Random token ids, the same ones in every run."""
        config, weight = model.config, model.embed.weight
        generator = torch.Generator().manual_seed(0)

        def ids(*shape: int) -> list[Any]:
            return torch.randint(config.vocab_size, shape, generator=generator).tolist()

        return Work(
            ids(prefill_tokens),
            ids(num_rows, prompt_tokens),
            new_tokens,
            model.bytes_per_step,
            config.cache_bytes_per_token(weight.element_size()),
        )


@dataclass(frozen=True)
class Trace:
    """What an engine made of some prompts: new token ids of each, and when they came."""

    token_ids: list[list[int]]
    requests: list[RequestStats]


class Contestant(Protocol):
    """An engine with its model loaded. `run` continues all prompts at once, greedily and past any
    end-of-sequence token, reading each from its beginning.
    """

    name: str
    load_s: float

    def run(self, prompts: Sequence[list[int]], num_new_tokens: int) -> Trace: ...

    @property
    def compile_s(self) -> float | None:
        """None where only the first round's length tells."""


class Gptfast:
    """This engine. `run` is what any caller of the loop does."""

    name = "gptfast"

    def __init__(
        self, model: Transformer, load_s: float, num_rows: int, max_seq_len: int, compile: bool
    ) -> None:
        self.load_s = load_s
        self.engine = Engine(model, num_rows, max_seq_len, compile)
        self.engine.runner.warm_up([_greedy(1)])

    @property
    def compile_s(self) -> float:
        return self.engine.runner.compile_s

    def run(self, prompts: Sequence[list[int]], num_new_tokens: int) -> Trace:
        self.engine.forget()
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
    """A contestant's figures, round by round, and the tokens it decoded (the same every round)."""

    contestant: Contestant
    peak_memory_bytes: int
    compile_s: float
    token_ids: list[list[int]]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The medians of the rounds, and the rounds themselves."""
        return {
            **{key: median(figures[key] for figures in self.rounds) for key in ROUND_KEYS},
            "bytes_per_token": self.rounds[0]["bytes_per_token"],
            "read_bandwidth_gb_s": median(figures["read_bandwidth_gb_s"] for figures in self.rounds),
            "peak_memory_bytes": self.peak_memory_bytes,
            "load_s": self.contestant.load_s,
            "compile_s": self.compile_s,
            "per_round": [
                {key: figures[key] for key in (*ROUND_KEYS, "read_bandwidth_gb_s")}
                for figures in self.rounds
            ],
        }


def enter(build: Callable[[], Contestant], work: Work, device: torch.device) -> Result:
    """Builds a contestant and lets it do the work once, unmeasured, so that what happens only once
    (compilation, page faults, growing pools) is over; its peak memory is that of this time.
    """
    memory = PeakMemory(device)
    contestant = build()
    start = perf_counter()
    _work_once(contestant, work)
    first = perf_counter() - start
    compile_s = contestant.compile_s
    if compile_s is None:
        start = perf_counter()
        _work_once(contestant, work)
        compile_s = max(0.0, first - (perf_counter() - start))
    _, decoded = _work_once(contestant, work)
    return Result(contestant, memory.peak(), compile_s, decoded.token_ids)


def hold_rounds(
    results: Sequence[Result], work: Work, num_rounds: int, probe: Callable[[], float]
) -> None:
    """Rounds A B A B ..., a probe of the device's read bandwidth before and after each."""
    before = probe()
    for _ in range(num_rounds):
        for result in results:
            prefill, decode = _work_once(result.contestant, work)
            after = probe()
            result.rounds.append(_figures(result, work, prefill, decode, (before + after) / 2))
            before = after


def _work_once(contestant: Contestant, work: Work) -> tuple[Trace, Trace]:
    prefill = contestant.run([work.long_prompt], 1)
    return prefill, contestant.run(work.short_prompts, work.num_new_tokens)


def _figures(
    result: Result, work: Work, prefill: Trace, decode: Trace, bandwidth: float
) -> dict[str, Any]:
    """A round's numbers, by the definitions of RunStats for every contestant."""
    stats = RunStats(
        requests=decode.requests,
        load_s=result.contestant.load_s,
        compile_s=result.compile_s,
        decode=_decoding(decode.requests),
        weight_bytes=work.weight_bytes,
        cache_bytes_per_token=work.cache_bytes_per_token,
        peak_memory_bytes=result.peak_memory_bytes,
        device_bandwidth=bandwidth,
    )
    long = prefill.requests[0].as_dict()
    return stats.as_dict() | {
        "prefill_tok_s": long["prefill_tok_s"],
        "read_bandwidth_gb_s": bandwidth / 1e9,
    }


def _decoding(requests: Sequence[RequestStats]) -> DecodeCounters:
    """From the moment every row has its first token to the last token: no prefill is in it."""
    start = max(request.token_times[0] for request in requests)
    after = [sum(time > start for time in request.token_times) for request in requests]
    seconds = max(request.token_times[-1] for request in requests) - start
    return DecodeCounters(seconds, sum(after), max(after))


class PeakMemory:
    """Peak bytes of this process (or of the CUDA device) from now on, counted as if nothing but an
    idle process had been there before: what earlier contestants hold is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.others = torch.cuda.memory_allocated(device)
        else:
            _reset_peak_resident()
            self.others = max(0, resident_memory() - IDLE_RESIDENT)

    def peak(self) -> int:
        return peak_memory(self.device) - self.others
