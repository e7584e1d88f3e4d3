"""What ranks say to each other through shared memory: the same as plain PyTorch, in processes and
threads, and no wait that cannot be ended.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.kernels import shared_memory
from gptfast.kernels.shared_memory import (
    FOLDER,
    SharedMemory,
    shared_all_gather,
    shared_all_reduce,
    shared_broadcast,
    why_not,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no shared memory: {why_not()}")

SECONDS = 60  # until a wait is taken for one without end


def memories_of(size: int, piece_bytes: int = 4096) -> list[SharedMemory]:
    """Those of all ranks, in this process."""
    first = SharedMemory.create(size, piece_bytes)
    others = (SharedMemory.attach(first.name, rank, size, piece_bytes) for rank in range(1, size))
    return [first, *others]


def together(memories: Sequence[SharedMemory], run: Callable[[int], Any]) -> list[Any]:
    """What `run(rank)` returns, for each rank in a thread of its own. When one fails, or lasts for
    too long, the others' waits are ended; no test waits for a thread that waits on.
    """
    results: dict[int, Any] = {}
    errors: dict[int, Exception] = {}

    def alone(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = run(rank)
        except Exception as error:
            errors[rank] = error
            memories[rank].abort()

    threads = [Thread(target=alone, args=(rank,), daemon=True) for rank in range(len(memories))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        if thread.is_alive():
            memories[0].abort()
    for error in sorted(errors.values(), key=lambda error: "another rank" in str(error)):
        raise error
    assert len(results) == len(memories), "a rank waits without end"
    return [results[rank] for rank in range(len(memories))]


def plain_sum(xs: list[Tensor]) -> Tensor:
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_ops_mean(size: int, dtype: torch.dtype) -> None:
    """In tensors of any shape, longer than a piece or empty. (A sum is rounded once, in the end:
    numbers of different sizes show it.)
    """
    memories = memories_of(size)
    shapes = [(), (0,), (1, 33), (3, 2048), (40_001,)]
    torch.manual_seed(0)
    given = [
        [torch.randn(shape).mul(3**rank).to(dtype) for shape in shapes] for rank in range(size)
    ]
    for of_rank in given:
        of_rank.append(torch.randn(70, 50).to(dtype).t()[1:])  # not contiguous

    def run(rank: int) -> list[tuple[Tensor, ...]]:
        handle = memories[rank].handle
        ops = (shared_all_reduce, shared_all_gather, shared_broadcast)
        return [tuple(op(x, handle) for op in ops) for x in given[rank]]

    for found in together(memories, run):
        for xs, (total, gathered, first) in zip(zip(*given, strict=True), found, strict=True):
            assert torch.equal(total, plain_sum(list(xs)))
            assert torch.equal(gathered, torch.stack(xs))
            assert torch.equal(first, xs[0])
            assert first.numel() == 0 or first.data_ptr() != xs[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64], ids=str)
def test_bytes_of_any_type_are_moved(dtype: torch.dtype) -> None:
    memories = memories_of(2)
    xs = [torch.randint(0, 2, (3, 1000)).to(dtype) for _ in memories]
    found = together(memories, lambda rank: shared_all_gather(xs[rank], memories[rank].handle))
    assert all(torch.equal(each, torch.stack(xs)) for each in found)
    found = together(memories, lambda rank: shared_broadcast(xs[rank], memories[rank].handle))
    assert all(torch.equal(each, xs[0]) for each in found)
    with pytest.raises(ValueError, match="are not summed"):
        shared_all_reduce(xs[0], memories[0].handle)


@pytest.mark.parametrize("size", [2, 3])
def test_nobody_overtakes(size: int) -> None:
    """Ranks of different speed, which hurry and dawdle in turn: none writes over what another still
    reads, even where the first to speak waits for no answer.
    """
    memories = memories_of(size)

    def run(rank: int) -> bool:
        order, own, right = random.Random(0), random.Random(rank), True
        for i in range(600):
            if own.random() < 0.05:
                time.sleep(own.random() / 300)
            count, handle = order.choice([1, 500, 1024, 3000]), memories[rank].handle
            x = torch.full((count,), float(i * size + rank))
            said = [float(i * size + other) for other in range(size)]
            match order.choice("sum gather broadcast broadcast".split()):
                case "sum":
                    right &= bool((shared_all_reduce(x, handle) == sum(said)).all())
                case "gather":
                    found = shared_all_gather(x, handle)
                    right &= bool((found == torch.tensor(said).unsqueeze(1)).all())
                case "broadcast":
                    right &= bool((shared_broadcast(x, handle) == said[0]).all())
        return right

    assert all(together(memories, run))


# -- processes --

OTHER = """
import sys, torch
from gptfast.kernels.shared_memory import *
memory = SharedMemory.attach(sys.argv[1], 1, 2)
print("here", flush=True)
for i in range(200):
    x = shared_all_reduce(torch.full((1, 2048), float(i)), memory.handle)
    assert (x == 3 * i).all()
