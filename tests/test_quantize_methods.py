"""Methods that find numbers: rounding with and without a search for scales, GPTQ, AWQ.

Inputs are correlated, and a few channels carry much more than the others, as in real models.
"""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.awq import rounding_error, search_input_scales
from quantize.descent import descend
from quantize.formats import Format, QuantizedWeight
from quantize.gptq import gptq
from quantize.grid import Grid
from quantize.hessian import PANEL, HessianSum, output_error
from quantize.rounding import BLOCK_SIZE, find_scales, round_to_nearest
from quantize.scale_search import real_scales

INTEGERS = (
    "int8 int8-g64 int8-g32-asym int4 int4-g8 int4-asym int4-row int3 int3-row-asym"
).split()
FORMATS = [*INTEGERS, "int2-asym", "int2", "fp8", "fp8-g32", "mxfp4"]
LOW_BITS = [
    f"int{bits}{group}{asym}"
    for bits in (4, 3)
    for group in ("-g32", "-g64", "-row")
    for asym in ("", "-asym")
]


def inputs(num_rows: int, num_columns: int) -> Tensor:
    """Neighbours correlate, channels differ in size, and two of them are outliers."""
    distance = (torch.arange(num_columns).unsqueeze(1) - torch.arange(num_columns)).abs()
    mixed = torch.randn(num_rows, num_columns) @ torch.linalg.cholesky(0.9**distance).t()
    mixed *= torch.exp(0.5 * torch.randn(num_columns))
    mixed[:, [3, num_columns // 2]] *= 10
    return mixed


def hessian_of(x: Tensor) -> HessianSum:
    seen = HessianSum(x.size(-1))
    seen.add(x)
    return seen


def of_columns(stored: QuantizedWeight, of_groups: Tensor) -> Tensor:
    size = stored.format.group_size or stored.num_columns
    return of_groups.double().repeat_interleave(size, -1)[..., : stored.num_columns]


def group_errors(weight: Tensor, stored: QuantizedWeight, costs: Tensor) -> Tensor:
    """Weighted squared errors [N, groups] as shares of the group's weighted squares, in float64."""
    size = stored.format.group_size or weight.size(-1)
    unit = weight.double().abs().amax().clamp(min=1e-300)
    wrong = (stored.dequantize().double() - weight.double()) / unit
    parts = [
        (w.square() * c).sum(-1)
        for w, c in zip(wrong.split(size, -1), costs.split(size), strict=True)
    ]
    return torch.stack(parts, -1)


# -- round to nearest --


@pytest.mark.parametrize("name", INTEGERS)
def test_error_of_plain_rounding_is_at_most_half_a_step(name: str) -> None:
    form, weight = Format.parse(name), torch.randn(7, 77)
    stored = round_to_nearest(weight, form, search=False)
    scale = of_columns(stored, stored.scales)
    zero = 0 if stored.zeros is None else of_columns(stored, stored.zeros)
    low, high = (form.qmin - zero) * scale, (form.qmax - zero) * scale
    inside = (weight >= low) & (weight <= high)
    assert inside.float().mean() > 0.95
    wrong = (stored.dequantize() - weight).abs()
    assert (wrong <= 0.5001 * scale)[inside].all()
    # What is not inside is beyond the end by the rounding of the scale.
    assert (wrong <= 0.6 * scale).all()


@pytest.mark.parametrize("name", FORMATS)
def test_search_is_better_than_plain_rounding(name: str) -> None:
    form, weight = Format.parse(name), torch.randn(40, 130)
    errors = [
        (round_to_nearest(weight, form, search=search).dequantize() - weight).square().sum()
        for search in (False, True)
    ]
    at_most = {"mxfp4": 0.99, "fp8": 0.97, "fp8-g32": 0.9}
    assert errors[1] <= at_most.get(name, 0.95) * errors[0]


def best_error(group: Tensor, bits: int) -> float:
    """Least squared error of a group over two thousand scales, by brute force."""
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = torch.linspace(0.2, 1.5, 1000).double() * group.abs().max() / -least
    scales = torch.cat([scales, -scales]).unsqueeze(1)
    numbers = (group / scales).round().clamp(least, largest)
    return float((numbers * scales - group).square().sum(1).min())


def best_error_with_zero(group: Tensor, bits: int) -> float:
    """The same over scales and zeros, each fitted to its integers as a line is to points."""
    least, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    span, middle = group.max() - group.min(), (group.max() + group.min()) / 2
    scales = torch.linspace(0.5, 1.3, 100).double().view(-1, 1, 1) * span / (largest - least)
    zeros = -0.5 - middle / scales + torch.linspace(-1.5, 1.5, 50).double().view(1, -1, 1)
    numbers = (group / scales + zeros).round().clamp(least, largest)
    numbers = numbers - numbers.mean(-1, keepdim=True)
    centred = group - group.mean()
    gain = (numbers * centred).sum(-1).square() / numbers.square().sum(-1).clamp(min=1e-9)
    return float((centred.square().sum() - gain).min())


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_search_finds_nearly_the_best_scale(bits: int, has_zeros: bool) -> None:
    weight = torch.randn(20, 64).double()
    stored = round_to_nearest(weight, Format("int", bits, 32, has_zeros))
    found = (stored.dequantize().double() - weight).square().sum()
    best_of = best_error_with_zero if has_zeros else best_error
    best = sum(best_of(group, bits) for row in weight for group in row.split(32))
    assert best * 0.99 <= found <= 1.018 * best


HUGE = 2.0**126  # 8e37; the end of a range may be beyond the largest weight by half a step
NUMBERS = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-HUGE, HUGE, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1e-44, HUGE, -HUGE, 1.0, -1.0]),
)


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=1, max_size=40), min_size=1, max_size=1),
    repeats=st.integers(1, 3),
    name=st.sampled_from(FORMATS),
    costs=st.sampled_from(["equal", "random", "none", "wild"]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_search_is_never_worse_than_plain(
    rows: list[list[float]], repeats: int, name: str, costs: str
) -> None:
    """For any group, in the error that it is asked to make small; and numbers stay numbers."""
    weight = torch.tensor(rows, dtype=torch.float32).repeat(2, repeats)
    weight[1] *= -0.37
    form, num_columns = Format.parse(name), weight.size(1)
    cost = {
        "equal": torch.ones(num_columns),
        "random": torch.rand(num_columns),
        "none": torch.zeros(num_columns),
        "wild": 10.0 ** torch.randint(-30, 30, (num_columns,)),
    }[costs]
    importance = None if costs == "equal" else cost
    plain = round_to_nearest(weight, form, search=False)
    found = round_to_nearest(weight, form, importance=importance)
    assert plain.dequantize().isfinite().all() and found.dequantize().isfinite().all()
    assert found.scales.float().isfinite().all()
    # Only proportions count within a group, and all zeros are as good as all ones.
    cost = torch.ones_like(cost) if costs == "none" else cost
    cost = cost.double() / cost.max()
    before, after = (group_errors(weight, stored, cost) for stored in (plain, found))
    assert (after <= before * (1 + 1e-4) + 1e-13).all()


def test_importance_decides_which_columns_are_right() -> None:
    weight, cost = torch.randn(64, 64), torch.rand(64) ** 4
    form = Format.parse("int3")
    errors = [
        ((round_to_nearest(weight, form, importance=importance).dequantize() - weight) ** 2 * cost)
        for importance in (None, cost)
    ]
    assert errors[1].sum() < 0.85 * errors[0].sum()
    # A short group has its own.
    stored, alone = (
        round_to_nearest(weight[:, part], form, importance=cost[part])
        for part in (slice(50), slice(32, 50))
    )
    assert torch.equal(stored.dequantize()[:, 32:], alone.dequantize())
    # Its size says nothing.
    stored = [round_to_nearest(weight, form, importance=cost * size) for size in (1e-20, 1, 1e20)]
    assert all(torch.equal(other.values, stored[1].values) for other in stored)


def test_scale_takes_the_sign_that_uses_the_whole_range() -> None:
    """-8 has no positive twin: the largest weight, +1 here, should sit there."""
    weight = torch.tensor([[1.0, -0.875, 0.125, 0.0, 0.25, 0.5, -0.5, 0.75]])
    stored = round_to_nearest(weight, Format("int", 4, 8))
    assert torch.equal(stored.dequantize(), weight)
    assert stored.scales.item() == -0.125
    assert stored.integers()[0, 0] == -8


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_zeros_come_back_as_zeros(name: str) -> None:
    weight = torch.zeros(3, 70)
    weight[1, 64:] = torch.randn(6)
    weight[2] = 1e-45  # next to nothing: its scale is too small to be a number
    for search in (False, True):
        stored = round_to_nearest(weight, Format.parse(name), search=search)
        assert (stored.dequantize()[0] == 0).all()
        assert stored.format.group_size is None or (stored.dequantize()[1, :64] == 0).all()
        assert (real_scales(stored.scales) != 0).all()
        assert (stored.dequantize()[2].abs() < 1e-37).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 3e37])
