"""Sums over the GPUs of one host, of a decode step's size: a kernel that reads every rank's part
where it lies (symmetric memory), beside NCCL, which passes parts on. Which is faster up to which
size is measured once, for a model's width.

`device_all_reduce` is one op for both and opaque to the compiler: it looks at sizes when it runs,
so that one compiled graph serves a token and a prompt.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gptfast.device import format_bytes

Result = TypeVar("Result")
AllReduce = Callable[[Tensor], Tensor]

# Tokens of the tensors that are measured. A fused step has at most 16.
ROWS = (1, 2, 4, 8, 16)
CALLS = 50  # in a graph that is measured
ROUNDS = 7
# What torch's kernel adds up.
DTYPES = (torch.bfloat16, torch.float32)

torch.library.define("gptfast::device_all_reduce", "(Tensor x, str group_name) -> Tensor")


class Ranks(Protocol):
    """What is asked of a Group of parallel.py."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    def agree(self, function: Callable[[], Result], /) -> Result: ...
    def broadcast(self, x: Tensor, /) -> Tensor: ...


class SymmetricReduce:
    """x -> the sum of all ranks' x, a new tensor. Parts are added in the order of ranks (bfloat16
    is rounded each time): the same bits on all ranks, and for a token alone and among others, which
    NCCL does not promise.

    `buffer` [bytes] is symmetric memory of the group. After `start` a call does nothing on the
    host but launch, so that CUDA graphs hold it.
    """

    def __init__(self, group_name: str, buffer: Tensor) -> None:
        self._group_name, self._buffer = group_name, buffer
        self.max_bytes = buffer.nbytes

    @classmethod
    def start(cls, group_name: str, device: torch.device, max_bytes: int) -> "SymmetricReduce":
        """For x of up to `max_bytes`. All ranks call it. ValueError where the system refuses."""
        try:
            from torch.distributed import _symmetric_memory  # it has no public name yet

            buffer = _symmetric_memory.empty(max_bytes, dtype=torch.uint8, device=device)
            _symmetric_memory.rendezvous(buffer, group_name)  # type: ignore[arg-type]
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ValueError(f"torch says: {str(error).splitlines()[0]}") from None
        return cls(group_name, buffer)

    def takes(self, x: Tensor) -> bool:
        """The same on all ranks, for x of one shape. The kernel needs whole words of 4 bytes."""
        return x.dtype in DTYPES and 0 < x.nbytes <= self.max_bytes and x.nbytes % 4 == 0

    def __call__(self, x: Tensor) -> Tensor:
        ours = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        # `one_shot_all_reduce_copy` does both in one kernel, but the first warp of a block tells
        # the other ranks to read while later warps may still write (torch 2.11 and after).
        ours.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(ours, "sum", self._group_name)


def why_not(device: torch.device, dtype: torch.dtype, size: int, local_size: int) -> str | None:
    """Why ranks, each with the device of its number on its host, have no such sums of `dtype`; None
    where they should.
    """
    if device.type != "cuda":
        return f"there is none for {device.type}"
    if dtype not in DTYPES:
        return f"its kernel does not add {str(dtype).removeprefix('torch.')}"
    if size > local_size:
        return "ranks are on several hosts"
    if torch.cuda.device_count() < local_size:
        return "ranks share a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability} is below 8.0"
    for other in range(local_size):
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} cannot read the memory of GPU {other}"
    return None


def choose_all_reduce(group: Ranks, dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Measures both ways for 1 to 16 tokens of a model of width `dim` in `dtype`, and lets
    `device_all_reduce` take the faster from now on, on all ranks the same. All call it, before
    anything is captured. Returns what was chosen, for people.
    """
    xs = [torch.randn(rows, dim, device=device).to(dtype) for rows in ROWS]
    plain_all_reduce(xs[0], group.name)  # connects the ranks, whatever is chosen

    def check() -> None:
        if (reason := why_not(device, dtype, group.size, group.local_size)) is not None:
            raise ValueError(reason)

    try:
        group.agree(check)  # before any rank waits for the others in `start`
        one_shot = group.agree(lambda: SymmetricReduce.start(group.name, device, xs[-1].nbytes))
    except ValueError as error:
        return f"all-reduce: NCCL (no symmetric memory: {error})"
    return choose_by(graph_seconds, group, one_shot, xs)


def choose_by(
    seconds: Callable[[Sequence[AllReduce], Tensor], list[float]],
    group: Ranks,
    one_shot: SymmetricReduce,
    xs: Sequence[Tensor],
) -> str:
    """As `choose_all_reduce`, for xs from small to large, where `seconds(functions, x)` is what a
    call of each takes.
    """
    functions = (one_shot, lambda x: plain_all_reduce(x, group.name))
    times = [seconds(functions, x) for x in xs]
    lost = (i for i, (ours, theirs) in enumerate(times) if ours >= theirs)
    num_won = next(lost, len(xs))
    limit = xs[num_won - 1].nbytes if num_won else 0
    # Ranks measure differently, and have to do the same.
    one_shot.max_bytes = int(group.broadcast(torch.tensor(limit)))
    ours, theirs = (f"{1e6 * time:.1f}" for time in times[0])
    size, most = format_bytes(xs[0].nbytes), format_bytes(one_shot.max_bytes)
    if one_shot.max_bytes == 0:
        return f"all-reduce: NCCL ({theirs} us beside {ours} of symmetric memory at {size})"
    _one_shot.setdefault(group.name, []).append(one_shot)
    return (
        f"all-reduce: one-shot symmetric memory up to {most} "
        f"({ours} us beside NCCL's {theirs} at {size}), NCCL above"
    )


def graph_seconds(functions: Sequence[AllReduce], x: Tensor) -> list[float]:
    """Median seconds of a call of each, in turns, from CUDA graphs as those of a decode step."""
    with torch.cuda.device_of(x):
        graphs = [_captured(function, x) for function in functions]
        found: list[list[float]] = [[] for _ in functions]
        for _ in range(ROUNDS):
            for graph, times in zip(graphs, found, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graph.replay()  # until all ranks are here
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3 / CALLS)
        for graph in graphs:
            graph.reset()  # NCCL does not end before the graphs that hold it do
    return [median(times) for times in found]


def _captured(function: AllReduce, x: Tensor) -> torch.cuda.CUDAGraph:
    function(x)  # connects the ranks, which a capture does not allow
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
    # In threads of its own NCCL may do what is forbidden in this one meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            function(x)
    return graph


# -- the op --

# Of this process, by the name of a group, as torch keeps the groups themselves: an op takes no
# objects. They stay, because CUDA graphs have their addresses.
_one_shot: dict[str, list[SymmetricReduce]] = {}


def device_all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of all ranks' x on their GPUs, by what `choose_all_reduce` has found faster; by NCCL
    where it was not asked.
    """
    return torch.ops.gptfast.device_all_reduce.default(x, group_name)


def plain_all_reduce(x: Tensor, group_name: str) -> Tensor:
    """What `device_all_reduce` means."""
    total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


def _device_all_reduce(x: Tensor, group_name: str) -> Tensor:
    for one_shot in _one_shot.get(group_name, ()):
        if one_shot.takes(x):
            return one_shot(x)
    return plain_all_reduce(x, group_name)


torch.library.impl("gptfast::device_all_reduce", "default", _device_all_reduce)


@torch.library.register_fake("gptfast::device_all_reduce")
def _(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(x.shape)
