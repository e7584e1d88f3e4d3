"""The Triton kernels of linears, in Triton's interpreter: against float64, against each other, and
their PTX against what it must mean. tests/test_gpu.py has the same on a device.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401 (before any kernel)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from quantize.formats import Format, QuantizedWeight, quantized_weight
from quantize.grouped import GroupedLinear
from quantize.kernels import triton_configs
from quantize.kernels.call import Call
from quantize.kernels.cuda import (
    ACTIVATIONS,
    CudaLinear,
    CudaQuantizedLinear,
    NormSpec,
    fused_linear,
    normed,
    triton_linear_reference,
)
from quantize.kernels.triton_configs import (
    Device,
    LinearConfig,
    default_config,
    linear_config,
    stages_that_fit,
)
from quantize.kernels.triton_launch import dequantized, launch
from quantize.kernels.words import PackedWords, assembly, pack_words, unpack_words
from quantize.linear import QuantizedGroupedLinear, QuantizedLinear, round_activations
from quantize.mxfp4 import CODES
from quantize.packing import _packed_for_cuda
from quantize.rounding import round_to_nearest

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTS = (16, 1, 2, 3, 5, 8)  # rows of x
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative errors of one rounding to a dtype, with room for a second one.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
FORMATS = (
    "int8 int8-g16 int8-g64 int8-g128 int8-asym int4-g16 int4-g32 int4-g64 int4-g128 int4-g512 "
    "int4-row int4-g32-asym int4-g128-asym int3 int2 fp8 fp8-g64 mxfp4"
).split()


def close(found: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
    tolerance = CLOSE[found.dtype] if tolerance is None else tolerance
    assert found.shape == exact.shape
    error = (found.double() - exact.double()).norm() / exact.double().norm()
    assert error < tolerance, float(error)


def plain_linear(num_rows: int, num_columns: int, dtype: torch.dtype) -> CudaLinear:
    return CudaLinear(nn.Linear(num_columns, num_rows, dtype=dtype).requires_grad_(False))


def random_weight(form: str, num_rows: int, num_columns: int) -> QuantizedWeight:
    weight = torch.randn(num_rows, num_columns) / num_columns**0.5
    return round_to_nearest(weight, Format.parse(form), search=False)


def norm_of(kind: str | None, num_columns: int, dtype: torch.dtype) -> NormSpec | None:
    if kind is None:
        return None
    weight, bias = torch.randn(2, num_columns).to(dtype)
    return NormSpec(weight, bias if kind == "layer" else None, 1e-5, kind == "layer", "off" in kind)


def same_rows(
    x: Tensor,
    linear: nn.Module,
    residual: Tensor | None = None,
    counts: tuple[int, ...] = (16, 1, 5),
    **how: Any,
) -> Tensor:
    """The result for x, after a check that no row's bits depend on the others."""
    results = []
    for count in counts:
        own = None if residual is None else residual[-count:]
        results.append(fused_linear(x[-count:], linear, residual=own, **how))
    for result in results:
        assert torch.equal(result, results[0][-len(result) :])
    return results[0]


# -- plain weights --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(48, 256), (35, 77), (70, 1030)], ids=str)
def test_plain_linears(size: tuple[int, int], dtype: torch.dtype) -> None:
    linear, x = plain_linear(*size, dtype), torch.randn(16, size[1]).to(dtype)
    y = same_rows(x, linear, counts=COUNTS)
    close(y, x.double() @ linear.weight.double().T + linear.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "rms_offset", "layer"])
def test_norms_before(kind: str, dtype: torch.dtype) -> None:
    linear, norm = plain_linear(34, 1100, dtype), norm_of(kind, 1100, dtype)
    assert norm is not None
    x = (torch.randn(16, 1100) * torch.logspace(-2, 2, 16)[:, None] + 0.1).to(dtype)
    y = same_rows(x, linear, norm=norm)
    before = normed(x, kind, norm.weight, norm.bias, norm.eps)
    close(y, before.double() @ linear.weight.double().T + linear.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(filter(None, ACTIVATIONS)))
def test_activations_and_gates_after(name: str, dtype: torch.dtype) -> None:
    linear, x = plain_linear(44, 90, dtype), torch.randn(16, 90).to(dtype) * 3
    sums = x.double() @ linear.weight.double().T + linear.bias.double()
    close(same_rows(x, linear, activation=name), ACTIVATIONS[name](sums))
    gates, ups = sums.chunk(2, dim=1)
    close(same_rows(x, linear, gate=name), ACTIVATIONS[name](gates) * ups)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_are_added(dtype: torch.dtype) -> None:
    linear, x = plain_linear(35, 90, dtype), torch.randn(16, 90).to(dtype)
    residual = torch.randn(16, 35).to(dtype)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    y = same_rows(x, linear, residual, multiplier=0.22)
    close(y, residual.double() + 0.22 * exact)
    into = residual.clone()
    assert fused_linear(x, linear, residual=into, multiplier=0.22, out=into) is into
    assert torch.equal(into, y)