@pytest.mark.parametrize("name", FORMATS)
def test_size_of_weights_does_not_matter(name: str, size: float) -> None:
    weight = torch.randn(5, 64).clamp(-4, 4)
    form = Format.parse(name)
    wrong = [
        ((round_to_nearest(weight * by, form).dequantize() / by) - weight).norm()
        for by in (1.0, size)
    ]
    # Not a power of two, so bfloat16 rounds the scales otherwise.
    assert math.isclose(float(wrong[0]), float(wrong[1]), rel_tol=0.05)


@pytest.mark.parametrize("name", [name for name in FORMATS if "asym" not in name])
def test_the_largest_weights_stay_finite(name: str) -> None:
    """A better scale may have an end beyond float32."""
    weight = 3e38 * (1 - 0.6 * torch.rand(64, 32).square()) * torch.randn(64, 32).sign()
    for search in (False, True):
        stored = round_to_nearest(weight, Format.parse(name), search=search)
        assert (stored.dequantize() / 3e38 - weight / 3e38).abs().max() < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named(bad: float) -> None:
    weight = torch.randn(3, 40)
    weight[2, 39] = bad
    for name in ("int4", "fp8", "mxfp4"):
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp has NaN or infinite"):
            round_to_nearest(weight, Format.parse(name), name="blocks.0.mlp")


