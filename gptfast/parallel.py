"""Tensor parallel: the group of processes that compute one model together, and what they say to
each other. Knows tensors and processes; knows no model.

torchrun starts the processes (ranks) and tells each its place. Each holds a share of the weights
and adds its part to sums that all of them wait for (Megatron-LM, 1909.08053). Rank 0 alone has the
requests: it decides everything and tells the others what to compute (together.py, follower.py).
"""

import atexit
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum, auto
from itertools import pairwise
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.interface import interface_to
from gptfast.kernels.shared_memory import SharedMemory
from gptfast.kernels.symmetric import device_all_reduce
from gptfast.launch import num_ranks, place
from gptfast.watch import Watch

Result = TypeVar("Result")

HEADER = 8  # numbers of a message
LONGEST_REASON = 2048  # bytes of an error that ranks tell each other
# Errors that all ranks raise where one does, and go on; others end them.
AGREED = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
# Rank 0 may wait for its user, and the others for it, as long as it takes.
PATIENCE = timedelta(days=365)


class Op(IntEnum):
    """What rank 0 tells the others to do."""

    STOP = auto()
    CALL = auto()  # a function by its name (together.py)
    FREE = auto()  # an object of one
    STEP = auto()  # tokens through a CachedModel, with logits
    READ = auto()  # tokens through a CachedModel, hidden states only
    LOGITS = auto()
    CAPTURE = auto()  # what follows, until CAPTURED, becomes a CUDA graph
    CAPTURED = auto()
    REPLAY = auto()


