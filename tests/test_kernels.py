"""Kernels against the plain functions that define them, and against numbers worked out by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.kernels import attention as attention_module
from gptfast.kernels.attention import (
    attention,
    attention_on_any_device,
    attention_reference,
)
from quantize.formats import Format, quantized_weight
from quantize.grouped import (
    grouped_linear,
    grouped_linear_on_cuda,
    grouped_linear_reference,
)
from quantize.kernels.build import LINEAR
from quantize.kernels.cpu import PackedQuantizedGroupedLinear
from quantize.mxfp4 import VALUES, dequantize_mxfp4

# -- attention --


def random_attention(
    batch: int, num_tokens: int, heads: tuple[int, int], num_slots: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys, values, and positions: some rows consecutive as in use, some arbitrary or padded."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    q = torch.randn(batch, num_tokens, num_heads, 8, generator=generator)
    keys, values = torch.randn(2, batch, num_kv_heads, num_slots + 1, 8, generator=generator)
    positions = torch.randint(0, num_slots + 1, (batch, num_tokens), generator=generator)
    return q, keys, values, positions


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 17])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_attention_is_its_reference(num_tokens: int, heads: tuple[int, int], seed: int) -> None:
    q, keys, values, positions = random_attention(3, num_tokens, heads, 24, seed)
    y, expected = (op(q, keys, values, positions) for op in (attention, attention_reference))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.isfinite().all()


@pytest.mark.parametrize("op", [attention, attention_reference])
def test_attention_by_hand(op: Callable[..., Tensor]) -> None:
    """Query head 1 of 4 belongs to key/value head 0 of 2; position 3 sees slots 0 to 3."""
    q, keys, values, _ = random_attention(2, 2, (4, 2), 10, seed=5)
    y = op(q, keys, values, torch.tensor([[3, 9], [0, 10]]))
    weights = (q[0, 0, 1] @ keys[0, 0, :4].T / 8**0.5).softmax(-1)
    torch.testing.assert_close(y[0, 0, 1], weights @ values[0, 0, :4])
    torch.testing.assert_close(y[1, 0], values[1, :, 0].repeat_interleave(2, 0))
    assert y.shape == q.shape and y.is_contiguous() and y.isfinite().all()


@pytest.mark.parametrize("op", [attention, attention_reference])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_slots_beyond_a_position_do_not_matter(op: Callable[..., Tensor], num_tokens: int) -> None:
    """Bit for bit: stale slots hold huge numbers and the spare one NaN."""
    q, keys, values, _ = random_attention(3, num_tokens, (4, 2), 16, seed=1)
    positions = torch.tensor([[2], [15 - num_tokens + 1], [7]]) + torch.arange(num_tokens)
    expected = op(q, keys, values, positions)
    for row in range(3):
        last = int(positions[row, -1])
        keys[row, :, last + 1 :], values[row, :, last + 1 :] = 1e30, -1e30
    keys[:, :, -1], values[:, :, -1] = float("nan"), float("nan")
    assert torch.equal(op(q, keys, values, positions), expected)


@pytest.mark.parametrize("bound", [14, 15, 24, 99])
def test_attention_reads_no_further_than_a_bound(bound: int) -> None:
    """What devices without a kernel of their own run, here on the CPU: slots from the bound on are
    not even multiplied by zero.
    """
    q, keys, values, _ = random_attention(3, 2, (4, 2), 24, seed=7)
    positions = torch.tensor([[2, 3], [12, 13], [24, 24]])
    expected = attention_reference(q, keys, values, positions)
    keys[:, :, bound:], values[:, :, bound:] = float("nan"), float("nan")
    for op in (attention_on_any_device, attention):
        y = op(q, keys, values, positions, torch.tensor(bound))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [attention, attention_reference])
def test_attention_of_padding_alone_is_finite(op: Callable[..., Tensor]) -> None:
    """An engine whose rows are all idle, with a spare slot that holds NaN."""
    q, keys, values, _ = random_attention(2, 3, (4, 2), 6, seed=2)
    keys[:, :, -1], values[:, :, -1] = float("nan"), float("nan")
    assert op(q, keys, values, torch.full((2, 3), 6)).isfinite().all()


def test_attention_takes_strided_views_and_leaves_its_inputs_alone() -> None:
    """q comes as a slice of the fused projection, keys and values as one row of a larger cache."""
    q, keys, values, positions = random_attention(2, 3, (4, 2), 12, seed=3)
    fused = torch.cat((q, torch.randn(2, 3, 4, 8)), dim=2)
    before = copy.deepcopy((fused, keys, values, positions))
    y = attention(fused[:1, :, :4], keys[:1], values[:1], positions[:1])
    torch.testing.assert_close(y, attention_reference(q, keys, values, positions)[:1])
    assert all(map(torch.equal, before, (fused, keys, values, positions)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    q, keys, values, positions = random_attention(3, 5, (4, 2), 24, seed=4)
    half = [tensor.to(dtype) for tensor in (q, keys, values)]
    exact = attention_reference(*(tensor.float() for tensor in half), positions)
    y = attention(*half, positions)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_attention_is_a_proper_operator(num_tokens: int) -> None:
    inputs = random_attention(2, num_tokens, (4, 2), 12, seed=6)
    torch.library.opcheck(torch.ops.gptfast.attention.default, (*inputs, torch.tensor(12)))


# -- attention with more than a softmax of products --

SCORINGS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.7},
    "window": {"window": 3},
    "window-of-one": {"window": 1},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": torch.tensor([2.0, -1.0, 0.5, 4.0])},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 1.0, 0.1])},
    "window-softcap-scale": {"window": 5, "softcap": 1.5, "scale": 2.0},
    "window-sinks": {"window": 4, "sinks": torch.tensor([2.0, -1.0, 0.5, 4.0])},
    "window-slopes": {"window": 4, "slopes": torch.tensor([0.5, 0.25, 1.0, 0.1])},
}
# How many tokens, and the first position of each of three rows in 24 slots.
PLACES = [(1, (0, 9, 23)), (1, (5, 5, 5)), (4, (0, 7, 20)), (11, (0, 2, 13))]


def positions_from(num_tokens: int, starts: tuple[int, ...]) -> Tensor:
    return torch.tensor(starts).unsqueeze(1) + torch.arange(num_tokens)


@pytest.mark.parametrize("op", [attention, attention_on_any_device])
@pytest.mark.parametrize(("num_tokens", "starts"), PLACES)
@pytest.mark.parametrize("name", SCORINGS)
def test_scorings_are_their_reference(
    name: str, num_tokens: int, starts: tuple[int, ...], op: Callable[..., Tensor]
) -> None:
    scoring, positions = SCORINGS[name], positions_from(num_tokens, starts)
    q, keys, values, _ = random_attention(3, num_tokens, (4, 2), 24, seed=8)
    expected = attention_reference(q, keys, values, positions, **scoring)
    plain = attention_reference(q, keys, values, positions)
    assert (expected - plain).abs().max() > 0.05, "the scoring makes no difference here"
    order = ("scale", "window", "softcap", "sinks", "slopes")
    y = op(q, keys, values, positions, None, *(scoring.get(key) for key in order))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for row in range(3):  # alone as in a batch
        part = slice(row, row + 1)
        inputs = (q[part], keys[part], values[part], positions[part], None)
        alone = op(*inputs, *(scoring.get(key) for key in order))
        torch.testing.assert_close(alone, expected[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCORINGS)
def test_scorings_of_padding_are_finite_and_disturb_nobody(name: str) -> None:
    """Row 1 is idle, row 2 ends in padding; a window moves the slots that are read at all."""
    q, keys, values, _ = random_attention(3, 2, (4, 2), 24, seed=9)
    positions = torch.tensor([[20, 21], [24, 24], [19, 24]])
    y = attention(q, keys, values, positions, **SCORINGS[name])
    assert y.isfinite().all()
    expected = attention_reference(q, keys, values, positions, **SCORINGS[name])
    torch.testing.assert_close(y[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[2, 0], expected[2, 0], rtol=1e-5, atol=1e-5)


def test_a_window_reads_no_other_slot() -> None:
    """The cost of a step follows the window: what lies before it is not even multiplied by zero."""
    q, keys, values, _ = random_attention(2, 1, (4, 2), 24, seed=10)
    positions = torch.tensor([[17], [20]])
    expected = attention_reference(q, keys, values, positions, window=4)
    keys[:, :, :14], values[:, :, :14] = torch.nan, torch.nan
    y = attention(q, keys, values, positions, window=4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [attention, attention_reference])
def test_scorings_by_hand(op: Callable[..., Tensor]) -> None:
    """One head, one number: keys 1, 2, 3 and values 10, 20, 30, query 1 at position 2."""
    q = torch.ones(1, 1, 1, 1)
    keys = torch.tensor([1.0, 2.0, 3.0, 99.0]).view(1, 1, 4, 1)
    at = torch.tensor([[2]])

    def result(**scoring: Any) -> float:
        return op(q, keys, 10 * keys, at, **scoring).item()

    def mean(*scores: float) -> float:
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        return (weights[-3:] @ torch.tensor([10.0, 20.0, 30.0]).double()).item()

    assert result() == pytest.approx(mean(1, 2, 3), rel=1e-5)
    assert result(scale=2.0) == pytest.approx(mean(2, 4, 6), rel=1e-5)
    capped = [2 * torch.tensor(s / 2).tanh().item() for s in (1.0, 2.0, 3.0)]
    assert result(softcap=2.0) == pytest.approx(mean(*capped), rel=1e-5)
    assert result(slopes=torch.tensor([0.5])) == pytest.approx(mean(0, 1.5, 3), rel=1e-5)
    assert result(sinks=torch.tensor([1.5])) == pytest.approx(mean(1.5, 1, 2, 3), rel=1e-5)
    assert result(window=1) == pytest.approx(30.0)


def test_values_may_be_narrower_than_keys() -> None:
    """As with latent attention, whose values are the first numbers of the keys."""
    q, keys, _, positions = random_attention(3, 4, (4, 1), 24, seed=11)
    values = keys[..., :5]
    y = attention(q, keys, values, positions)
    assert y.shape == (3, 4, 4, 5)
    expected = attention_reference(q, keys, values, positions)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_long_prompts_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few scores may be held, the result is the same."""
    q, keys, values, _ = random_attention(2, 9, (4, 2), 24, seed=12)
    positions = positions_from(9, (3, 14))
    scoring = {"softcap": 0.9, "slopes": SCORINGS["slopes"]["slopes"], "window": 6}
    expected = attention_reference(q, keys, values, positions, **scoring)
    for most in (1, 300, 700):
        monkeypatch.setattr("gptfast.kernels.attention.MAX_SCORES", most)
        y = attention(q, keys, values, positions, **scoring)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y, plain = (op(q, keys, values, positions) for op in (attention, attention_reference))
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)


