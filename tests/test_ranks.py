"""Ranks that end: in good order, by a mistake, by an error, by `kill -9`, by standing still. In
every case all end, and one line says which rank was the first and why.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import Finished, Ranks, marked, ranks, run_ranks, run_torchrun, torchrun
from torch.distributed import HashStore

from gptfast import LLM, SamplingParams, commands, follower, parallel
from gptfast.interface import interface_to
from gptfast.launch import VARIABLES
from gptfast.parallel import Group
from gptfast.watch import Watch

PROMPT = "Once upon a time"
GENERATE = ["-m", "gptfast", "generate", "--model", "storyteller", "--temperature", "0"]
SHORT = ["--prompt", PROMPT, "--max-new-tokens", "8"]
CHAT = ["-m", "gptfast", "chat", "--model", "storyteller"]
LONG = ["--prompt", PROMPT, "--max-new-tokens", "400", "--num-samples", "500"]
SOON = {"GPTFAST_PATIENCE": "2"}  # seconds without a word

# Ranks that do nothing but watch each other: no torch, so they start at once. The argument of each
# rank is what it does then.
WATCHERS = [
    "-c",
    """
import os, sys, time
from pathlib import Path
from gptfast.watch import Watch

class Store:  # a folder
    def set(self, key, value):
        Path(sys.argv[1], "new").write_text(value)
        Path(sys.argv[1], "new").rename(Path(sys.argv[1], key))
    def get(self, key):
        while not Path(sys.argv[1], key).exists():
            time.sleep(0.01)
        return Path(sys.argv[1], key).read_bytes()

def go():
    Store().get("go")