def test_bad_importance_is_refused() -> None:
    weight, form = torch.randn(3, 40), Format.parse("int4")
    with pytest.raises(ValueError, match=r"importance has shape \[39\]"):
        round_to_nearest(weight, form, importance=torch.ones(39))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="importance has negative, NaN"):
            round_to_nearest(weight, form, importance=torch.full((40,), bad))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_columns", [1, 5, 33, 64])
def test_experts_and_odd_shapes(name: str, num_columns: int) -> None:
    """Experts are rounded each for itself, and a short last group as if it stood alone. (To the
    bit for 64 rows at a time: sums over others may be taken in another order.)
    """
    form, weight = Format.parse(name), torch.randn(2, 64, num_columns)
    stored = round_to_nearest(weight, form)
    assert stored.shape == (2, 64, num_columns)
    whole = stored.dequantize()
    for expert in range(2):
        assert torch.equal(round_to_nearest(weight[expert], form).dequantize(), whole[expert])
    if form.group_size and num_columns > form.group_size:
        rest = slice(form.group_size, None)
        alone = round_to_nearest(weight[..., rest], form).dequantize()
        assert torch.equal(alone, whole[..., rest])


def test_blocks_and_threads_change_nothing() -> None:
    form, num_columns = Format.parse("int4-asym"), 96
    weight = torch.randn(3 * BLOCK_SIZE // num_columns + 5, num_columns, dtype=torch.bfloat16)
    alone = round_to_nearest(weight, form)
    rows = round_to_nearest(weight[-7:].float(), form)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            together = round_to_nearest(weight, form)
        with ThreadPoolExecutor(1) as pool:  # where it was changed
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)
    for part, tensor in alone.tensors.items():
        assert torch.equal(tensor, together.tensors[part])
        assert torch.equal(tensor[-7:], rows.tensors[part])
    assert torch.equal(find_scales(weight, form)[0], alone.scales)


def test_weights_stay_as_they_are() -> None:
    """A transposed weight already has its groups in columns, which once were worked on in place."""
    weight, hessian = torch.randn(32, 24).t(), torch.eye(32)
    before = weight.clone()
    round_to_nearest(weight, Format.parse("int4"))
    gptq(weight, hessian, Format.parse("int4"), act_order=False)
    search_input_scales([weight], hessian, torch.ones(32), Format.parse("int4"))
    assert torch.equal(weight, before) and torch.equal(hessian, torch.eye(32))


def test_fp8_saturates_and_keeps_what_it_can_hold() -> None:
    numbers = torch.arange(-127, 128).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]  # every number of the format
    weight = torch.stack([numbers, numbers * 2**-20])
    for search in (False, True):
        stored = round_to_nearest(weight, Format.parse("fp8"), search=search)
        assert torch.equal(stored.dequantize(), weight)
    stored = round_to_nearest(torch.randn(9, 50), Format.parse("fp8"), search=False)
    assert (stored.values.float().abs().amax(1) == 448).all()