def test_rows_come_in_any_shape_and_number() -> None:
    linear, x = plain_linear(24, 32, torch.float32), torch.randn(5, 7, 32)
    exact = x @ linear.weight.T + linear.bias
    torch.testing.assert_close(linear(x), exact)  # 35 rows: a matrix product
    torch.testing.assert_close(linear(x[:2]), exact[:2])
    torch.testing.assert_close(linear(x.transpose(0, 1)[:, 1]), exact.transpose(0, 1)[:, 1])
    assert linear(x[:0]).shape == (0, 7, 24)
    out = torch.full((5, 24, 2), torch.nan)[:, :, 0]  # not contiguous
    torch.testing.assert_close(fused_linear(x[:, 0], linear, out=out), exact[:, 0])


# -- quantized weights --


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_linears(form: str) -> None:
    sizes = [(32, 512), (37, 333), (20, 70)]
    for (num_rows, num_columns), dtype in zip(sizes, DTYPES, strict=True):
        weight = random_weight(form, num_rows, num_columns)
        linear = CudaQuantizedLinear(weight, torch.randn(num_rows).to(dtype))
        x = torch.randn(16, num_columns).to(dtype)
        exact = x.double() @ weight.dequantize().double().T + linear.bias.double()
        close(same_rows(x, linear), exact)


@pytest.mark.parametrize("form", ["int8", "int4-g32", "int4-g64-asym", "fp8-g32"])
def test_quantized_linears_between_norm_and_residual(form: str) -> None:
    weight = random_weight(form, 70, 300)
    bias, x, residual = torch.randn(70), torch.randn(16, 300), torch.randn(16, 35)
    linear, plain = CudaQuantizedLinear(weight, bias), weight.dequantize().double()
    norm = norm_of("layer", 300, torch.float32)
    assert norm is not None
    y = same_rows(x, linear, residual, norm=norm, gate="silu", multiplier=0.5)
    sums = normed(x.double(), "layer", norm.weight.double(), norm.bias.double(), norm.eps)  # type: ignore[union-attr]
    gates, ups = (sums @ plain.T + bias.double()).chunk(2, dim=1)
    close(y, residual.double() + 0.5 * ACTIVATIONS["silu"](gates) * ups)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [(16, 256), (21, 333)], ids=str)
