"""What a choice between two ways to sum over GPUs rests on, and what the op does with it, on a CPU:
a stand-in has the place of the kernel, the group is this process. tests/test_gpu.py has the kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gptfast.kernels import symmetric
from gptfast.kernels.symmetric import (
    ROWS,
    SymmetricReduce,
    choose_all_reduce,
    choose_by,
    device_all_reduce,
    plain_all_reduce,
    why_not,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
NUM_RANKS = 3  # that the stand-in pretends to add up


@pytest.fixture(scope="module")
def group_name() -> Iterator[str]:
    """A group of this process alone, in which a plain sum is what went in."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the kernel's stand-in was given; it multiplies by the number of ranks."""
    given: list[Tensor] = []

    def one_shot_all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
        assert reduce_op == "sum" and x.is_contiguous()
        given.append(x)
        return NUM_RANKS * x

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("one_shot_all_reduce", one_shot_all_reduce, "CPU")
    monkeypatch.setattr(symmetric, "_one_shot", {})
    yield given
    library._destroy()


@dataclass
class FakeGroup:
    """A rank whose rank 0 has said a number; `error` is what another rank has failed with."""

    name: str = "ranks"
    size: int = NUM_RANKS
    local_size: int = NUM_RANKS
    said: int | None = None
    error: str | None = None

    def agree(self, function: Callable[[], Any]) -> Any:
        if self.error is not None:
            raise ValueError(self.error)
        return function()

    def broadcast(self, x: Tensor) -> Tensor:
        return x if self.said is None else torch.tensor(self.said)


def memory(num_bytes: int = 4096) -> SymmetricReduce:
    return SymmetricReduce("ranks", torch.zeros(num_bytes, dtype=torch.uint8))


# -- the sum --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sum_is_new_and_leaves_its_input(added: list[Tensor], dtype: torch.dtype) -> None:
    reduce = memory()
    first, second = (torch.randn(2, 3, 10).to(dtype).transpose(0, 1) for _ in range(2))
    copies = first.clone(), second.clone()
    found = reduce(first), reduce(second)
    for x, copy, y in zip((first, second), copies, found, strict=True):
        assert torch.equal(x, copy)
        torch.testing.assert_close(y, NUM_RANKS * x, rtol=1e-2, atol=1e-2)
    assert [x.data_ptr() for x in added] == [reduce._buffer.data_ptr()] * 2


def test_what_the_kernel_takes() -> None:
    reduce = memory(64)
    for shape, dtype, takes in (
        ((16,), torch.float32, True),
        ((17,), torch.float32, False),  # more than its memory
        ((32,), torch.bfloat16, True),
        ((31,), torch.bfloat16, False),  # 62 bytes
        ((0,), torch.bfloat16, False),
        ((16,), torch.float16, False),
        ((4,), torch.int64, False),
    ):
        assert reduce.takes(torch.zeros(shape, dtype=dtype)) == takes


def test_where_there_is_no_symmetric_memory_torch_says_why() -> None:
    with pytest.raises(ValueError, match="torch says: "):
        SymmetricReduce.start("ranks", CPU, 64)


# -- the choice --

WIDTH = 8
XS = [torch.zeros(rows, WIDTH) for rows in ROWS]


@pytest.mark.parametrize(
    ("ours", "limit", "text"),
    [
        ([5, 6, 7, 8, 9], 512, "up to 512 B (5.0 us beside NCCL's 10.0 at 32 B), NCCL above"),
        ([5, 6, 7, 12, 9], 128, "up to 128 B (5.0 us beside NCCL's 10.0 at 32 B), NCCL above"),
        ([5, 10, 10, 10, 10], 32, "up to 32 B (5.0 us"),
        ([11, 5, 5, 5, 5], 0, "NCCL (10.0 us beside 11.0 of symmetric memory at 32 B)"),
    ],
)
def test_the_faster_is_taken_as_far_as_it_is_faster(
    added: list[Tensor], group_name: str, ours: list[int], limit: int, text: str
) -> None:
    """And the op does so from then on."""
    times = iter(ours)
    group, one_shot = FakeGroup(group_name), memory()
    said = choose_by(lambda functions, x: [1e-6 * next(times), 1e-6 * 10], group, one_shot, XS)
    assert text in said and said.startswith("all-reduce: ")
    for x in (torch.ones(rows, WIDTH) for rows in ROWS):
        factor = NUM_RANKS if x.nbytes <= limit else 1
        assert torch.equal(device_all_reduce(x, group_name), factor * x)
    assert len(added) == sum(x.nbytes <= limit for x in XS)