rank, size, on_host = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(sys.argv[2])
watch = Watch(Store(), rank, size, rank % on_host, on_host)
print("watches", flush=True)
exec(sys.argv[3 + rank])
""",
]
WAIT = "time.sleep(600)"


def watchers(folder: Path, *acts: str, on_host: int | None = None) -> list[str]:
    """The command of ranks with these lines of Python, so many of them on a host."""
    return [*WATCHERS, str(folder), str(on_host or len(acts)), *acts]


def lines(finished: Finished) -> list[str]:
    return [line for line in finished.stderr.splitlines() if line.startswith("gptfast: error: ")]


def all_watch(started: Ranks) -> None:
    for rank in range(len(started.processes)):
        started.until_said(rank, "watches")
    time.sleep(0.3)  # rank 0 has heard hello


def run_watchers(
    folder: Path, *acts: str, on_host: int | None = None, env: dict[str, str] | None = None
) -> list[Finished]:
    """What ranks say and do, for which `go()` is over when they all watch."""
    command = watchers(folder, *acts, on_host=on_host)
    with ranks(len(acts), command, env=env) as started:
        all_watch(started)
        (folder / "go").touch()
        return started.until_ended(30)


def test_killed(tmp_path: Path) -> None:
    """The connection of a process that is gone ends, whatever the patience."""
    with ranks(3, watchers(tmp_path, f"print('half'); {WAIT}", WAIT, WAIT)) as started:
        all_watch(started)
        pid = started.processes[1].pid
        started.send(signal.SIGKILL, 1)
        first, killed, third = started.until_ended(30)
    assert (first.returncode, killed.returncode, third.returncode) == (1, -9, 1)
    assert first.stdout == "watches\nhalf\n", "what it has printed is not lost"
    [line] = lines(first)
    assert "rank 1 of 3 (host " in line and f", process {pid}) has ended: killed, or" in line
    assert not third.stderr, "one line on a host"


def test_first_rank_killed(tmp_path: Path) -> None:
    """Where nobody can decide who speaks: the first rank left on each of two hosts."""
    with ranks(4, watchers(tmp_path, *[WAIT] * 4, on_host=2)) as started:
        all_watch(started)
        started.send(signal.SIGKILL, 0)
        said = started.until_ended(30)
    assert [each.returncode for each in said] == [-9, 1, 1, 1]
    assert [len(lines(each)) for each in said] == [0, 1, 1, 0]
    assert "rank 0 of 4 (host" in said[1].stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_stands_still(tmp_path: Path, rank: int) -> None:
    with ranks(2, watchers(tmp_path, WAIT, WAIT), env=SOON) as started:
        all_watch(started)
        started.send(signal.SIGSTOP, rank)
        other = started.processes[1 - rank]
        started.until(lambda: other.poll() is not None, 30)
        said = started.said(1 - rank)
    assert said.returncode == 1
    [line] = lines(said)
    assert f"rank {rank} of 2" in line and "not heard of for 2 s" in line


def test_reason_is_told(tmp_path: Path) -> None:
    """A rank that fails says why; on its own host the first other rank repeats it."""
    fails = "go(); watch.failed(MemoryError('no room\\nfor 5 GB')); sys.exit(3)"
    said = run_watchers(tmp_path, WAIT, fails, WAIT, WAIT, on_host=2)
    assert [each.returncode for each in said] == [1, 3, 1, 1]
    assert [len(lines(each)) for each in said] == [1, 0, 1, 0]
    for each in (said[0], said[2]):
        assert each.stderr.endswith(") has ended: MemoryError: no room for 5 GB\n")


def test_first_rank_tells_its_reason(tmp_path: Path) -> None:
    fails = "go(); watch.failed(MemoryError()); sys.exit(3)"
    said = run_watchers(tmp_path, fails, WAIT, WAIT, WAIT, on_host=2)
    assert [each.returncode for each in said] == [3, 1, 1, 1]
    assert [len(lines(each)) for each in said] == [0, 0, 1, 0], "on its host it speaks itself"
    assert "rank 0 of 4" in said[2].stderr and said[2].stderr.endswith("ended: MemoryError\n")


def test_good_end(tmp_path: Path) -> None:
    """After longer than the patience; the others may end later."""
    first = "time.sleep(2.6); watch.stop(); print('left')"
    second = "time.sleep(3.1); watch.stop(); print('left')"
    said = run_watchers(tmp_path, first, first, second, env=SOON)
    assert [each.returncode for each in said] == [0, 0, 0]
    assert all(each.stdout == "watches\nleft\n" and not each.stderr for each in said)


def test_gone_in_good_order_but_awaited(tmp_path: Path) -> None:
    """Nobody waits for ever for a rank that says it has done all."""
    said = run_watchers(tmp_path, WAIT, "watch.stop()", env=SOON)
    assert [each.returncode for each in said] == [1, 0]
    assert "rank 1 of 2" in said[0].stderr and "not heard of" in said[0].stderr


def test_torchrun_itself_is_killed(tmp_path: Path) -> None:
    """Its ranks are in sessions of their own, and nothing else would end them."""
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    command = ["-c", start, *watchers(tmp_path, WAIT, WAIT)]
    with ranks(2, command, env={**SOON, "TORCHELASTIC_RUN_ID": "none"}) as started:
        all_watch(started)
        started.send(signal.SIGKILL, 0, 1)
        started.until(lambda: not marked(started.mark), 30)
        said = started.all_said()
    assert [len(lines(each)) for each in said] == [1, 0]
    # Whichever noticed first: rank 0 says it for both.
    assert "of 2 (host" in said[0].stderr and "torchrun, which had" in said[0].stderr


def test_patience_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTFAST_PATIENCE", "long")
    with pytest.raises(ValueError, match="GPTFAST_PATIENCE is 'long'; a number of seconds"):
        Watch(HashStore(), 0, 2, 0, 2)


def test_strangers_are_no_ranks(tmp_path: Path) -> None:
    """Who connects and does not know the secret can end nothing."""
    strange = (
        "import socket; port = int(store.get('gptfast watch').split()[0]);"
        "at = socket.create_connection(('127.0.0.1', port));"
        """at.sendall(b'["hello", "?", 1, 0, "x"]\\n["failed", "me"]\\n'); assert not at.recv(9);"""
        "print('shut out'); go(); watch.stop()"
    ).replace("store.", "Store().")
    said = run_watchers(tmp_path, "go(); watch.stop()", strange)
    assert [each.returncode for each in said] == [0, 0], said
    assert "shut out" in said[1].stdout


# -- the command --


def computes(started: Ranks) -> None:
    """Waits until some tokens are there."""
    started.until(lambda: len(started.said(0).stdout) > 50)


@pytest.fixture(scope="module")
def story() -> str:
    """What a process alone prints first."""
    params = SamplingParams(max_new_tokens=8, temperature=0)
    [output] = LLM("storyteller").generate(PROMPT, params)
    return f"{PROMPT}{output.text}"


def test_killed_while_it_waits() -> None:
    """Ranks that wait for the user of a chat miss the one that is gone."""
    with ranks(2, CHAT, stdin=subprocess.PIPE) as started:
        started.until_said(0, "Loaded")
        started.send(signal.SIGKILL, 1)
        first, _ = started.until_ended(60)
    assert first.returncode == 1
    assert len(lines(first)) == 1 and "rank 1 of 2 (host" in first.stderr
    assert "Traceback" not in first.stderr


@pytest.mark.parametrize("connections", ["shared memory", "gloo"])
def test_killed_while_it_computes(connections: str) -> None:
    """gloo's own error is no traceback; in shared memory nothing would ever be said."""
    env = {"GPTFAST_NO_SHARED_MEMORY": "1"} if connections == "gloo" else None
    with ranks(2, [*GENERATE, *LONG], env=env) as started:
        computes(started)
        started.send(signal.SIGKILL, 1)
        first, _ = started.until_ended(60)
    assert first.returncode == 1
    assert len(lines(first)) == 1 and "rank 1 of 2 (host" in first.stderr
    assert "Traceback" not in first.stderr
    assert first.stdout.startswith("Once upon a time"), "what it had is printed"


