"""Processes that are the ranks of a group, for tests: started without torchrun's own seconds
(`ranks`, `run_ranks`) or by torchrun itself (`torchrun`, `run_torchrun`).

Nothing survives: every process carries a mark in its environment, and whatever carries it is killed
when the block ends, however it ends, or (on Linux) when the test process does.

A command is what follows `python`: ["-m", "gptfast", "generate", ..] or ["-c", "code"].
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MARK = "GPTFAST_TEST_RANKS"
# What a torchrun around the tests would have said, and what hides that a text was never flushed.
FOREIGN = (
    "PYTHONUNBUFFERED RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR "
    "MASTER_PORT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID"
).split()
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Finished:
    """What a process has said, and how it ended: None while it runs, -9 after SIGKILL."""

    returncode: int | None
    stdout: str
    stderr: str


class Ranks:
    """Processes that run, by rank; of torchrun, by agent. They and their children carry `mark`."""

    def __init__(
        self, mark: str, processes: list[subprocess.Popen[str]], files: list[list[IO[str]]]
    ) -> None:
        self.mark, self.processes, self._files = mark, processes, files

    def said(self, rank: int) -> Finished:
        stdout, stderr = (Path(file.name).read_text(errors="replace") for file in self._files[rank])
        return Finished(self.processes[rank].poll(), stdout, stderr)

    def all_said(self) -> list[Finished]:
        return [self.said(rank) for rank in range(len(self.processes))]

    def send(self, signal_number: int, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(signal_number)

    def until(self, happened: Callable[[], bool], timeout: float = 120.0) -> None:
        """Waits until something has happened; fails with what all have said if it does not."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                self._fail(f"not within {timeout:.0f} s")
            time.sleep(0.02)

    def until_said(self, rank: int, text: str, timeout: float = 120.0) -> None:
        """Waits for words of a rank; fails where it ends without them."""

        def said_or_ended() -> bool:
            ended = self.processes[rank].poll() is not None
            found = self.said(rank)
            if text in found.stdout + found.stderr:
                return True
            if ended:
                self._fail(f"rank {rank} ended without saying {text!r}")
            return False

        self.until(said_or_ended, timeout)

    def until_ended(self, timeout: float = 120.0) -> list[Finished]:
        """Waits for all; what they have said."""
        self.until(lambda: all(process.poll() is not None for process in self.processes), timeout)
        return self.all_said()

    def _fail(self, reason: str) -> None:
        words = [
            f"--- {rank}: exit code {said.returncode}\n{said.stdout}\n- stderr:\n{said.stderr}"
            for rank, said in enumerate(self.all_said())
        ]
        pytest.fail("\n".join([reason, *words]), pytrace=False)


@contextmanager
def ranks(
    size: int,
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | int | None = None,
) -> Iterator[Ranks]:
    """`size` ranks of one host. Rank 0 reads `stdin`: a text, or with subprocess.PIPE what the test
    writes to `processes[0].stdin`.
    """
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**sizes, **meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    with _processes([command] * size, places, env, stdin) as started:
        yield started


@contextmanager
def torchrun(
    size: int,
    command: Sequence[str],
    *,
    nodes: int = 1,
    env: Mapping[str, str] | None = None,
    stdin: str | int | None = None,
) -> Iterator[Ranks]:
    """torchrun with `size` ranks on each of `nodes` hosts, which are all this one."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    many = [["--nnodes", str(nodes), "--node-rank", str(node), *meeting] for node in range(nodes)]
    agents = [[*run, *options, *command] for options in (many if nodes > 1 else [["--standalone"]])]
    with _processes(agents, [{}] * nodes, env, stdin) as started:
        yield started


def run_ranks(
    size: int,
    command: Sequence[str],
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> list[Finished]:
    """What `size` ranks said, all of which have ended within `timeout` seconds."""
    with ranks(size, command, env=env, stdin=stdin) as started:
        return started.until_ended(timeout)


def run_torchrun(
    size: int,
    command: Sequence[str],
    *,
    timeout: float = 120.0,
    nodes: int = 1,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> list[Finished]:
    """As `run_ranks`, by torchrun: what each of its agents, and the ranks of it, said."""
    with torchrun(size, command, nodes=nodes, env=env, stdin=stdin) as started:
        return started.until_ended(timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def marked(mark: str) -> list[int]:
    """The processes that carry this mark; zombies do not."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@contextmanager
def _processes(
    commands: Sequence[Sequence[str]],
    places: Sequence[Mapping[str, object]],
    env: Mapping[str, str] | None,
    stdin: str | int | None,
) -> Iterator[Ranks]:
    mark = secrets.token_hex(8)
    inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    common = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: mark, **(env or {})}
    processes: list[subprocess.Popen[str]] = []
    files: list[list[IO[str]]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(_end, mark, processes)
        for number, (command, place) in enumerate(zip(commands, places, strict=True)):
            names = (f"stdout{number}", f"stderr{number}")
            files.append([stack.enter_context((folder / name).open("w")) for name in names])
            source: int | IO[str] = subprocess.DEVNULL
            if number == 0 and isinstance(stdin, int):
                source = stdin
            elif number == 0 and isinstance(stdin, str):
                (folder / "stdin").write_text(stdin)
                source = stack.enter_context((folder / "stdin").open())
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=REPOSITORY,
                    env={**common, **{name: str(value) for name, value in place.items()}},
                    stdin=source,
                    stdout=files[-1][0],
                    stderr=files[-1][1],
                    text=True,
                    start_new_session=True,
                    preexec_fn=_begin,
                )
            )
        yield Ranks(mark, processes, files)


def _end(mark: str, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kills whatever carries the mark, and waits until it is gone."""
    while True:
        left = {*marked(mark), *(process.pid for process in processes if process.poll() is None)}
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if not left:
            return
        time.sleep(0.01)


_libc = ctypes.CDLL(None)


def _begin() -> None:
    # Where the tests run in a shell's background, it is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