# -- grouped linear --


def random_groups(
    counts: list[int], bias: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 8, generator=generator)
    weight = torch.randn(len(counts), 6, 8, generator=generator)
    biases = torch.randn(len(counts), 6, generator=generator) if bias else None
    return x, weight, biases, torch.tensor(counts).cumsum(0)


COUNTS = [[3, 0, 2, 1], [0, 0, 0, 5], [1, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("op", [grouped_linear, grouped_linear_reference])
def test_each_group_goes_through_its_own_weight(
    op: Callable[..., Tensor], counts: list[int], bias: bool
) -> None:
    x, weight, biases, ends = random_groups(counts, bias)
    y, start = op(x, weight, biases, ends), 0
    for group, count in enumerate(counts):
        for row in range(start, start + count):
            expected = weight[group] @ x[row] + (0 if biases is None else biases[group])
            torch.testing.assert_close(y[row], expected)
        start += count
    assert y.shape == (sum(counts), 6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 70, 0, 9]], ids=str)
def test_the_way_on_cuda_gives_the_same(counts: list[int], bias: bool) -> None:
    """In bfloat16 one grouped product, otherwise gathered weights or a product for each group."""
    x, weight, biases, ends = random_groups(counts, bias)
    expected = grouped_linear_reference(x, weight, biases, ends)
    torch.testing.assert_close(grouped_linear_on_cuda(x, weight, biases, ends), expected)
    x, weight = torch.cat((x, x), 1).bfloat16(), torch.cat((weight, weight), 2).bfloat16()
    weight = torch.nn.functional.pad(weight, (0, 0, 0, 2))
    biases = None if biases is None else torch.nn.functional.pad(biases, (0, 2)).bfloat16()
    expected = grouped_linear_reference(x, weight, biases, ends)
    found = grouped_linear_on_cuda(x, weight, biases, ends)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=5e-2)