def test_first_rank_killed_while_it_computes() -> None:
    with ranks(2, [*GENERATE, *LONG]) as started:
        computes(started)
        started.send(signal.SIGKILL, 0)
        _, second = started.until_ended(60)
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert "rank 0 of 2 (host" in second.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_raises_in_the_middle(rank: int) -> None:
    """An error that one rank alone has is said by the others; each ends."""
    code = f"""
import os, sys
from gptfast.cached import CachedModel
from gptfast.commands import main

def step(*_):
    raise RuntimeError("the bearings are\\ntoo hot")

if os.environ["RANK"] == "{rank}":
    CachedModel._step = step
sys.exit(main(sys.argv[1:]))
"""
    said = run_ranks(2, ["-c", code, *GENERATE[2:], *SHORT])
    assert said[0].returncode == said[1].returncode == 1
    assert "too hot" in said[rank].stderr.splitlines()[-1]
    if rank == 0:
        assert said[1].stderr == "", "rank 0 has said it"
    else:
        assert len(lines(said[0])) == 1
        assert "rank 1 of 2 (host" in said[0].stderr
        assert said[0].stderr.endswith("has ended: RuntimeError: the bearings are too hot\n")


def test_a_program_that_goes_on_after_an_error() -> None:
    """The others have ended with it: what it asks next fails, and does not wait for them."""
    code = """
from gptfast import LLM
from gptfast.cached import CachedModel

llm, step = LLM("storyteller"), CachedModel._step
CachedModel._step = lambda *_: 1 / 0
for _ in range(2):
    try:
        llm.generate([5, 6, 7])
    except (ZeroDivisionError, RuntimeError) as error:
        print(type(error).__name__, error)
    CachedModel._step = step
"""
    first, second = run_ranks(2, ["-c", code])
    assert first.stdout == (
        "ZeroDivisionError division by zero\nRuntimeError another rank has ended\n"
    )
    assert (first.returncode, second.returncode) == (0, 1)


def test_agreed_error() -> None:
    """What one rank alone cannot do while all load is a mistake like others: all end in order."""
    code = """
import os, sys
from gptfast import commands, joint

def load(*_):
    raise MemoryError("no room for the weights")

if os.environ["RANK"] == "1":
    joint.load = load
sys.exit(commands.main(sys.argv[1:]))
"""
    first, second = run_ranks(2, ["-c", code, *GENERATE[2:], *SHORT])
    assert (first.returncode, second.returncode) == (2, 0), first.stderr
    assert first.stderr == "gptfast: error: rank 1 of 2: no room for the weights\n"
    assert first.stdout == second.stdout == second.stderr == ""