x = shared_broadcast(torch.empty(1 << 20), memory.handle)
shared_all_gather(x.view(torch.int32).sum(), memory.handle)
shared_broadcast(x, memory.handle)  # which never comes
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, None])
def test_two_processes(sent: signal.Signals | None) -> None:
    """They share a file that is gone when both have it. A signal ends a process that waits, and so
    does an abort.
    """
    memory = SharedMemory.create(2)
    path, pipe = FOLDER / memory.name, subprocess.PIPE
    assert path.stat().st_mode & 0o777 == 0o600
    command = [sys.executable, "-c", OTHER, memory.name]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as other:
        try:
            assert other.stdout is not None and other.stderr is not None
            assert other.stdout.readline() == "here\n", other.stderr.read()
            assert not path.exists()
            for i in range(200):
                x = shared_all_reduce(torch.full((1, 2048), 2.0 * i), memory.handle)
                assert (x == 3 * i).all()
            x = shared_broadcast(torch.randn(1 << 20), memory.handle)
            sums = shared_all_gather(x.view(torch.int32).sum(), memory.handle)
            assert sums[0] == sums[1]  # of their bits
            if sent is None:
                memory.abort()
            else:
                other.send_signal(sent)
            _, error = other.communicate(timeout=SECONDS)
            assert other.returncode == (1 if sent is None else -sent)
            assert sent is not None or "another rank has ended" in error
        finally:
            memory.abort()
            other.kill()


def test_a_file_that_nobody_came_for_goes_with_its_rank() -> None:
    memory = SharedMemory.create(2)
    path = FOLDER / memory.name
    assert path.exists()
    del memory
    assert not path.exists()


# -- waits --


def test_a_long_wait_costs_next_to_nothing() -> None:
    memories = memories_of(2)

    def run(rank: int) -> float:
        if rank == 0:
            time.sleep(0.6)
        shared_broadcast(torch.zeros(1), memories[rank].handle)
        used = resource.getrusage(resource.RUSAGE_THREAD)
        return used.ru_utime + used.ru_stime

    assert together(memories, run)[1] < 0.05


def test_an_abort_ends_every_wait() -> None:
    memories = memories_of(3)

    def run(rank: int) -> str:
        if rank == 2:
            time.sleep(0.05)
            memories[rank].abort()
        with pytest.raises(RuntimeError, match="another rank has ended"):
            shared_all_reduce(torch.zeros(9000), memories[rank].handle)
        with pytest.raises(RuntimeError, match="another rank has ended"):
            shared_broadcast(torch.zeros(1), memories[rank].handle)
        return "raised"

    assert together(memories, run) == ["raised"] * 3


@pytest.mark.parametrize("what", ["kind", "size"])
def test_ranks_that_do_not_agree_are_told(what: str) -> None:
    memories = memories_of(2)

    def run(rank: int) -> str:
        op = shared_all_gather if what == "kind" and rank else shared_all_reduce
        x = torch.zeros(8 if what == "size" and rank else 9)
        with pytest.raises(RuntimeError, match="do not agree"):
            op(x, memories[rank].handle)
        return "raised"

    assert together(memories, run) == ["raised"] * 2


# -- compiled --


def test_compiled_graphs_hold_the_ops() -> None:
    """One rank compiled, the other not."""
    memories = memories_of(2)

    def compute(x: Tensor, handle: int) -> Tensor:
        y = torch.ops.gptfast.shared_all_reduce(x * 2, handle)
        y = torch.ops.gptfast.shared_all_gather(y + 1, handle).sum(0)
        return torch.ops.gptfast.shared_broadcast(y, handle)

    compiled = torch.compile(compute, fullgraph=True)
    xs = [torch.randn(3, 700), torch.randn(3, 700)]
    functions = (compiled, compute)
    expected = 2 * ((xs[0] * 2 + xs[1] * 2) + 1)
    for _ in range(2):
        found = together(memories, lambda rank: functions[rank](xs[rank], memories[rank].handle))
        for each in found:
            torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("name", ["shared_all_reduce", "shared_all_gather", "shared_broadcast"])
def test_ops_are_what_they_are_registered_as(name: str) -> None:
    [memory] = memories_of(1)
    op = getattr(torch.ops.gptfast, name).default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (torch.randn(3, 5).t(), memory.handle), test_utils=utils)


# -- bad input --


def test_what_cannot_be_attached_to() -> None:
    memory = SharedMemory.create(3, 4096)
    with pytest.raises(ValueError, match="another host, or in another container"):
        SharedMemory.attach(f"{memory.name}0", 1, 3, 4096)
    with pytest.raises(ValueError, match=r"2 ranks need \d+: was it .* another number of ranks"):
        SharedMemory.attach(memory.name, 1, 2, 4096)
    with pytest.raises(ValueError, match="rank 0 has mapped"):
        SharedMemory.attach(memory.name, 0, 3, 4096)
    with pytest.raises(ValueError, match="rank 3 of 3 ranks"):
        SharedMemory.attach(memory.name, 3, 3, 4096)
    path = FOLDER / memory.name
    path.chmod(0o666)
    with pytest.raises(ValueError, match="not of this user alone"):
        SharedMemory.attach(memory.name, 1, 3, 4096)
    path.chmod(0o600)
    link = FOLDER / f"{memory.name}-link"
    link.symlink_to(path)
    try:
        with pytest.raises(ValueError, match="does not find"):
            SharedMemory.attach(link.name, 1, 3, 4096)
    finally:
        link.unlink()
    with pytest.raises(ValueError, match="no shared memory 999999"):
        shared_broadcast(torch.zeros(1), 999_999)


def test_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"has no \d+ bytes for 2 ranks \(No space"):
        SharedMemory.create(2)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    assert "none is not there" in (why_not() or "")
    with pytest.raises(ValueError, match="is not there"):
        SharedMemory.create(2)