def test_mxfp4_is_rounded_as_ocp_says() -> None:
    weight = torch.randn(6, 70) * torch.exp2(torch.randint(-9, 9, (6, 1)).float())
    stored = round_to_nearest(weight, Format.parse("mxfp4"), search=False)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([-values.flip(0), values])
    for row in range(6):
        for group, block in enumerate(weight[row].split(32)):
            exponent = math.floor(math.log2(block.abs().max())) - 2
            assert stored.scales[row, group] == exponent + 127
            scaled = block.double() / 2.0**exponent
            nearest = values[(scaled.unsqueeze(1) - values).abs().argmin(1)] * 2.0**exponent
            there = stored.dequantize()[row, group * 32 : group * 32 + len(block)]
            torch.testing.assert_close(there.double(), nearest, rtol=0, atol=0)
    again = round_to_nearest(stored.dequantize(), Format.parse("mxfp4"))
    assert torch.equal(again.dequantize(), stored.dequantize())


# -- what the inputs say --


def test_hessian_is_the_sum_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.hessian.MAX_ROWS", 32)
    num_columns = PANEL + 37
    x = inputs(120, num_columns).bfloat16()
    seen = HessianSum(num_columns)
    for batch in (x[:50].view(5, 10, -1), x[50:51], x[51:]):
        seen.add(batch)
    exact = x.double()
    expected = exact.t() @ exact
    assert seen.num_rows == 120
    for _ in range(2):  # reading does not change it
        torch.testing.assert_close(seen.hessian.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen.mean_abs.double(), exact.abs().mean(0), rtol=1e-4, atol=1e-5)
    squares = exact.square().mean(0)
    torch.testing.assert_close(seen.mean_square.double(), squares, rtol=1e-4, atol=1e-5)
    seen.add(x.float())
    torch.testing.assert_close(seen.hessian.double(), 2 * expected, rtol=1e-4, atol=1e-3)


def test_inputs_that_are_no_numbers_are_refused() -> None:
    x = torch.randn(4, 8)
    x[3, 7] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        HessianSum(8).add(x)


def test_output_error_is_that_of_the_output() -> None:
    x, weight = inputs(300, 40), torch.randn(12, 40)
    stored = round_to_nearest(weight, Format.parse("int3"))
    expected = (x @ (stored.dequantize() - weight).t()).square().sum()
    error = output_error(weight, stored, hessian_of(x).hessian)
    torch.testing.assert_close(error, expected, rtol=1e-3, atol=0)


# -- GPTQ --


def textbook(
    weight: Tensor, hessian: Tensor, form: Format, order: list[int], damping: float
) -> Tensor:
    """Optimal brain quantization in a given order, in float64: the inverse Hessian is kept, and
    column after column is taken out of it. Scales are found beforehand where `order` is not the
    natural one.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    size = form.group_size or w.size(1)
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse, result = h.inverse(), torch.empty_like(w)
    importance = 1 / inverse.diagonal().float()
    scales, zeros = find_scales(weight, form, importance=importance)
    in_turn = order == sorted(order) and form.group_size is not None
    for j in order:
        group = j // size
        if in_turn and j % size == 0:
            part = slice(j, j + size)
            scale, zero = find_scales(w[:, part].float(), form, importance=importance[part])
            scales[:, group] = scale[:, 0]
            if zeros is not None:
                zeros[:, group] = zero[:, 0]
        scale = scales[:, group].double()
        zero = 0.0 if zeros is None else zeros[:, group].double()
        number = (w[:, j] / scale + zero).round().clamp(form.qmin, form.qmax)
        result[:, j] = (number - zero) * scale
        wrong = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= wrong.unsqueeze(1) * inverse[j]
        inverse -= inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4", "int3-g64-asym", "int4-row", "int4-g256"])
def test_gptq_is_what_the_textbook_says(name: str, act_order: bool) -> None:
    """More columns than a block of the solver, the last group short."""
    form, weight, x = Format.parse(name), torch.randn(9, 270), inputs(900, 270)
    hessian = hessian_of(x).hessian
    order = list(range(270))
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    expected = textbook(weight, hessian, form, order, 0.02)
    stored = gptq(weight, hessian, form, act_order=act_order, damping=0.02, num_sweeps=0)
    # A number near the middle between two may fall to the other side, and then others after it.
    same = torch.isclose(stored.dequantize().double(), expected, rtol=1e-5, atol=1e-6)
    assert same.float().mean() > 0.97
    errors = [output_error(weight, each, hessian) for each in (stored, expected)]
    assert math.isclose(float(errors[0]), float(errors[1]), rel_tol=0.01)


@pytest.mark.parametrize("name", LOW_BITS)
def test_gptq_beats_search_beats_plain_rounding(name: str) -> None:
    form, weight, x = Format.parse(name), torch.randn(48, 130), inputs(1500, 130)
    hessian = hessian_of(x).hessian
    plain = round_to_nearest(weight, form, search=False)
    found = [
        gptq(weight, hessian, form),
        gptq(weight, hessian, form, act_order=False),
        round_to_nearest(weight, form, importance=hessian.diagonal()),
        round_to_nearest(weight, form),
    ]
    *solved, weighted, searched, rounded = (
        float(output_error(weight, stored, hessian)) for stored in (*found, plain)
    )
    assert max(solved) < 0.5 * weighted
    assert weighted < searched < rounded
    assert float(output_error(weight, gptq(weight, hessian, form, search=False), hessian)) < rounded


@pytest.mark.parametrize("name", FORMATS)
def test_descent_makes_the_error_smaller_each_time(name: str) -> None:
    """From rounded numbers too, which leave more to do than GPTQ's; 150 columns are two blocks."""
    form, weight, x = Format.parse(name), torch.randn(30, 150), inputs(1000, 150)
    hessian = hessian_of(x).hessian
    errors = [
        float(output_error(weight, gptq(weight, hessian, form, damping=0, num_sweeps=n), hessian))
        for n in range(4)
    ]
    assert errors[1] < errors[0] * (0.99 if form.bits < 8 else 1.0001)
    assert all(after <= before * 1.0001 for before, after in itertools.pairwise(errors))
    assert float(output_error(weight, descended(weight, hessian, form), hessian)) < 0.6 * float(
        output_error(weight, round_to_nearest(weight, form), hessian)
    )


