"""Formats of stored weights, against their meaning written out number by number."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats import (
    Format,
    QuantizedWeight,
    pack_nibbles,
    quantized_weight,
    unpack_nibbles,
)
from quantize.grouped import grouped_linear_reference
from quantize.linear import (
    QuantizedEmbedding,
    QuantizedGroupedLinear,
    QuantizedLinear,
    round_activations,
)
from quantize.mxfp4 import dequantize_mxfp4
from quantize.readers import mxfp4_weight

NAMES = (
    "int8 int8-g64 int8-g16-asym int4-g32 int4-g128-asym int4-row int3-g32 int2-g8-asym fp8 "
    "fp8-g128 mxfp4 int8-dynamic int4-g32-dynamic"
).split()
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def random_weight(name: str, *shape: int, order: bool = False, seed: int = 0) -> QuantizedWeight:
    """Random stored numbers in every place of the format."""
    form, generator = Format.parse(name), torch.Generator().manual_seed(seed)
    *rows, columns = shape
    groups = (*rows, form.num_groups(columns))
    permutation = torch.randperm(columns, generator=generator) if order else None
    if form.kind == "mxfp4":
        codes = torch.randint(16, shape, generator=generator)
        scales = torch.randint(120, 134, groups, generator=generator).to(torch.uint8)
        return quantized_weight(form, codes, scales, None, permutation)
    scales = torch.randn(groups, generator=generator).to(form.scale_dtype)
    if form.kind == "fp8":
        values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        return QuantizedWeight(form, columns, values, scales, None, permutation).check()
    integers = torch.randint(form.qmin, form.qmax + 1, shape, generator=generator)
    zeros = torch.randn(groups, generator=generator).to(form.scale_dtype)
    zeros = zeros if form.has_zeros else None
    return quantized_weight(form, integers, scales, zeros, permutation)


def meaning(weight: QuantizedWeight) -> Tensor:
    """The weight [N, K] in float64, one number after the other."""
    form, (rows, columns) = weight.format, weight.shape
    size = form.group_size or columns
    plain = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // size
            scale = float(weight.scales[row, group])
            if form.bits <= 4:
                byte = int(weight.values[row, column // 2])
                half = byte >> 4 if column % 2 else byte & 15
                number = FP4[half] if form.kind == "mxfp4" else half - 8
            else:
                number = float(weight.values[row, column])
            if form.kind == "mxfp4":
                scale = 2.0 ** (int(scale) - 127)
            zero = 0.0 if weight.zeros is None else float(weight.zeros[row, group])
            place = column if weight.order is None else int(weight.order[column])
            plain[row, place] = (number - zero) * scale
    return plain


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (2, 67), (1, 1), (5, 150)])
def test_dequantized_numbers_are_what_the_format_says(
    name: str, rows: int, columns: int, order: bool
) -> None:
    weight = random_weight(name, rows, columns, order=order)
    assert weight.shape == (rows, columns)
    found = weight.dequantize()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), meaning(weight), rtol=1e-6, atol=1e-6)
    rounded = weight.dequantize(torch.bfloat16)
    assert torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_back(name: str) -> None:
    assert Format.parse(name).name == name


def test_names_that_leave_something_open() -> None:
    assert Format.parse("int4") == Format("int", 4, 32)
    assert Format.parse("int4-asym") == Format("int", 4, 32, has_zeros=True)
    assert Format.parse("int8") == Format("int", 8)
    assert Format.parse("int4-dynamic") == Format("int", 4, 32, dynamic=True)


@pytest.mark.parametrize(
    "name", ["", "int5", "int4-32", "INT4", "int4-asym-g32", "int16", "fp8-asym", "mxfp4-g64"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"use|no zeros|blocks of 32"):
        Format.parse(name)


@pytest.mark.parametrize("size", [0, 1, 2, 4, 7, 12, 96, 100, 2**31])
def test_group_sizes_that_are_no_power_of_two_from_eight_on_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"group size {size} .* power of two from 8 to"):
        Format("int", 4, size)


def test_bits_of_a_weight() -> None:
    """The 4.5 bits of a body in int4: 16 bits of scale for 32 numbers."""
    assert Format.parse("int4").bytes_per_weight(2048) * 8 == 4.5
    assert Format.parse("int8").bytes_per_weight(2048) * 8 == 8 + 32 / 2048
    for name in NAMES:
        weight = random_weight(name, 6, 67)
        assert weight.num_bytes == round(6 * 67 * weight.format.bytes_per_weight(67))


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
@settings(deadline=None)
def test_nibbles_are_read_back(numbers: list[int]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.int8)
    packed = pack_nibbles(tensor)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(len(numbers) / 2)
    assert unpack_nibbles(packed, len(numbers)).tolist() == numbers


def test_the_first_of_two_nibbles_is_in_the_low_half() -> None:
    assert pack_nibbles(torch.tensor([-8, 7, 1])).tolist() == [0xF0, 0x89]


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_whole_groups_can_be_cut_out(name: str) -> None:
    weight = random_weight(name, 7, 300)
    plain = weight.dequantize()
    assert torch.equal(weight.rows(slice(2, 5)).dequantize(), plain[2:5])
    chosen = torch.tensor([6, 0, 3])
    assert torch.equal(weight.rows(chosen).dequantize(), plain[chosen])
    step = weight.format.group_size or 2
    assert torch.equal(weight.columns(step, 2 * step).dequantize(), plain[:, step : 2 * step])
    assert torch.equal(weight.columns(step, 300).dequantize(), plain[:, step:])
    if weight.format.group_size is not None:
        for start, stop in ((0, step - 1), (2 * step, step), (0, 10 * 128 * step)):
            with pytest.raises(ValueError, match="no whole groups"):
                weight.columns(start, stop)
    both = QuantizedWeight.join([weight.rows(slice(0, 3)), weight.rows(slice(3, 7))])
    assert all(torch.equal(part, weight.tensors[key]) for key, part in both.tensors.items())
    stacked = QuantizedWeight.stack([weight, weight])
    assert torch.equal(stacked.dequantize(), torch.stack((plain, plain)))


def test_scales_of_different_dtypes_are_joined_without_loss() -> None:
    narrow, wide = random_weight("int4", 2, 64), random_weight("int4", 2, 64, seed=1)
    wide = QuantizedWeight(wide.format, 64, wide.values, wide.scales.float() + 1e-6)
    both = QuantizedWeight.join([narrow, wide])
    assert torch.equal(both.dequantize(), torch.cat((narrow.dequantize(), wide.dequantize())))


def test_orders_that_differ_cannot_be_joined() -> None:
    one, other = (random_weight("int4", 2, 64, order=True, seed=seed) for seed in (0, 1))
    assert QuantizedWeight.can_join([one, one])
    assert not QuantizedWeight.can_join([one, other])
    assert not QuantizedWeight.can_join([one, random_weight("int4", 2, 64)])
    assert not QuantizedWeight.can_join([one, random_weight("int8", 2, 64)])
    assert not QuantizedWeight.can_join([random_weight("int4", 2, k) for k in (100, 99)])
    with pytest.raises(ValueError, match="another order"):
        one.columns(0, 32)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("values", lambda tensor: tensor[:, :-1]),
        ("scales", lambda tensor: tensor[:-1]),
        ("zeros", lambda tensor: tensor[:, :1]),
        ("zeros", lambda tensor: None),
        ("values", lambda tensor: tensor.to(torch.int8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, change: object) -> None:
    weight = random_weight("int4-g32-asym", 4, 96)
    parts = {name: getattr(weight, name) for name in ("values", "scales", "zeros")}
    parts[part] = change(parts[part])  # type: ignore[operator]
    with pytest.raises(ValueError, match=part):
        QuantizedWeight(weight.format, 96, **parts).check()


def test_mxfp4_of_published_files() -> None:
    blocks = torch.randint(256, (3, 5, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 5, 2), dtype=torch.uint8)
    weight = mxfp4_weight(blocks, scales)
    assert weight.shape == (3, 5, 64)
    assert torch.equal(weight.dequantize(torch.bfloat16), dequantize_mxfp4(blocks, scales))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_linears_multiply_by_the_dequantized_weight(name: str, bias: bool) -> None:
    weight, x = random_weight(name, 9, 67, order=True), torch.randn(2, 3, 67)
    linear = QuantizedLinear(weight, torch.randn(9) if bias else None)
    seen = round_activations(x) if weight.format.dynamic else x
    assert torch.equal(linear(x), F.linear(seen, weight.dequantize(), linear.bias))
    assert linear.weight_bytes == weight.num_bytes
    assert torch.equal(linear.quantized.dequantize(), weight.dequantize())
    assert all(not parameter.requires_grad for parameter in linear.parameters())


@pytest.mark.parametrize("name", ["int8", "int4-g32-asym", "mxfp4", "fp8"])
def test_experts_multiply_by_the_dequantized_weights(name: str) -> None:
    weight, x = random_weight(name, 4, 9, 67), torch.randn(10, 67)
    ends, bias = torch.tensor([3, 3, 7, 8]), torch.randn(4, 9)
    linear = QuantizedGroupedLinear(weight, bias)
    expected = grouped_linear_reference(x, weight.dequantize(), bias, ends)
    torch.testing.assert_close(linear(x, ends)[:8], expected[:8], rtol=1e-4, atol=1e-4)


def test_embeddings_look_up_and_dequantize() -> None:
    weight = random_weight("int8", 50, 17)
    tokens = torch.tensor([[3, 49], [0, 3]])
    found = QuantizedEmbedding(weight, torch.bfloat16)(tokens)
    assert torch.equal(found, weight.dequantize(torch.bfloat16)[tokens])


def test_activations_are_rounded_token_by_token() -> None:
    x = torch.randn(5, 64) * torch.tensor([1e-20, 1e-3, 1.0, 1e4, 0.0]).unsqueeze(1)
    rounded = round_activations(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - x).abs() <= step / 2 * 1.001).all()
    assert torch.equal(rounded[2:3], round_activations(x[2:3]))