def test_words_come_back_bit_for_bit(form: str, size: tuple[int, int]) -> None:
    weight = random_weight(form, *size)
    linear = CudaQuantizedLinear(weight)
    for name, tensor in weight.tensors.items():
        found = linear.canonical().tensors[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.contiguous().view(torch.uint8), tensor.view(torch.uint8)), name
    for dtype in DTYPES:
        expected = weight.dequantize(dtype)
        packed = PackedWords(linear.values, linear.scales, linear.zeros)
        assert torch.equal(dequantized(weight.format, packed, *size, dtype), expected)
        assert torch.equal(linear.dequantize(dtype), expected)
    assert "weight" not in linear.state_dict() and list(linear.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    """As other people's checkpoints have them; zeros that no bfloat16 holds among them."""
    integers = torch.randint(-8, 8, (20, 160))
    scales = (torch.rand(20, 5) / 8 + 0.01).to(torch.float16).to(dtype)
    for zeros in (torch.randint(-8, 8, (20, 5)), torch.randn(20, 5).half()):
        form = Format.parse("int4-g32-asym")
        weight = quantized_weight(form, integers, scales, zeros.to(dtype))
        linear, x = CudaQuantizedLinear(weight), torch.randn(3, 160)
        close(linear(x), x.double() @ weight.dequantize().double().T)
        half = x.bfloat16()
        close(linear(half), half.double() @ weight.dequantize().double().T)
        for found, tensor in zip(
            linear.canonical().tensors.values(), weight.tensors.values(), strict=True
        ):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_columns_in_another_order_and_rounded_activations() -> None:
    order = torch.randperm(128)
    weight = replace(random_weight("int4-g32-dynamic", 24, 128), order=order)
    linear, x = CudaQuantizedLinear(weight), torch.randn(4, 128)
    norm = norm_of("rms", 128, torch.float32)
    assert norm is not None
    close(linear(x), round_activations(x) @ weight.dequantize().T)
    before = round_activations(normed(x, "rms", norm.weight, None, norm.eps))
    close(fused_linear(x, linear, norm=norm), before @ weight.dequantize().T)
    assert torch.equal(linear.canonical().order, order)  # type: ignore[arg-type]


def test_more_rows_are_a_product_with_the_plain_weight() -> None:
    weight = random_weight("int4-g32", 40, 100)
    linear, x = CudaQuantizedLinear(weight), torch.randn(2, 9, 100)
    torch.testing.assert_close(linear(x), x @ weight.dequantize().T)


# -- unpacking in PTX --


def run_ptx(lines: str, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """What `assembly`'s lines make of pairs of words, int64 [n] of 32 bits -> two floats each [n,
    2].
    """
    bits = {"$1": pairs, "$0": torch.zeros_like(pairs)}
    code = re.sub(r"\.reg[^;]*;|[{}]", "", lines)
    for line in filter(None, map(str.strip, code.split(";"))):
        name, arguments = line.split(" ", 1)
        to, *sources = [each.strip() for each in arguments.split(",")]
        values = [bits[each] if each in bits else torch.tensor(int(each, 0)) for each in sources]
        if name == "mov.b32":
            result = values[0]
        elif name == "shl.b32":
            result = values[0] << values[1]
        elif name == "shr.b32":
            result = values[0] >> values[1]
        elif name == "and.b32":
            result = values[0] & values[1]
        elif name == "lop3.b32":
            a, b, c, table = values
            result = (a & b | c) if table == 0xEA else (a & b ^ c)
            assert int(table) in (0xEA, 0x6A)
        else:
            assert name == {torch.bfloat16: "fma.rn.bf16x2", torch.float16: "fma.rn.f16x2"}[dtype]
            a, b, c = (halves(value, dtype).double() for value in values)
            whole = (a * b + c).to(dtype).view(torch.int16).long() & 0xFFFF
            result = whole[..., 0] | whole[..., 1] << 16
        bits[to] = result & 0xFFFFFFFF
    return halves(bits["$0"], dtype)


def halves(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    both = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1)
    return (both - (both >= 0x8000) * 0x10000).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "mxfp4"])
def test_assembly_unpacks_every_word(form: str, dtype: torch.dtype) -> None:
    """All words, each beside another one, in an emulator of the few instructions."""
    what = Format.parse(form)
    words = torch.arange(2**16)
    pairs = words | words[torch.randperm(2**16)] << 16
    lines = assembly(what, dtype)
    assert lines is not None and len(lines) == 16 // what.bits
    for part, line in enumerate(lines):
        codes = torch.stack((pairs & 0xFFFF, pairs >> 16), -1) >> part * what.bits
        codes &= 2**what.bits - 1
        if form == "int8":
            exact = codes.to(torch.uint8).view(torch.int8).double()
        elif form == "int4":
            exact = codes.double() - 8
        elif form == "fp8":
            exact = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
        else:
            exact = CODES.double()[codes]
        found = run_ptx(line, pairs, dtype).double()
        known = exact.isfinite()  # not fp8's NaN, which `supports` keeps away
        assert torch.equal(found[known], exact[known])
    assert assembly(what, torch.float32) is None


# -- configurations --


