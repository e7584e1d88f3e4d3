"""The measuring half of bench/parallel.py: teams of ranks, each started by torchrun, that take
turns. Prints nothing.

A team waits for its input while another has its turn. Times are measured inside of its rank 0; all
teams do the same work on the same weights, with a probe of the memory between turns.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from scaling import Exchange
from spec_race import equal_tokens

WORKER = Path(__file__).with_name("parallel_worker.py")
START_SECONDS, TURN_SECONDS, END_SECONDS = 300.0, 120.0, 20.0
EXCHANGE_TURNS = 3
AGENT = "torch/distributed/elastic"  # in what torchrun says behind a rank's own words

Figures = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """How a team runs: so many ranks of so many CPU threads; without `shared` memory they talk
    through gloo.
    """

    num_ranks: int
    num_threads: int
    shared: bool = True

    @property
    def name(self) -> str:
        ranks = "1 process" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return f"{ranks} x {self.num_threads}{'' if self.shared else ', gloo'}"


@dataclass
class Team:
    """A line in its processes, what it said of itself, and its figures of each round."""

    line: Line
    process: "subprocess.Popen[str]"
    log: Path
    said: Figures = field(default_factory=dict)
    rounds: list[Figures] = field(default_factory=list)
    exchange_s: list[list[float]] = field(default_factory=list)  # of each collective, each turn

    def ask(self, **order: Any) -> Figures:
        """Has it do one thing. RuntimeError where it fails or takes too long."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the lack of an answer says why
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self.answer(TURN_SECONDS)

    def answer(self, seconds: float) -> Figures:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            why = "ended" if ready else f"said nothing for {seconds:.0f} s"
            words = self.log.read_text().splitlines()
            own = list(takewhile(lambda word: AGENT not in word, words))
            last = "\n".join(own[-4:])
            raise RuntimeError(f"{self.line.name} {why}\n{last}")
        found: Figures = json.loads(line)
        return found

    def end(self) -> None:
        """Its input ends, so it does; else it is told, then killed. The ranks die with the agent
        that started them.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
                break
        self.process.stdout.close()


@contextmanager
def teams(lines: Sequence[Line], task: Figures, logs: Path) -> Iterator[list[Team]]:
    """All of them, loaded one after the other; none is left behind."""
    found: list[Team] = []
    try:
        for line in lines:
            found.append(_start(line, task, logs / f"{line.name}.log"))
            found[-1].said = found[-1].answer(START_SECONDS)
        yield found
    finally:
        for team in found:
            team.end()


def _start(line: Line, task: Figures, log: Path) -> Team:
    environment = {**os.environ, "OMP_NUM_THREADS": str(line.num_threads)}
    if not line.shared:
        environment["GPTFAST_NO_SHARED_MEMORY"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(line.num_ranks), str(WORKER)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, json.dumps({**task, "threads": line.num_threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
    return Team(line, process, log)


def race(
    teams: Sequence[Team],
    prefill: Sequence[int],
    decode: Sequence[int],
    num_new_tokens: int,
    num_rounds: int,
    probe: Callable[[int], float],
) -> None:
    """Rounds A B A B ...: a long prompt to its first token, then new tokens behind a short one.
    `probe` tells the bytes per second that memory gives to so many threads. The first round does
    not count.
    """
    for number in range(num_rounds + 1):
        for team in teams:
            num_threads = team.line.num_ranks * team.line.num_threads
            before = probe(num_threads)
            long = team.ask(do="prefill", prompt=list(prefill), new=1)
            short = team.ask(do="decode", prompt=list(decode), new=num_new_tokens)
            if number:
                team.rounds.append(
                    {
                        "decode_tok_s": short["decode_tok_s"],
                        "prefill_tok_s": long["prefill_tok_s"],
                        "read_bandwidth": (before + probe(num_threads)) / 2,
                        "token_ids": short["token_ids"],
                    }
                )


def race_exchanges(teams: Sequence[Team], exchanges: dict[str, list[Exchange]]) -> None:
    """The collectives of a step with nothing between them, by name of the line, in turns. Sizes as
    for a model's own dtype.
    """
    for _ in range(EXCHANGE_TURNS):
        for team in teams:
            every = [(e.kind, e.count, e.num_bytes) for e in exchanges[team.line.name]]
            team.exchange_s.append(team.ask(do="exchange", exchanges=every)["seconds"])


def figures(team: Team, first: Team) -> Figures:
    """Medians over the rounds, and the rounds. `equal_tokens`: of the first round, beside those of
    the first team.
    """
    keys = ("decode_tok_s", "prefill_tok_s", "read_bandwidth")
    exchange = [median(each) for each in zip(*team.exchange_s, strict=True)]
    tokens, others = ([one.rounds[0]["token_ids"]] for one in (team, first))
    return {
        "ranks": team.line.num_ranks,
        "threads_a_rank": team.line.num_threads,
        "collectives_through": _means(team),
        "fused_step": team.said["has_fused_step"],
        **{key: median(each[key] for each in team.rounds) for key in keys},
        "equal_tokens": equal_tokens(tokens, others),
        "weight_bytes": team.said["weight_bytes"],
        "bytes_read": team.said["bytes_read"],
        "idle": team.said["idle"],
        "loaded": team.said["loaded"],
        "after": team.ask(do="memory")["ranks"],
        "load_s": team.said["load_s"],
        "exchange_s": exchange,
        "per_round": [{key: each[key] for key in keys} for each in team.rounds],
    }


def _means(team: Team) -> str | None:
    if team.line.num_ranks == 1:
        return None
    return "shared memory" if team.said["shared_memory"] else "process group"
