"""Layouts of others, read bit for bit: what is read equals (q - zero) * scale of the numbers that
went in. By hand, once, also compared with AutoGPTQ's QuantLinear, AutoAWQ's dequantize_gemm,
compressed-tensors 0.20, bitsandbytes 0.50 and the fp8 and mxfp4 of transformers 5.23: equal.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import (
    AWQ,
    BNB,
    FP8,
    GPTQ,
    awq_parts,
    compressed,
    gptq_parts,
    in_groups,
    named,
    nf4_parts,
    opened,
    packed_columns,
    packed_rows,
    plain,
    read,
    some_numbers,
    some_scales,
    state,
)
from torch import Tensor

from quantize.readers import mxfp4_weight

# -- bytes that were worked out by hand --


def test_numbers_of_three_bits_are_octal_digits() -> None:
    """32 of them fill three words: a number may begin in one and end in the next."""
    digits = "76543210012345677061524324601357"
    stream = int(digits, 8)
    low, middle, high = (stream >> shift & 0xFFFFFFFF for shift in (0, 32, 64))
    column = [word - 2**32 if word >= 2**31 else word for word in (low, middle, high)]
    parts = {
        "qweight": torch.tensor(column, dtype=torch.int32).unsqueeze(1).repeat(1, 32),
        "qzeros": torch.zeros(1, 3, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }
    settings = GPTQ | {"bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2"}
    expected = torch.tensor([float(digit) for digit in reversed(digits)])
    weight = read(settings, parts)
    assert weight.format.name == "int3-row-asym"
    assert torch.equal(weight.dequantize(), expected.repeat(32, 1))


@pytest.mark.parametrize(("version", "zero"), [("gptq", 8.0), ("gptq_v2", 7.0)])
def test_a_gptq_word_by_hand(version: str, zero: float) -> None:
    """0x76543210 is a column of 0 to 7. Zeros of 7 mean 8 in the older format."""
    parts = {
        "qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    weight = read(GPTQ | {"checkpoint_format": version}, parts).dequantize()
    expected = torch.tensor([(q - zero) * 0.5 for q in range(8)])
    assert torch.equal(weight, expected.repeat(8, 1))


def test_an_awq_word_by_hand() -> None:
    """From the lowest bits on, a word holds rows 0, 2, 4, 6, 1, 3, 5, 7."""
    parts = {
        "qweight": torch.full((8, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        "scales": torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]], dtype=torch.float16),
    }
    weight = read(AWQ, parts).dequantize()
    assert weight[:, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 12]
    assert torch.equal(weight, weight[:, :1].repeat(1, 8))


def test_a_compressed_word_by_hand() -> None:
    """0x76543210 is columns -8 to -1: packed numbers have 8 added."""
    parts = {
        "weight_packed": torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32),
        "weight_scale": torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 16]),
    }
    weight = read(compressed({"num_bits": 4, "strategy": "group", "group_size": 8}), parts)
    # -0x01234568 is 0xFEDCBA98: 8 to 15, less 8.
    low = [(q - 8) * 0.5 for q in range(8)]
    assert weight.dequantize().tolist() == [low + [q * 2.0 for q in range(8)]]


def test_an_mxfp4_byte_by_hand() -> None:
    """0x72 is code 2 (1.0), then code 7 (6.0); an exponent of 128 doubles."""
    blocks = torch.full((1, 2, 16), 0x72, dtype=torch.uint8)
    weight = mxfp4_weight(blocks, torch.tensor([[128, 126]], dtype=torch.uint8))
    assert weight.shape == (1, 64)
    assert weight.dequantize().tolist() == [[2.0, 12.0] * 16 + [0.5, 3.0] * 16]


def test_mxfp4_keeps_experts_apart() -> None:
    blocks = torch.randint(0, 256, (3, 4, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (3, 4, 2), dtype=torch.uint8)
    found = mxfp4_weight(blocks, scales).dequantize()
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    for e, n, k in ((0, 0, 0), (1, 3, 33), (2, 2, 63), (2, 1, 30)):
        byte = int(blocks[e, n, k // 32, k % 32 // 2])
        code = byte >> 4 if k % 2 else byte & 15
        assert found[e, n, k] == values[code] * 2.0 ** (int(scales[e, n, k // 32]) - 127)


# -- GPTQ --


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (64, None), (96, 64), (32, 8)])
def test_gptq(bits: int, version: str, symmetric: bool, columns: int, size: int | None) -> None:
    groups = in_groups(columns, size)
    shape = (32, groups[-1] + 1)
    numbers, scales = some_numbers(32, columns, bits), some_scales(*shape)
    zeros = torch.full(shape, 2 ** (bits - 1)) if symmetric else torch.randint(1, 2**bits, shape)
    parts = gptq_parts(numbers, scales, zeros, bits, version == "gptq_v2")
    parts["g_idx"] = torch.tensor(groups, dtype=torch.int32)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size or -1, "sym": symmetric}
    if symmetric:  # where no zero is 0, it makes no difference who subtracted the one
        settings["meta"] = {"quantizer": ["optimum:1.24", "gptqmodel:5.0"]}
    weight = read(settings | {"format": version, "pack_dtype": "int32"}, parts)
    assert weight.shape == (32, columns)
    assert weight.format.has_zeros is not symmetric and weight.order is None
    assert (weight.format.bits, weight.format.group_size) == (bits, size)
    assert torch.equal(weight.dequantize(), plain(numbers, scales, zeros, groups))


@pytest.mark.parametrize("columns", [64, 60])
def test_gptq_columns_in_the_order_of_activations(columns: int) -> None:
    """Groups were filled in another order; sorting the columns by group loses nothing. The last
    group may be short.
    """
    order = torch.randperm(columns)
    groups = torch.empty(columns, dtype=torch.int32)
    groups[order] = torch.arange(columns, dtype=torch.int32) // 16
    numbers, scales = some_numbers(32, columns, 4), some_scales(32, 4)
    zeros = torch.randint(1, 16, (32, 4))
    parts = gptq_parts(numbers, scales, zeros, 4) | {"g_idx": groups}
    files = opened(GPTQ | {"group_size": 16, "desc_act": True}, named(parts))
    weight = files.quantized("m.weight")
    assert weight.order is not None
    expected = plain(numbers, scales, zeros, groups.tolist())
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(files.tensor("m.weight"), expected)
    assert weight.order.tolist() == sorted(range(columns), key=lambda k: (int(groups[k]), k))


@pytest.mark.parametrize("method", ["gptq", "compressed"])
def test_groups_of_unequal_size_are_dequantized(method: str) -> None:
    groups = torch.tensor([0] * 9 + [1] * 7, dtype=torch.int32)
    numbers, scales, zeros = some_numbers(8, 16, 4), some_scales(8, 2), some_numbers(8, 2, 4)
    if method == "gptq":
        parts = gptq_parts(numbers, scales, zeros, 4) | {"g_idx": groups}
        files = opened(GPTQ, named(parts))
    else:
        parts = {"weight_packed": packed_rows(numbers, 4), "weight_scale": scales}
        parts |= {"weight_zero_point": packed_columns(zeros, 4), "weight_g_idx": groups}
        weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}
        files = opened(compressed(weights), named(parts))
    assert files.format("m.weight") is None
    assert "not equally large: m.weight" in files.notes[0]
    assert torch.equal(files.tensor("m.weight"), plain(numbers, scales, zeros, groups.tolist()))


def test_group_sizes_without_a_format_are_dequantized() -> None:
    numbers, scales, zeros = some_numbers(8, 96, 4), some_scales(8, 2), some_numbers(8, 2, 4)
    for settings, parts in (
        (GPTQ, gptq_parts(numbers, scales, zeros, 4)),
        (AWQ, awq_parts(numbers, scales, zeros)),
    ):
        files = opened(settings | {"group_size": 48}, named(parts))
        assert files.format("m.weight") is None and files.formats == {"m.weight": None}
        assert files.notes == (
            "1 weights are dequantized, because no format here has groups of 48 columns: m.weight",
        )
        expected = plain(numbers, scales, zeros, in_groups(96, 48))
        assert torch.equal(files.tensor("m.weight"), expected)


@pytest.mark.parametrize(("tool", "carries"), [("auto_gptq:0.7", False), ("gptqmodel:1.4", True)])
def test_a_gptq_zero_of_nought(tool: str, carries: bool) -> None:
    """The older format keeps 0 - 1: AutoGPTQ's readers add the one to each number; GPTQModel
    subtracted it from the whole word, where it borrowed from the next number.
    """
    zeros = torch.tensor([[3, 0, 5, 0, 0, 7, 15, 0]])  # [G, N]
    word = sum(zero << 4 * place for place, zero in enumerate(zeros[0].tolist()))
    if carries:
        word = (word - 0x11111111) % 2**32
    else:
        word = sum((zero - 1) % 16 << 4 * place for place, zero in enumerate(zeros[0].tolist()))
    parts = gptq_parts(torch.zeros(8, 8, dtype=torch.long), some_scales(8, 1), zeros.t(), 4)
    parts["scales"] = torch.ones(1, 8, dtype=torch.float16)
    parts["qzeros"] = torch.tensor([[word - 2**32 if word >= 2**31 else word]], dtype=torch.int32)
    weight = read(GPTQ | {"meta": {"quantizer": [tool]}}, parts).dequantize()
    assert weight[:, 0].tolist() == [-3, 0, -5, 0, 0, -7, -15, 0]


def test_gptq_that_does_not_say_whether_it_is_symmetric() -> None:
    numbers, scales, zeros = some_numbers(8, 16, 4), some_scales(8, 2), some_numbers(8, 2, 4)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    weight = read(settings, gptq_parts(numbers, scales, zeros, 4))
    assert torch.equal(weight.dequantize(), plain(numbers, scales, zeros, in_groups(16, 8)))


def test_gptq_settings_of_single_modules() -> None:
    numbers, scales, zeros = some_numbers(8, 16, 8), some_scales(8, 1), some_numbers(8, 1, 8)
    settings = GPTQ | {
        "dynamic": {r"-:.*\.gate": {}, r"+:.*\.down$": {"bits": 8, "group_size": -1}}
    }
    tensors = named(gptq_parts(numbers, scales, zeros, 8), "layer.down")
    files = opened(settings, tensors | {"layer.gate.weight": torch.ones(2, 2)})
    assert files.format("layer.down.weight").name == "int8-asym"
    assert files.format("layer.gate.weight") is None
    expected = plain(numbers, scales, zeros, [0] * 16)
    assert torch.equal(files.tensor("layer.down.weight"), expected)
    with pytest.raises(ValueError, match=r"x\.gate is quantized, though `dynamic`"):
        opened(settings, named(gptq_parts(numbers, scales, zeros, 8), "x.gate"))


def test_gptq_rows_that_fill_no_word() -> None:
    """N = 12: zeros fill one and a half words, and the rest is padding."""
    numbers, scales, zeros = some_numbers(12, 16, 4), some_scales(12, 2), some_numbers(12, 2, 4)
    weight = read(GPTQ, gptq_parts(numbers, scales, zeros, 4))
    assert torch.equal(weight.dequantize(), plain(numbers, scales, zeros, in_groups(16, 8)))


# -- AWQ --


@pytest.mark.parametrize(("columns", "size"), [(64, 32), (40, None), (96, 64), (33, 8)])
def test_awq(columns: int, size: int | None) -> None:
    groups = in_groups(columns, size)
    numbers, zeros = some_numbers(24, columns, 4), some_numbers(24, groups[-1] + 1, 4)
    scales = some_scales(24, groups[-1] + 1)
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": size or -1, "version": "GEMM"}
    weight = read(settings, awq_parts(numbers, scales, zeros))
    assert weight.format.has_zeros and weight.format.group_size == size
    assert torch.equal(weight.dequantize(), plain(numbers, scales, zeros, groups))


# -- compressed-tensors --


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "size"), [(64, 32), (40, None), (45, None)])
def test_packed(bits: int, symmetric: bool, columns: int, size: int | None) -> None:
    groups, middle = in_groups(columns, size), 2 ** (bits - 1)
    numbers = some_numbers(20, columns, bits)
    scales = some_scales(20, groups[-1] + 1, torch.bfloat16)
    zeros = None if symmetric else some_numbers(20, groups[-1] + 1, bits)
    parts = {"weight_packed": packed_rows(numbers, bits), "weight_scale": scales}
    parts["weight_shape"] = torch.tensor([20, columns])
    if zeros is not None:
        parts["weight_zero_point"] = packed_columns(zeros, bits)
        zeros = zeros - middle
    weights = {"num_bits": bits, "strategy": "group" if size else "channel", "group_size": size}
    settings = compressed(weights | {"symmetric": symmetric}, format="pack-quantized")
    weight = read(settings, parts)
    assert weight.format.has_zeros is not symmetric
    assert weight.format.bits == (8 if bits > 4 else bits)
    assert torch.equal(weight.dequantize(), plain(numbers - middle, scales, zeros, groups))
    if columns % 2 and bits <= 4:
        assert (weight.values[:, -1] >> 4 == 8).all()  # a half byte that is over


def test_packed_zeros_of_older_files_are_plain() -> None:
    numbers, scales = some_numbers(8, 16, 4), some_scales(8, 2)
    zeros = torch.randint(-8, 8, (8, 2), dtype=torch.int8)
    parts = {"weight_packed": packed_rows(numbers, 4), "weight_scale": scales}
    parts |= {"weight_shape": torch.tensor([8, 16]), "weight_zero_point": zeros}
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}
    weight = read(compressed(weights), parts)
    assert torch.equal(weight.dequantize(), plain(numbers - 8, scales, zeros, in_groups(16, 8)))


@pytest.mark.parametrize("used", [True, False])
def test_packed_columns_in_the_order_of_activations(used: bool) -> None:
    groups = in_groups(32, 8)
    if used:
        groups = [groups[int(place)] for place in torch.randperm(32)]
    numbers, scales = some_numbers(8, 32, 4), some_scales(8, 4)
    parts = {"weight_packed": packed_rows(numbers, 4), "weight_scale": scales}
    parts["weight_g_idx"] = torch.tensor(groups if used else [-1] * 32, dtype=torch.int32)
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "actorder": "group"}
    weight = read(compressed(weights), parts)
    assert (weight.order is not None) is used
    assert torch.equal(weight.dequantize(), plain(numbers - 8, scales, None, groups))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_one_integer_each(strategy: str, symmetric: bool) -> None:
    numbers = torch.randint(-128, 128, (12, 40), dtype=torch.int8)
    shape = {"tensor": (1,), "channel": (12, 1), "group": (12, 5), "block": (3, 5)}[strategy]
    scales = (torch.rand(shape) + 0.1).half()
    zeros = torch.randint(-9, 9, shape, dtype=torch.int8)
    weights: dict[str, Any] = {"num_bits": 8, "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": 8} if strategy == "group" else {}
    weights |= {"block_structure": "5x8"} if strategy == "block" else {}
    parts = {"weight": numbers, "weight_scale": scales}
    parts |= {} if symmetric else {"weight_zero_point": zeros}
    weight = read(compressed(weights, format="int-quantized"), parts)

    def of_rows(numbers: Tensor) -> Tensor:
        if strategy == "block":
            return torch.stack([numbers[n // 5] for n in range(12)])
        return numbers.expand(12, 1) if strategy == "tensor" else numbers

    size = 8 if strategy in ("group", "block") else None
    assert weight.format.group_size == size and weight.format.has_zeros is not symmetric
    kept = None if symmetric else of_rows(zeros)
    assert torch.equal(
        weight.dequantize(), plain(numbers, of_rows(scales), kept, in_groups(40, size))
    )


def test_patterns_choose_among_groups() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    settings = compressed({}) | {
        "config_groups": {
            "group_0": group(4, "Linear", r"re:.*proj$"),
            "group_1": group(8, r"re:.*down_proj$"),
            "group_2": group(2, "a.b.down_proj"),
            "kv": {"targets": ["LlamaAttention"], "weights": None},
        }
    }
    tensors = {}
    for name, bits in (("a.q_proj", 4), ("a.down_proj", 8), ("a.b.down_proj", 2)):
        parts = {"weight_packed": packed_rows(some_numbers(4, 16, bits), bits)}
        parts |= {"weight_scale": some_scales(4, 1), "weight_shape": torch.tensor([4, 16])}
        tensors |= named(parts, name)
    formats = {name: form.name for name, form in opened(settings, tensors).formats.items()}
    assert formats == {
        "a.q_proj.weight": "int4-row",
        "a.down_proj.weight": "int8",
        "a.b.down_proj.weight": "int2-row",
    }


def test_the_only_group_is_meant_whatever_class_it_names() -> None:
    settings = compressed({"num_bits": 8, "strategy": "channel"})
    settings["config_groups"]["group_0"]["targets"] = ["QuantizedLinear"]
    parts = {"weight": torch.ones(4, 4, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    assert read(settings, parts).format.name == "int8"
    settings["config_groups"]["group_1"] = {"targets": ["Other"], "weights": {"num_bits": 8}}
    with pytest.raises(ValueError, match="m is quantized, and no target of config_groups"):
        read(settings, parts)


def test_what_is_not_done_is_said() -> None:
    settings = compressed({"num_bits": 8, "strategy": "channel"}, kv_cache_scheme={"num_bits": 8})
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    tensors = named(
        {"weight": torch.ones(4, 4, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    )
    tensors |= {"m.input_scale": torch.ones(1), "m.input_zero_point": torch.zeros(1)}
    files = opened(settings, tensors | {"a.k_scale": torch.ones(1), "m.bias": torch.ones(4)})
    assert files.names == {"m.weight", "m.bias"}
    assert "activations keep their precision" in files.notes[0]
    assert "KV cache is not quantized" in files.notes[1] and len(files.notes) == 2


# -- fp8 --


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("rows_columns", [(32, 48), (37, 41), (5, 7)])
def test_fp8_in_blocks(method: str, rows_columns: tuple[int, int]) -> None:
    """The last blocks may be short."""
    rows, columns = rows_columns
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.1
    if method == "fp8":
        parts = {"weight": values, "weight_scale_inv": scales}
        weight = read(FP8 | {"weight_block_size": [16, 16]}, parts)
    else:
        form = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}
        weight = read(compressed(form), {"weight": values, "weight_scale": scales})
    assert weight.format.name == "fp8-g16"
    each_row = torch.stack([scales[n // 16] for n in range(rows)])
    expected = plain(values.float(), each_row, None, in_groups(columns, 16))
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (FP8 | {"activation_scheme": "static"}, torch.float32),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, torch.float32),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, torch.float32),
        ("compressed", torch.bfloat16),
    ],
)
def test_fp8_of_rows_and_of_the_whole(
    settings: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if settings == "compressed":
        form = {"num_bits": 8, "type": "float", "strategy": "channel" if 6 in shape else "tensor"}
        settings = compressed(form, format="float-quantized")
    values, scales = torch.randn(6, 20).to(torch.float8_e4m3fn), (torch.rand(shape) + 0.1).to(dtype)
    tensors = named({"weight": values, "weight_scale": scales, "input_scale": torch.ones(1)})
    files = opened(settings, tensors)
    assert files.names == {"m.weight"}
    weight = files.quantized("m.weight")
    assert weight.format.name == "fp8" and weight.scales.shape == (6, 1)
    each_row = scales.reshape(-1, 1).expand(6, 1)
    assert torch.equal(weight.dequantize(), plain(values.float(), each_row, None, [0] * 20))


def test_fp8_caches_are_not_read() -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    parts = {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}
    files = opened(settings, named(parts) | {"a.k_scale": torch.ones(1)})
    assert files.names == {"m.weight"} and "KV cache is not quantized" in files.notes[1]


def test_fp8_with_scales_that_are_exponents() -> None:
    values = torch.randn(8, 8).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25]]).to(torch.float8_e8m0fnu)
    settings = FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    weight = read(settings, {"weight": values, "weight_scale_inv": scales})
    assert torch.equal(weight.dequantize(), values.float() / 4)


def test_fp8_in_blocks_without_a_format() -> None:
    values, scales = torch.randn(8, 30).to(torch.float8_e4m3fn), torch.rand(4, 3)
    tensors = named({"weight": values, "weight_scale_inv": scales})
    files = opened(FP8 | {"weight_block_size": [2, 12]}, tensors)
    assert "groups of 12 columns" in files.notes[1]
    each_row = torch.stack([scales[n // 2] for n in range(8)])
    expected = plain(values.float(), each_row, None, in_groups(30, 12))
    assert torch.equal(files.tensor("m.weight"), expected)


# -- bitsandbytes --


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested: bool) -> None:
    """The first of two numbers is in the HIGH half of a byte; blocks go on into the next row."""
    parts, peaks = nf4_parts(nested)
    files = opened(BNB | {"bnb_4bit_quant_type": "nf4"}, named(parts))
    expected = []
    for place in range(15):
        byte = int(parts["weight"][place // 2, 0])
        code = byte & 15 if place % 2 else byte >> 4
        expected.append(float(parts["weight.quant_map"][code]) * peaks[place // 8])
    assert files.format("m.weight") is None and "values of nf4" in files.notes[0]
    assert files.names == {"m.weight"} and files.shape("m.weight") == (3, 5)
    assert torch.equal(files.tensor("m.weight").flatten(), torch.tensor(expected))


def test_eight_bits_of_bitsandbytes() -> None:
    """A weight is q * SCB / 127; SCB / 127 is rounded to float32."""
    values, peaks = torch.randint(-127, 128, (4, 6), dtype=torch.int8), torch.rand(4)
    parts = {"weight": values, "SCB": peaks, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    weight = read(BNB | {"load_in_8bit": True, "load_in_4bit": False}, parts)
    assert weight.format.name == "int8"
    expected = values.double() * peaks.double()[:, None] / 127
    assert ((weight.dequantize() - expected).abs() <= expected.abs() * 2**-22).all()
    assert torch.equal(weight.values, values)


def test_deepseek_as_it_is_published(shared_data: Path) -> None:
    raw = json.loads((shared_data / "configs" / "deepseek-r1.json").read_text())
    values, scales = torch.randn(130, 200).to(torch.float8_e4m3fn), torch.rand(2, 2)
    weight = read(raw["quantization_config"], {"weight": values, "weight_scale_inv": scales})
    assert weight.format.name == "fp8-g128"
    assert weight.dequantize()[129, 199] == values.float()[129, 199] * scales[1, 1]


@pytest.mark.parametrize("change", [{"nested_blocksize": 0}, {"nested_offset": None}])
def test_a_damaged_state_of_nested_absmax_is_refused(change: dict[str, Any]) -> None:
    """A block of no numbers divided by zero, a missing offset was a KeyError."""
    parts, _ = nf4_parts(nested=True)
    [key] = [name for name in parts if "quant_state" in name]
    values = json.loads(bytes(parts[key].tolist())) | change
    parts[key] = state(**{name: value for name, value in values.items() if value is not None})
    with pytest.raises(ValueError, match="nested_blocksize and nested_offset"):
        opened(BNB, named(parts))