CONFIGS = [
    LinearConfig(16, 1, 1, 64, 1),
    LinearConfig(16, 8, 1, 32, 4, pad=16),
    LinearConfig(32, 4, 2, 64, 3, norm_inside=False),
    LinearConfig(64, 2, 4, 128, 2, pad=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("form", ["", "int4-g32", "int8"])
def test_every_configuration_computes_the_same(form: str, config: LinearConfig) -> None:
    """Also where several programs share the columns, some of which get none."""
    x, residual = torch.randn(16, 700), torch.randn(16, 35)
    norm, bias = torch.randn(700), torch.randn(70)
    packed = PackedWords(torch.randn(70, 700) / 26, torch.empty(0), None)
    if form:
        packed = pack_words(random_weight(form, 70, 700))
    scales = packed.scales if form else None
    rest = (packed.values, scales, packed.zeros, bias, "rms", norm, None, 1e-6)
    end = (0.5, "silu", True, 70, form)
    results = []
    for count in (16, 3, 1):
        call = Call(x[:count], *rest, residual[:count], *end)  # type: ignore[arg-type]
        results.append(torch.full((count, 35), torch.nan))
        launch(call, results[-1], config)
        assert torch.equal(results[0][:count], results[-1])
    close(results[0], triton_linear_reference(Call(x, *rest, residual, *end)), 1e-5)  # type: ignore[arg-type]


def test_a_norm_has_the_same_bits_inside_and_before() -> None:
    x, linear = torch.randn(3, 1100), plain_linear(20, 1100, torch.float32)
    arguments = (linear.weight, None, None, None, "layer", torch.randn(1100), torch.randn(1100))
    call = Call(x, *arguments, 1e-5, None, 1.0, "", False, 20, "")  # type: ignore[arg-type]
    inside, before = torch.empty(2, 3, 20).unbind()
    launch(call, inside, LinearConfig(16, 2, 1, 64, 2))
    launch(call, before, LinearConfig(16, 2, 1, 64, 2, norm_inside=False))
    assert torch.equal(inside, before)


def test_measured_configurations_come_first(tmp_path: Path, monkeypatch: Any) -> None:
    config = LinearConfig(64, 2, 4, 128, 2, False, 16)
    file = tmp_path / "configs.json"
    entry = {"int8 4096x4096": config.as_json}
    file.write_text(json.dumps({"how": "", "configs": {"NVIDIA H200": entry}}))
    monkeypatch.setattr(triton_configs, "FILE", file)
    triton_configs._tuned.cache_clear()
    assert linear_config("NVIDIA H200", "int8", 4096, 4096) == config
    for other in (("NVIDIA H100", "int8", 4096), ("NVIDIA H200", "int8", 2048)):
        assert linear_config(*other, 4096) == default_config(*other[1:], 4096)
    triton_configs._tuned.cache_clear()


def test_the_configurations_in_the_package_can_be_read() -> None:
    triton_configs._tuned.cache_clear()
    for device, entries in triton_configs._tuned().items():
        for key in entries:
            form, size = key.split(" ")
            num_rows, num_columns = map(int, size.split("x"))
            config = linear_config(device, form, num_rows, num_columns)
            assert config.rows % 16 == 0 and config.slices in (1, 2, 4, 8, 16)


def test_buffers_fit_into_the_shared_memory_of_any_device() -> None:
    """At most as many as were asked for, and beside each other where programs stand in line."""
    config = LinearConfig(16, 8, 1, 64, 6)
    large, small = Device("large", 132, 227 << 10), Device("small", 80, 99 << 10)
    for device, stage, once, programs, expected in (
        (large, 24 << 10, 0, 132, 6),  # 9 buffers would fit
        (large, 24 << 10, 0, 133, 5),  # 4 in half of it
        (large, 64 << 10, 0, 128, 4),
        (large, 64 << 10, 64 << 10, 128, 3),
        (small, 24 << 10, 0, 256, 2),
        (small, 200 << 10, 0, 1, 1),  # none: read where it is used
    ):
        assert stages_that_fit(config, stage, once, programs, device) == expected


# -- ops and modules --


@pytest.mark.parametrize("form", ["", "int4-g32-asym"])
def test_the_ops_are_proper(form: str) -> None:
    weight = random_weight(form, 32, 64) if form else None
    packed = (
        pack_words(weight) if weight else PackedWords(torch.randn(32, 64), torch.empty(0), None)
    )
    scales = packed.scales if form else None
    call = Call(torch.randn(2, 64), packed.values, scales, packed.zeros, torch.randn(32), "rms",
                torch.randn(64), None, 1e-5, None, 1.0, "silu", True, 32, form)  # fmt: skip
    torch.library.opcheck(torch.ops.quantize.triton_linear.default, tuple(call))
    out = torch.empty(2, 16)
    torch.library.opcheck(torch.ops.quantize.triton_linear_out.default, (*call, out))


def test_layers_share_a_compiled_graph() -> None:
    weights = [random_weight("int4-g32", 32, 64) for _ in range(2)]
    layers = [*(CudaQuantizedLinear(weight) for weight in weights)]
    counter = CompileCounterWithBackend("aot_eager")
    norm = NormSpec(torch.randn(64), None, 1e-5, False, False)
    run = torch.compile(
        lambda layer, x: fused_linear(x, layer, norm=norm, activation="silu"),
        backend=counter,
        fullgraph=True,
    )
    for layer in layers:
        for x in (torch.randn(1, 64), torch.randn(1, 64)):
            assert torch.equal(run(layer, x), fused_linear(x, layer, norm=norm, activation="silu"))
    assert counter.frame_count == 1


def test_modules_say_what_they_are() -> None:
    weight = random_weight("int4-g32", 32, 64)
    linear, plain = CudaQuantizedLinear(weight), nn.Linear(64, 32).requires_grad_(False)
    assert linear.weight_bytes == 32 * 64 // 2 // 64 * 128 + 4 * 32 * 2  # padded to 128 columns
    assert "int4-g32" in repr(linear) and linear.quantized.format == weight.format
    own = CudaLinear(plain)
    assert own.weight is plain.weight and own.weight_bytes == 32 * 64 * 4
    assert own.dequantize() is plain.weight
    assert own.dequantize(torch.float16).dtype == torch.float16


def test_what_is_packed_for_cuda() -> None:
    """By the function that `pack_linears` asks on a CUDA device."""
    half = nn.Linear(64, 32, dtype=torch.bfloat16)
    assert isinstance(_packed_for_cuda(half, torch.bfloat16), CudaLinear)
    assert _packed_for_cuda(nn.Linear(64, 32), torch.float32) is None
    assert _packed_for_cuda(GroupedLinear(2, 64, 32, False), torch.bfloat16) is None
    for form, is_packed in {"int8": True, "fp8": True, "int4-g8": False}.items():
        stored = QuantizedLinear(random_weight(form, 32, 64))
        found = _packed_for_cuda(stored, torch.bfloat16)
        assert isinstance(found, CudaQuantizedLinear) == is_packed
    experts = QuantizedWeight.stack([random_weight("int8", 32, 64)] * 2)
    assert _packed_for_cuda(QuantizedGroupedLinear(experts), torch.bfloat16) is None
    spoilt = random_weight("fp8", 32, 64)
    spoilt.values[3, 5] = torch.nan
    assert not CudaQuantizedLinear.supports(spoilt, torch.bfloat16)


def test_what_does_not_fit_together_is_refused() -> None:
    linear, x = plain_linear(33, 64, torch.float32), torch.randn(2, 64)
    quantized = CudaQuantizedLinear(random_weight("int8", 32, 64))
    with pytest.raises(ValueError, match="x has 60 columns; the weight has 64"):
        quantized(x[:, :60])
    with pytest.raises(ValueError, match="one dtype is needed"):
        linear(x.half())
    with pytest.raises(ValueError, match="exclude each other"):
        fused_linear(x, linear, gate="silu", activation="relu")
    with pytest.raises(ValueError, match=r"'swish' is unknown; use one of: silu, gelu"):
        fused_linear(x, linear, activation="swish")
    with pytest.raises(ValueError, match="halves of 33 rows"):
        fused_linear(x, linear, gate="silu")
    with pytest.raises(ValueError, match=r"residual has shape \[2, 32\]; \[2, 33\] is needed"):
        fused_linear(x, linear, residual=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="Identity has no kernel for CUDA"):
        fused_linear(x, nn.Identity())


def test_without_triton_the_twins_run(monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    weight = random_weight("int4-g32-asym", 32, 64)
    linear, x = CudaQuantizedLinear(weight), torch.randn(3, 64)
    assert torch.equal(linear(x), x @ weight.dequantize().T)
    assert not CudaQuantizedLinear.supports(weight, torch.float32)
    packed = PackedWords(linear.values, linear.scales, linear.zeros)
    unpacked = unpack_words(weight.format, packed, 32, 64)
    assert torch.equal(unpacked.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("form", "field"), [("bf16", "splits"), ("int4-g32", "norm_inside")])
def test_tuning_writes_what_is_read(form: str, field: str, tmp_path: Path) -> None:
    """The script's plumbing, interpreted; its times mean nothing."""
    file = tmp_path / "configs.json"
    command = [sys.executable, "bench/tune.py", "--device", "cpu", "--shapes", "16x64"]
    command += ["--formats", form, "--rows", "1", "--rounds", "1", "--out", str(file)]
    ran = subprocess.run(
        [*command, "--fields", field],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": ".", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    [(key, entry)] = json.loads(file.read_text())["configs"]["cpu"].items()
    assert key == ("bfloat16 16x64" if form == "bf16" else "int4-g32 16x64")
    assert json.loads(ran.stdout.splitlines()[-1])["configs"] == {key: entry}
    assert LinearConfig(**entry).rows == 16


def test_hopper_takes_every_kernel() -> None:
    """Compiled, which needs no GPU: no instruction is refused; by default nothing spills and all
    has room in shared memory.
    """
    ran = subprocess.run(
        [sys.executable, "tests/compile_linears.py"],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    kernels = [json.loads(line) for line in ran.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    assert names == {"plain_linear", "packed_linear", "combine", "norm_rows", "dequantize"}
    for kernel in kernels:
        if "linear" in kernel["kernel"] and kernel["default"]:
            assert kernel["stack"] == 0 and kernel["shared"] <= 227 << 10, kernel
            assert "float32" in str(kernel["case"]) or kernel["mma.sync"], kernel