def descended(weight: Tensor, hessian: Tensor, form: Format) -> Tensor:
    """What descent alone makes of rounded numbers."""
    grid = Grid(weight, torch.ones(weight.size(1)), form, True, "weight")
    numbers = torch.stack([grid.round(column, j)[0] for j, column in enumerate(weight.t())])
    descend(numbers, weight.t().contiguous(), hessian, grid, 4)
    return grid.real(numbers).t()


def test_descent_stops_where_nothing_is_better() -> None:
    """No single number of what it ends with can be changed for the better: tried one by one."""
    form, weight, x = Format.parse("int3-row"), torch.randn(4, 40), inputs(400, 40)
    hessian = hessian_of(x).hessian.double()
    stored = gptq(weight, hessian.float(), form, damping=0, num_sweeps=30)
    wrong = stored.dequantize().double() - weight
    for step in (-1.0, 1.0):
        change = step * stored.scales.double()
        new = stored.integers() + step
        # The error goes up by 2 change (D H)_j + change^2 H_jj.
        rise = 2 * change * (wrong @ hessian) + change.square() * hessian.diagonal()
        allowed = (new >= form.qmin) & (new <= form.qmax)
        assert (rise[allowed] > -1e-3 * rise.abs().mean()).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_without_correlation_is_rounding(name: str, act_order: bool) -> None:
    form, weight = Format.parse(name), torch.randn(64, 150)
    stored = gptq(weight, 3 * torch.eye(150), form, act_order=act_order, num_sweeps=0)
    for part, tensor in round_to_nearest(weight, form).tensors.items():
        assert torch.equal(stored.tensors[part].float(), tensor.float())


def test_columns_without_input_are_rounded_for_themselves() -> None:
    x, weight = inputs(500, 64), torch.randn(6, 64)
    x[:, [0, 40, 63]] = 0
    weight[:, 8:16] = 0
    form = Format.parse("int4-g8")
    stored = gptq(weight, hessian_of(x).hessian, form)
    assert (stored.dequantize()[:, 8:16] == 0).all() and stored.scales.isfinite().all()
    wrong = (stored.dequantize() - weight).abs()
    assert (wrong <= 0.51 * of_columns(stored, stored.scales).abs())[
        :, [0, 40, 63]
    ].float().mean() > 0.9
    never = gptq(weight, torch.zeros(64, 64), form, num_sweeps=0)
    assert torch.equal(never.values, round_to_nearest(weight, form).values)