def test_both_ways_are_measured_for_1_to_16_tokens(added: list[Tensor], group_name: str) -> None:
    shapes = []

    def seconds(functions: Any, x: Tensor) -> list[float]:
        shapes.append(x.shape)
        one_shot, plain = (function(x + 1) for function in functions)
        assert torch.equal(one_shot, NUM_RANKS * (x + 1)) and torch.equal(plain, x + 1)
        return [1.0, 2.0]

    choose_by(seconds, FakeGroup(group_name), memory(), XS)
    assert shapes == [(rows, WIDTH) for rows in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("said", [0, 64, 512])
def test_all_ranks_do_what_rank_0_has_found(
    added: list[Tensor], group_name: str, said: int
) -> None:
    """Whatever they have measured themselves."""
    for own in (1.0, 3.0):
        group = FakeGroup(group_name, said=said)
        choose_by(lambda functions, x, own=own: [own, 2.0], group, memory(), XS)
        added.clear()
        for x in XS:
            device_all_reduce(x, group_name)
        assert len(added) == sum(x.nbytes <= said for x in XS)


def test_a_second_model_may_only_widen_the_choice(added: list[Tensor], group_name: str) -> None:
    """What was chosen stays in its place: CUDA graphs write to that memory."""
    used = []
    for said, limit in ((128, 128), (64, 128), (512, 512), (0, 512)):
        group = FakeGroup(group_name, said=said)
        choose_by(lambda functions, x: [1.0, 2.0], group, memory(), XS)
        added.clear()
        for x in XS:
            device_all_reduce(x, group_name)
        assert len(added) == sum(x.nbytes <= limit for x in XS)
        used.append([x.data_ptr() for x in added])
    assert used[0] == used[1] == used[2][:3] == used[3][:3] and len(set(used[3])) == 2


def test_one_rank_that_cannot_is_enough(added: list[Tensor], group_name: str) -> None:
    group = FakeGroup(group_name, error="rank 2 of 3: GPU 2 cannot read the memory of GPU 0")
    text = choose_all_reduce(group, WIDTH, torch.float32, CPU)
    assert text == f"all-reduce: NCCL (no symmetric memory: {group.error})"
    text = choose_all_reduce(FakeGroup(group_name), WIDTH, torch.float32, CPU)
    assert text == "all-reduce: NCCL (no symmetric memory: there is none for cpu)"
    device_all_reduce(XS[0], group_name)
    assert not added


def test_no_rank_waits_for_one_that_cannot(
    added: list[Tensor], group_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks meet to share memory only when all have said that they can."""
    group = FakeGroup(group_name, error="rank 1 of 3: GPU 1 cannot read the memory of GPU 0")
    events = []
    real = FakeGroup.agree

    def agree(self: FakeGroup, function: Callable[[], Any]) -> Any:
        function()  # here nothing fails, on another rank it does
        events.append("agreed")
        return real(self, function)

    monkeypatch.setattr(FakeGroup, "agree", agree)
    monkeypatch.setattr(symmetric, "why_not", lambda *_: None)
    monkeypatch.setattr(SymmetricReduce, "start", lambda *_: events.append("met"))
    assert "GPU 1" in choose_all_reduce(group, WIDTH, torch.float32, CPU)
    assert events == ["agreed"]


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank has the device of its number on its host."""
    reached: set[int] = {0, 2, 3}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: b in reached)
    bf16 = torch.bfloat16
    assert why_not(CUDA, bf16, 4, 4) is None and why_not(CUDA, torch.float32, 2, 2) is None
    for device, dtype, size, local_size, reason in (
        (CPU, bf16, 2, 2, "none for cpu"),
        (CUDA, torch.float16, 2, 2, "float16"),
        (CUDA, bf16, 8, 4, "several hosts"),
        (CUDA, bf16, 5, 5, "share a GPU"),
    ):
        assert reason in str(why_not(device, dtype, size, local_size))
    reached.remove(3)
    assert why_not(CUDA, bf16, 3, 3) is None
    assert why_not(CUDA, bf16, 4, 4) == "GPU 1 cannot read the memory of GPU 3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5)" in str(why_not(CUDA, bf16, 2, 2))


# -- the op --


def test_without_a_choice_the_op_is_the_plain_sum(added: list[Tensor], group_name: str) -> None:
    x = torch.randn(4, 6).t()
    for reduce in (device_all_reduce, plain_all_reduce):
        y = reduce(x, group_name)
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert not added


def test_one_compiled_graph_sums_every_size_its_own_way(
    added: list[Tensor], group_name: str
) -> None:
    """The limit is no branch of the graph: it would be compiled again for either side."""
    group = FakeGroup(group_name, said=128)
    choose_by(lambda functions, x: [1.0, 2.0], group, memory(), XS)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return device_all_reduce(x * 2, group_name) + 1

    for rows in (3, 4, 5, 16):
        x = torch.randn(rows, WIDTH)
        torch._dynamo.mark_dynamic(x, 0)
        factor = NUM_RANKS if x.nbytes <= 128 else 1
        torch.testing.assert_close(run(x), factor * 2 * x + 1)
    assert counter.frame_count == 1 and len(added) == 2
