"""The measuring half of bench/peers.py: contestants in processes of their own that take turns.

A contestant is idle, blocked on its input, while another has its turn. Times are measured inside
its process, around its own work; starts and memory from outside. Prints nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

WORKER = Path(__file__).with_name("peer_worker.py")
WARM_TOKENS = 8  # decoded unmeasured, so that what happens only once is over
SLOW = 0.6  # of the fastest's speed: who has less after two turns of a stage rests
# Of a turn's time: whose threads together wait longer than that for processors has a neighbour. An
# engine whose threads meet at barriers then loses nearly everything: llama.cpp fell from 60 tokens
# a second to 1 beside one busy core.
DISTURBED = 0.05
PAUSE_SECONDS = 2.0  # before a disturbed turn is taken again, times the tries before
SEEDS = 10_000  # more than all rounds use: from a turn's prompt to that of its next try
SHORT = "short"  # the stage of rounds with short prompts; the others are named by their context

Figures = dict[str, float]  # of a turn


@dataclass(frozen=True)
class Work:
    """A round: a long prompt to its first token, and a short prompt with `new_tokens` decoded.
    In a stage of its own for each context: `context_tokens` decoded behind one that long.
    """

    vocab_size: int
    prompt_tokens: int
    prefill_tokens: int
    new_tokens: int
    contexts: Sequence[int]
    context_tokens: int

    @property
    def max_seq_len(self) -> int:
        """Tokens to make room for in the rounds with short prompts."""
        return max(self.prefill_tokens + 1, self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True)
class Entry:
    """Who takes part: an engine, the format of its weights (or how it runs), and where they are.
    `step_bytes` of them are read for every token; None where the engine itself tells. `compiled`
    matters to engines that leave the choice.
    """

    engine: str
    form: str
    path: Path
    compiled: bool = False
    step_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.form}"


@dataclass
class Racer:
    """A contestant in its process, and its figures: of each stage one entry a round. After a
    failure it takes no more turns.
    """

    entry: Entry
    process: "subprocess.Popen[str]"
    log: Path
    starts_s: list[float]
    version: str
    step_bytes: int
    failure: str | None = None
    peak_memory_bytes: int = 0
    token_ids: list[int] = field(default_factory=list)
    stages: dict[str, list[Figures]] = field(default_factory=dict)

    @staticmethod
    def start(entry: Entry, work: Work, threads: int, num_starts: int, log: Path) -> "Racer":
        """Starts it so many times (once, where nothing is compiled that a second process would
        find), each to the first token of a short prompt; the last process stays. RuntimeError where
        it fails.
        """
        task = {
            "engine": entry.engine,
            "path": str(entry.path),
            "threads": threads,
            "compile": entry.compiled,
            "max_seq_len": work.max_seq_len,
            "prompt_tokens": work.prompt_tokens,
            "vocab_size": work.vocab_size,
        }
        starts: list[float] = []
        while True:
            begun = monotonic()
            process = _spawn(task, threads, log)
            said = _answer(process, log)
            starts.append(said["first_token_at"] - begun)
            if len(starts) == num_starts or not entry.compiled:
                step_bytes = entry.step_bytes or said["step_bytes"]
                return Racer(entry, process, log, starts, said["version"], step_bytes)
            _end(process)

    def ask(self, do: str, **what: int) -> dict[str, Any]:
        """Has it do one thing. RuntimeError where it fails."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its last answer, or the lack of one, says why
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
        return _answer(self.process, self.log)

    def waited(self) -> float:
        """Seconds that its threads have been ready to run, and did not, since it began (the second
        number of schedstat, see proc(5); 0 where there is none).
        """
        nanoseconds = 0
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # a thread that has just ended
                nanoseconds += int(file.read_text().split()[1])
        return nanoseconds / 1e9

    def note_memory(self) -> None:
        """Its peak of resident memory so far, mapped files included (VmHWM in proc(5))."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
        self.peak_memory_bytes = int(line.split()[1]) * 1024

    def end(self) -> None:
        _end(self.process)

    def as_dict(self) -> dict[str, Any]:
        """Medians over the rounds, and the rounds."""
        rounds, contexts = self.stages[SHORT], {**self.stages}
        del contexts[SHORT]
        return {
            "version": self.version,
            **{key: median(each[key] for each in rounds) for key in rounds[0]},
            **{f"context_{at}_tok_s": _speed(each) for at, each in contexts.items()},
            "first_token_s": self.starts_s[-1],
            "peak_memory_bytes": self.peak_memory_bytes,
            "bytes_per_token": self.step_bytes,
            "starts_s": self.starts_s,
            "per_round": rounds,
            "contexts_per_round": contexts,
        }


Turn = Callable[[Racer, int, int], Figures]  # number of the round, tries before


def race(
    racers: Sequence[Racer],
    work: Work,
    num_rounds: int,
    probe: Callable[[], float],
    num_tries: int = 1,
) -> None:
    """All stages. `probe` tells the bytes per second that memory gives. A turn that something else
    on the machine disturbed is taken up to `num_tries` times, and the least disturbed counts.
    """

    def warm_up(racer: Racer) -> None:
        _short_turn(racer, work, 0, WARM_TOKENS, 0)

    def turn(racer: Racer, number: int, attempt: int) -> Figures:
        return _short_turn(racer, work, number, work.new_tokens, attempt)

    def rounds(stage: str, prepare: Callable[[Racer], None], turn: Turn) -> None:
        _hold_rounds(stage, racers, num_rounds, probe, num_tries, prepare, turn)

    rounds(SHORT, warm_up, turn)
    for racer in racers:
        _attempt(racer, Racer.note_memory)
    new = work.context_tokens
    room = max(work.contexts, default=0) + 1 + max(WARM_TOKENS, new)
    for context in work.contexts:

        def hold(racer: Racer, context: int = context) -> None:
            racer.ask("hold", length=context, room=room, seed=0)
            racer.ask("resume", new=new)

        def resume(racer: Racer, number: int, attempt: int) -> Figures:
            times = racer.ask("resume", new=new)["times"]
            return {"decode_tok_s": _decode_speed(times)}

        rounds(str(context), hold, resume)


def _hold_rounds(
    stage: str,
    racers: Sequence[Racer],
    num_rounds: int,
    probe: Callable[[], float],
    num_tries: int,
    prepare: Callable[[Racer], None],
    turn: Turn,
) -> None:
    """Rounds A B A B ..., with a probe before and after each turn. Peers that are far behind leave
    after two: they are close to nothing, and would take most of the time.
    """
    for racer in racers:
        _attempt(racer, prepare)
    before = probe()
    for number in range(1, num_rounds + 1):
        for racer in racers:
            if racer.failure is None and not _is_slow(racer, racers, stage):
                before = _take(racer, stage, partial(turn, racer, number), before, probe, num_tries)


def _take(
    racer: Racer,
    stage: str,
    turn: Callable[[int], Figures],
    before: float,
    probe: Callable[[], float],
    num_tries: int,
) -> float:
    """Notes one turn, of up to `num_tries` the least disturbed. From the probe before it to the one
    behind it.
    """
    tries: list[Figures] = []
    while not tries or (tries[-1]["waited"] > DISTURBED and len(tries) < num_tries):
        if tries:
            sleep(PAUSE_SECONDS * len(tries))
            before = probe()
        begun, waited = monotonic(), racer.waited()
        try:
            figures = turn(len(tries))
        except RuntimeError as error:
            racer.failure = str(error)
            return before
        waited = (racer.waited() - waited) / (monotonic() - begun)
        after = probe()
        bandwidth, read = (before + after) / 2, racer.step_bytes * figures["decode_tok_s"]
        probed = {"read_bandwidth_gb_s": bandwidth / 1e9, "bandwidth_fraction": read / bandwidth}
        tries.append({**figures, **probed, "waited": waited})
        before = after
    racer.stages.setdefault(stage, []).append(min(tries, key=lambda each: each["waited"]))
    return before


def _is_slow(racer: Racer, racers: Sequence[Racer], stage: str) -> bool:
    """By the better of two rounds, since one may have met with something else; ours never is."""

    def best(one: Racer) -> float:
        return max((each["decode_tok_s"] for each in one.stages.get(stage, [])), default=0.0)

    has_had_two = len(racer.stages.get(stage, [])) >= 2
    is_own = racer.entry.engine == "gptfast"
    return has_had_two and not is_own and best(racer) < SLOW * max(map(best, racers))


def _short_turn(racer: Racer, work: Work, number: int, new_tokens: int, attempt: int) -> Figures:
    """Prompts differ from round to round, and are the same for all: engines remember beginnings."""
    seed = 2 * number + SEEDS * attempt
    prefill = racer.ask("run", length=work.prefill_tokens, new=1, seed=seed)
    decode = racer.ask("run", length=work.prompt_tokens, new=new_tokens, seed=2 * number + 1)
    if number == 1:
        racer.token_ids = decode["tokens"]
    return {
        "decode_tok_s": _decode_speed(decode["times"]),
        "prefill_tok_s": work.prefill_tokens / prefill["times"][0],
    }


def _decode_speed(times: Sequence[float]) -> float:
    """Tokens per second after the first: no prompt is in it."""
    return (len(times) - 1) / (times[-1] - times[0])


def _speed(rounds: Sequence[Figures]) -> float:
    return median(each["decode_tok_s"] for each in rounds)


def _attempt(racer: Racer, do: Callable[[Racer], None]) -> None:
    if racer.failure is None:
        try:
            do(racer)
        except RuntimeError as error:
            racer.failure = str(error)


# -- processes --


def _spawn(task: dict[str, Any], threads: int, log: Path) -> "subprocess.Popen[str]":
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            text=True,
        )


def _answer(process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    said = json.loads(line) if line else {"error": f"ended with {process.wait()}"}
    if "error" in said:
        raise RuntimeError(f"{said['error']} (see {log})")
    return said


def _end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