def test_singular_hessians_are_damped_until_they_work() -> None:
    """Fewer rows than columns, and no damping asked for."""
    x, weight = inputs(20, 64), torch.randn(6, 64)
    hessian, form = hessian_of(x).hessian, Format.parse("int3")
    stored = gptq(weight, hessian, form, damping=0.0)
    searched = round_to_nearest(weight, form)
    assert output_error(weight, stored, hessian) < 0.5 * output_error(weight, searched, hessian)


def test_what_gptq_cannot_use_is_refused() -> None:
    weight, form, hessian = torch.randn(4, 16), Format.parse("int4"), torch.eye(16)
    with pytest.raises(ValueError, match=r"a Hessian \[15, 15\] do not fit"):
        gptq(weight, hessian[:15, :15], form)
    with pytest.raises(ValueError, match=r"damping -0\.1 is not usable"):
        gptq(weight, hessian, form, damping=-0.1)
    with pytest.raises(ValueError, match=r"mlp\.down has NaN or infinite"):
        gptq(weight * math.nan, hessian, form, name="mlp.down")
    with pytest.raises(ValueError, match=r"Hessian of mlp\.down has NaN"):
        gptq(weight, hessian * math.nan, form, name="mlp.down")
    opposite = torch.eye(16)
    opposite[0, 1] = opposite[1, 0] = -50.0
    with pytest.raises(ValueError, match=r"Hessian of mlp\.down is not positive"):
        gptq(weight, opposite, form, name="mlp.down")


# -- AWQ --


@pytest.mark.parametrize("name", LOW_BITS)
def test_awq_beats_search_where_channels_stand_out(name: str) -> None:
    form, x = Format.parse(name), inputs(1500, 130)
    weights, seen = [torch.randn(48, 130), torch.randn(20, 130)], hessian_of(x)
    scale = search_input_scales(weights, seen.hessian, seen.mean_abs, form)
    errors = [
        sum(float(output_error(w, round_to_nearest(w, form), seen.hessian)) for w in weights),
        float(rounding_error(weights, torch.ones(130), seen.hessian, form)),
        float(rounding_error(weights, scale, seen.hessian, form)),
    ]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.9 * errors[0]
    # The error is that of the outputs.
    w = weights[0]
    stored = round_to_nearest(w * scale, form, importance=seen.hessian.diagonal() / scale.square())
    outputs = (x / scale) @ stored.dequantize().t()
    expected = float((outputs - x @ w.t()).square().sum())
    assert math.isclose(
        expected, float(rounding_error([w], scale, seen.hessian, form)), rel_tol=1e-2
    )


def formats_and_inputs() -> Iterator[tuple[str, Tensor]]:
    for name in ("int4", "int3-asym", "int8", "fp8"):
        yield name, torch.randn(200, 40)  # nothing stands out
        yield name, inputs(200, 40)


def test_awq_is_never_worse_than_leaving_channels_alone() -> None:
    for name, x in formats_and_inputs():
        form, seen, weights = Format.parse(name), hessian_of(x), [torch.randn(30, 40)]
        scale = search_input_scales(weights, seen.hessian, seen.mean_abs, form)
        errors = [rounding_error(weights, s, seen.hessian, form) for s in (scale, torch.ones(40))]
        assert errors[0] <= errors[1]


def test_awq_scales_tied_channels_alike_and_bears_dead_ones() -> None:
    x = inputs(500, 48)
    x[:, 7] = 0
    seen, tied = hessian_of(x), torch.arange(24).repeat(2)
    weights = [torch.randn(64, 48)]
    scale = search_input_scales(weights, seen.hessian, seen.mean_abs, Format.parse("int3"), tied)
    assert torch.equal(scale[:24], scale[24:])
    assert (scale > 0).all() and scale.isfinite().all() and scale.unique().numel() > 1
    nothing = search_input_scales(
        weights, torch.zeros(48, 48), torch.zeros(48), Format.parse("int3")
    )
    assert torch.equal(nothing, torch.ones(48))


def test_sums_over_half_precision_do_not_overflow() -> None:
    """3e4 is a number of float16; forty of them are none."""
    sums = HessianSum(64)
    sums.add(torch.full((40, 64), 3e4).half())
    assert sums.mean_abs.tolist() == [float(torch.tensor(3e4).half())] * 64


def test_a_weight_of_zeros_has_no_channels_that_matter() -> None:
    sums = HessianSum(64)
    sums.add(torch.rand(100, 64) * torch.logspace(-3, 3, 64))
    scale = search_input_scales(
        [torch.zeros(9, 64)], sums.hessian, sums.mean_abs, Format.parse("int4")
    )
    assert (scale > 0).all() and scale.isfinite().all()