def test_many_rows_are_gathered_in_parts_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then nobody may ask the device for the counts."""
    x, weight, biases, ends = random_groups([0, 70, 3, 100], bias=True)
    expected = grouped_linear(x, weight, biases, ends)
    monkeypatch.setattr("quantize.grouped.grouped_linear_on_host", None)
    monkeypatch.setattr("quantize.grouped.MAX_GATHERED_ROWS", 200)
    torch.testing.assert_close(grouped_linear_on_cuda(x, weight, biases, ends), expected)
    monkeypatch.setattr("quantize.grouped.MAX_GATHERED_ROWS", 32)
    monkeypatch.setattr("quantize.grouped.MAX_GATHERED_BYTES", 10 * weight[0].nbytes + 5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    found = grouped_linear_on_cuda(x, weight, biases, ends)
    torch.testing.assert_close(found, expected)


def test_weights_of_groups_without_rows_are_not_read() -> None:
    x, weight, _, ends = random_groups([2, 0, 1], bias=False)
    weight[1] = torch.nan
    assert grouped_linear(x, weight, None, ends).isfinite().all()


@pytest.mark.parametrize("op", [grouped_linear, grouped_linear_reference, grouped_linear_on_cuda])
def test_rows_behind_the_last_group_belong_to_none(op: Callable[..., Tensor]) -> None:
    """So are those of padding; they may have any result and disturb nobody."""
    x, weight, biases, ends = random_groups([3, 0, 2, 1], bias=True)
    expected = grouped_linear_reference(x, weight, biases, ends)
    more = torch.cat((x, torch.randn(4, 8)))
    found = op(more, weight, biases, ends)
    assert found.shape == (10, 6)
    torch.testing.assert_close(found[:6], expected)


def test_grouped_linear_is_a_proper_operator() -> None:
    for bias in (False, True):
        inputs = random_groups([2, 0, 1], bias)
        torch.library.opcheck(torch.ops.quantize.grouped_linear.default, inputs)


# -- mxfp4 --


def test_mxfp4_by_hand() -> None:
    """Byte 0x21 holds codes 1 and 2: the low half comes first. Scale 128 doubles, 126 halves."""
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 1, 15] = 0x21, 0xF9
    scales = torch.tensor([[128, 126]], dtype=torch.uint8)
    weight = dequantize_mxfp4(blocks, scales)
    assert weight.shape == (1, 64) and weight.dtype == torch.bfloat16
    assert weight[0, :2].tolist() == [1.0, 2.0]
    assert weight[0, 62:].tolist() == [-0.25, -3.0]
    assert weight[0, 2:62].abs().sum() == 0


def test_ends_of_other_groups_than_a_weight_has_are_refused() -> None:
    """Before anything beyond the packed weights is read."""
    if LINEAR.load() is None:
        pytest.skip(f"needs the built kernels: {LINEAR.why_not()}")
    form = Format.parse("int8")
    integers = torch.randint(-127, 128, (3, 6, 8), dtype=torch.int8)
    stored = quantized_weight(form, integers, torch.ones(3, 6, 1), None)
    linear = PackedQuantizedGroupedLinear(stored)
    assert linear(torch.randn(4, 8), torch.tensor([1, 2, 4])).shape == (4, 6)
    for ends in ([1, 4], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="ends of groups"):
            linear(torch.randn(4, 8), torch.tensor(ends))


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    module = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="transformers is the oracle here"
    )
    blocks = torch.randint(256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 8, 2), dtype=torch.uint8)
    theirs = module.convert_moe_packed_tensors(blocks, scales)  # [E, in, out]
    assert torch.equal(dequantize_mxfp4(blocks, scales), theirs.transpose(1, 2))
    assert dequantize_mxfp4(blocks, scales).abs().max() > 100
    assert len(VALUES) == 8


# -- attention of long pieces on a CPU without a kernel for them --


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_has_kernel", lambda *inputs: False)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_long_pieces_are_read_in_parts(
    window: int | None, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of four, the last of them shorter: one row after 11 cached tokens, one with padding,
    one anyhow.
    """
    without_kernels(monkeypatch)
    monkeypatch.setattr(attention_module, "TOKENS_TOGETHER", 4)
    q, keys, values, positions = random_attention(3, 18, (4, 2), 40, seed=1)
    positions[0] = torch.arange(11, 29)
    positions[1] = torch.tensor([*range(7), *[40] * 11])
    scales: tuple[Tensor | None, ...] = (None, None)
    if rounded:
        keys, values = (t.mul(20).round().to(torch.int8) for t in (keys, values))
        scales = tuple(torch.rand(2, 3, 2, 41, 1) / 20)
    options = {"window": window, "key_scales": scales[0], "value_scales": scales[1]}
    y = attention(q, keys, values, positions, **options)
    expected = attention_reference(q, keys, values, positions, **options)
    seen = positions < 40
    torch.testing.assert_close(y[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert y.isfinite().all()


def test_a_part_reads_only_what_its_tokens_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind a part's last token is not even masked out: no number there matters."""
    without_kernels(monkeypatch)
    monkeypatch.setattr(attention_module, "TOKENS_TOGETHER", 8)
    q, keys, values, _ = random_attention(1, 18, (4, 2), 40, seed=2)
    values[:, :, 8:] = torch.nan
    y = attention(q, keys, values, torch.arange(18).unsqueeze(0))
    assert y[:, :8].isfinite().all() and y[:, 8:].isnan().all()