@dataclass(frozen=True)
class Group:
    """`size` ranks, of which this process is `rank`, and `local_rank` of the `local_size` on its
    host. Where there is one, everything below does nothing.

    `by_expert`: in a mixture of experts each rank has whole experts, not a share of each. `name` is
    what torch.distributed calls it; `shared`, where all ranks are on one host, the number of their
    common memory, else -1. `staged`: ranks may share a GPU, and what GPUs say to each other goes
    through the host, where no CUDA graph follows.
    """

    rank: int = 0
    size: int = 1
    by_expert: bool = False
    local_rank: int = 0
    local_size: int = 1
    name: str = ""
    shared: int = -1
    staged: bool = False

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides, for others."""
        return self.rank == 0 and self.size > 1

    def text(self, device: torch.device) -> str:
        """For people: how many ranks with such devices, and what they add up through."""
        hosts = self.size // self.local_size
        where = "on one host" if hosts == 1 else f"on {hosts} hosts"
        through = "shared memory" if self.shared >= 0 else "gloo"
        if device.type == "cuda" and not self.staged:
            through = "NCCL"
        return f"{self.size} ranks {where}, sums through {through}"

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's: consecutive, as many as others' or one more."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[range]:
        """As `share`, of every rank."""
        each, more = divmod(count, self.size)
        starts = [rank * each + min(rank, more) for rank in range(self.size + 1)]
        return [range(*pair) for pair in pairwise(starts)]

    def device(self, device: torch.device) -> torch.device:
        """This rank's own: of CUDA devices one for each rank of the host."""
        if self.is_alone or device.type != "cuda":
            return device
        if self.staged:
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        if torch.cuda.device_count() < self.local_size:
            raise ValueError(
                f"{self.local_size} ranks were started on {platform.node()}, which has "
                f"{torch.cuda.device_count()} CUDA devices; start no more ranks than devices, or "
                "use --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    # -- collectives: functional, so that compiled graphs hold them --

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, the same bits on all of them."""
        if self.is_alone:
            return x
        if x.device.type != "cpu":
            if self.staged:
                return self.all_reduce(x.cpu()).to(x.device)
            return device_all_reduce(x, self.name)
        if self.shared >= 0:
            return torch.ops.gptfast.shared_all_reduce(x, self.shared)
        # gloo rounds every partial sum; on a CPU exactness is cheap.
        total = torch.ops._c10d_functional.all_reduce(x.float().contiguous(), "sum", self.name)
        return torch.ops._c10d_functional.wait_tensor(total).to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x [..] (of one shape) -> [size, ..]."""
        if self.is_alone:
            return x.unsqueeze(0)
        if self.staged and x.device.type != "cpu":
            return self.all_gather(x.cpu()).to(x.device)
        if self.shared >= 0 and x.device.type == "cpu":
            return torch.ops.gptfast.shared_all_gather(x, self.shared)
        flat = torch.ops._c10d_functional.all_gather_into_tensor(
            x.contiguous().flatten(), self.size, self.name
        )
        return torch.ops._c10d_functional.wait_tensor(flat).view(self.size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, of one shape and dtype on all ranks."""
        if self.is_alone:
            return x
        if self.shared >= 0 and x.device.type == "cpu":
            return torch.ops.gptfast.shared_broadcast(x, self.shared)
        if self.staged and x.device.type != "cpu":
            return self.broadcast(x.cpu()).to(x.device)
        if x.device.type == "cpu":  # by the connections that are patient
            dist.broadcast(x, 0, group=_host_group)
            return x
        sent = torch.ops._c10d_functional.broadcast(x.contiguous(), 0, self.name)
        return torch.ops._c10d_functional.wait_tensor(sent)

    # -- rank 0's word --

    def send(self, op: Op, *numbers: int) -> None:
        """Tells the other ranks what to do."""
        self.broadcast(torch.tensor([op, *numbers, *[0] * (HEADER - 1 - len(numbers))]))

    def receive(self) -> list[int]:
        """What rank 0 tells to do: an Op and its numbers."""
        return self.broadcast(torch.zeros(HEADER, dtype=torch.int64)).tolist()

    def send_text(self, op: Op, text: str) -> None:
        content = text.encode()
        self.send(op, len(content))
        self.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def receive_text(self, length: int) -> str:
        content = self.broadcast(torch.zeros(length, dtype=torch.uint8))
        return bytes(content.tolist()).decode()

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Of what is in the `with` block, which other ranks do too, Ctrl-C cuts off nothing: they
        would wait for ever. It comes when the block ends, in the thread of the block. An error in
        it ends them all, but for what they have agreed to raise.
        """
        global _agreed, _depth, _was_interrupted
        if not self.leads:
            yield
            return
        _depth += 1
        try:
            yield
        except BaseException as error:
            if error is not _agreed:
                give_up(error)
            _agreed = None
            raise
        finally:
            _depth -= 1
            if _was_interrupted and _depth == 0:
                _was_interrupted = False
                raise KeyboardInterrupt

    # -- together --

    def agree(self, function: Callable[[], Result]) -> Result:
        """What `function` returns. Where it fails on any rank, its error is raised on every one and
        says where it happened.
        """
        global _agreed
        if self.is_alone:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except AGREED as found:
            error = found
        # Of torch's own type others raise what any memory error is.
        kinds = (ValueError, OSError, MemoryError)
        kind = next((i + 1 for i, each in enumerate(kinds) if isinstance(error, each)), 3)
        message = torch.zeros(LONGEST_REASON, dtype=torch.uint8)
        if error is not None:
            content = bytes([kind]) + str(error).encode()
            content = content[:LONGEST_REASON]
            message[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        everyone = self.all_gather(message)
        failed = [rank for rank in range(self.size) if everyone[rank, 0]]
        if not failed:
            return result
        result = None  # type: ignore[assignment]  # an error keeps what its frames hold
        if error is not None and self.rank == failed[0]:
            _agreed = error if self.leads else None
            raise error
        kind, *text = everyone[failed[0]].tolist()
        reason = bytes(text).rstrip(b"\0").decode(errors="replace")
        where = "" if failed[0] == 0 else f"rank {failed[0]} of {self.size}: "
        agreed = kinds[kind - 1](f"{where}{reason}")
        _agreed = agreed if self.leads else None
        raise agreed

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        return int(self.all_gather(torch.tensor(number)).min())


ALONE = Group()

# Of this process: there is one group in it, from its first use to its end.
_group: Group | None = None
_host_group: dist.ProcessGroup | None = None
_memory: SharedMemory | None = None
_watch: Watch | None = None
_agreed: Exception | None = None  # the latest error that all ranks have raised
_depth = 0  # of blocks that are not to be broken off
_was_interrupted = False
_endings: list[Callable[[], None]] = []


def start(size: int | None = None) -> Group:
    """The group that torchrun has started this process in, ALONE where it has not. ValueError where
    it has not `size` ranks.
    """
    global _group
    if size is not None and size != num_ranks():
        raise ValueError(
            f"tensor_parallel_size is {size}, and there are {num_ranks()} processes; start {size} "
            f"with torchrun --standalone --nproc-per-node {size}"
        )
    if num_ranks() == 1:
        return ALONE
    if _group is None:
        try:
            _group = _start()
        except BaseException as error:
            if _watch is not None:
                _watch.failed(error)
            raise
        atexit.register(finish)
        if threading.current_thread() is threading.main_thread():
            if _group.rank > 0:  # they leave it to rank 0
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, _interrupt)
    return _group


def _start() -> Group:
    global _host_group, _memory, _watch
    size, (rank, local_rank, local_size) = num_ranks(), place()
    staged = os.environ.get("GPTFAST_STAGED") == "1"
    has_devices = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    has_devices = has_devices and not staged
    if has_devices:
        torch.cuda.set_device(local_rank)
    if local_size < size and (interface := interface_to(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store, _, _ = next(dist.rendezvous("env://"))
    _watch = Watch(store, rank, size, local_rank, local_size)
    backend = "cpu:gloo,cuda:nccl" if has_devices else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    _host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    group = Group(rank, size, False, local_rank, local_size, name, staged=staged)
    _memory = _common_memory(group)
    return group if _memory is None else replace(group, shared=_memory.handle)


def _common_memory(group: Group) -> SharedMemory | None:
    """Memory of all ranks; None where they are on several hosts, or one of them has no kernels or
    wants none.
    """
    if group.local_size < group.size:
        return None
    wanted = os.environ.get("GPTFAST_NO_SHARED_MEMORY") != "1"
    memory, name = None, torch.zeros(64, dtype=torch.uint8)
    if group.rank == 0 and wanted:
        with suppress(ValueError):
            memory = SharedMemory.create(group.size)
            name[: len(memory.name)] = torch.tensor(list(memory.name.encode()), dtype=torch.uint8)
    text = bytes(group.broadcast(name).tolist()).rstrip(b"\0").decode()
    if text and group.rank > 0 and wanted:
        with suppress(ValueError):
            memory = SharedMemory.attach(text, group.rank, group.size)
    return memory if group.least(memory is not None) else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _was_interrupted
    if _depth == 0 or _was_interrupted:  # a second time: now
        raise KeyboardInterrupt
    _was_interrupted = True


def before_end(function: Callable[[], None]) -> None:
    """Has it called before a group ends."""
    _endings.append(function)


def finish() -> None:
    """The end of this rank in good order; rank 0 lets the others go. Nothing after `give_up`."""
    global _group, _watch
    if _group is None or _watch is None:
        return
    if _group.leads:
        with suppress(RuntimeError):  # they have gone
            _group.send(Op.STOP)
    try:
        for end in _endings:
            end()
    finally:
        _watch.stop()
        _group = _watch = None
        dist.destroy_process_group()


def give_up(error: BaseException) -> None:
    """Tells all ranks that this one is about to end with `error`, and why. Where it says no more
    than that another rank is gone, all end here, with what that one has said.
    """
    global _watch
    if _watch is None:
        return
    if isinstance(error, RuntimeError) and _is_of_connections(error):
        _watch.wait()
    _watch.failed(error)
    _watch = None
    if _memory is not None:
        _memory.abort()  # who goes on all the same would wait for ever


def _is_of_connections(error: RuntimeError) -> bool:
    """NCCL's errors have a type; gloo's name a place in its source, shared memory's are ours."""
    words = ("gloo/", "another rank has ended")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