def test_interrupted() -> None:
    """Ctrl-C, which every process of a terminal gets: rank 0 says what it has."""
    with ranks(2, [*GENERATE, *LONG]) as started:
        computes(started)
        started.send(signal.SIGINT, 0, 1)
        first, second = started.until_ended(60)
    assert (first.returncode, second.returncode) == (130, 0), first.stderr
    assert "Average tokens/sec" in first.stdout
    assert not lines(first) and second.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["--model", "/no/such/model"], ["--frobnicate"]], ids=["model", "option"]
)
def test_mistakes(arguments: list[str]) -> None:
    """A mistake of the user is one line, and the others end in good order."""
    first, second = run_ranks(2, ["-m", "gptfast", "generate", *arguments])
    assert (first.returncode, second.returncode) == (2, 0)
    assert len(first.stderr.splitlines()) == 1 and arguments[-1] in first.stderr
    assert first.stdout == second.stdout == second.stderr == ""


def test_not_every_command_is_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="convert runs in one process; start it without torchrun"):
        commands._dispatch(["convert", "storyteller", "copy"])


@pytest.mark.parametrize("rank", [0, 1])
def test_help(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed: list[Group] = []
    monkeypatch.setattr(commands, "num_ranks", lambda: 2)
    monkeypatch.setattr(parallel, "start", lambda: Group(rank, 2))
    monkeypatch.setattr(follower, "follow", followed.append)
    assert commands.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: gptfast COMMAND") == 1 - rank
    assert len(followed) == rank


# -- torchrun --


def test_torchrun(story: str) -> None:
    """Rank 0 alone prints."""
    [said] = run_torchrun(2, [*GENERATE, *SHORT])
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"{story}\n") and said.stdout.count(PROMPT) == 1
    assert said.stderr.count("2 ranks on one host") == 1


def test_torchrun_of_a_rank_that_is_killed() -> None:
    with torchrun(2, [*GENERATE, *LONG]) as started:
        computes(started)
        pids = {place(pid, "RANK"): pid for pid in marked(started.mark)}
        os.kill(pids["1"], signal.SIGKILL)
        [said] = started.until_ended(60)
    assert said.returncode == 1
    assert f"rank 1 of 2 (host {os.uname().nodename}, process {pids['1']})" in said.stderr


def test_two_hosts(story: str) -> None:
    """Two torchruns of a rank each: local and global places differ, and no memory is common."""
    first, second = run_torchrun(1, [*GENERATE, *SHORT], nodes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith(f"{story}\n")
    assert "2 ranks on 2 hosts" in first.stderr and second.stdout == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1"])
def test_interface_to_nowhere(host: str) -> None:
    assert interface_to(host) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_interface_to_others() -> None:
    """An interface that has an address leads to its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has no network")
    names = [name for _, name in socket.if_nameindex()]
    assert interface_to("192.0.2.1") in {*names} - {"lo"}


def place(pid: int, name: str) -> str:
    """A variable of a process's environment."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries).get(name, "")


# -- tests.ranks itself --


def test_nothing_is_left() -> None:
    """Of processes that hang, with children in sessions of their own, in a test that fails."""
    code = (
        "import subprocess, sys, time;"
        "subprocess.Popen(['sleep', '600'], start_new_session=True); print('hangs', flush=True);"
        "time.sleep(600)"
    )
    with pytest.raises(ZeroDivisionError), ranks(2, ["-c", code]) as started:
        started.until_said(0, "hangs")
        started.until_said(1, "hangs")
        assert len(marked(started.mark)) == 4
        raise ZeroDivisionError
    assert not marked(started.mark)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)not within 1 s.*hangs.*hangs"):
        run_ranks(2, ["-c", code], timeout=1)
