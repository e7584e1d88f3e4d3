"""The CPU kernels of quantized linears against what they mean: packing is exact, every op equals
its plain PyTorch twin and F.linear with the dequantized weight, and where nothing can be built the
twins run.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quantize.formats import Format, QuantizedWeight, quantized_weight
from quantize.kernels.build import LINEAR, loaded_openmp
from quantize.kernels.cpu import (
    PackedQuantizedGroupedLinear,
    PackedQuantizedLinear,
    packed_quantized_grouped_linear_reference,
    packed_quantized_linear_reference,
)
from quantize.linear import QuantizedLinear

FORMATS = (
    "int8 int8-g64 int8-g16-asym int4-g32 int4-g128 int4-g8 int4-row int4-g32-asym int3-g32 mxfp4 "
    "int8-dynamic int8-g64-dynamic int4-g32-dynamic int4-g32-asym-dynamic"
).split()
DTYPES = (torch.bfloat16, torch.float32)
NUM_ROWS = (1, 2, 5, 16, 17, 300)
REPOSITORY = Path(__file__).resolve().parents[1]

needs_kernels = pytest.mark.skipif(
    LINEAR.load() is None, reason=f"needs the built kernels: {LINEAR.why_not()}"
)


def random_weight(name: str, *shape: int) -> QuantizedWeight:
    form = Format.parse(name)
    groups = (*shape[:-1], form.num_groups(shape[-1]))
    if form.kind == "mxfp4":
        codes = torch.randint(0, 16, shape)
        return quantized_weight(form, codes, torch.randint(110, 130, groups).to(torch.uint8))
    integers = torch.randint(form.qmin, form.qmax + 1, shape)
    scales = ((torch.rand(groups) + 0.1) / 64).to(form.scale_dtype)
    scales[..., 0] *= -1
    zeros = (torch.rand(groups) * 8 - 4).to(scales.dtype) if form.has_zeros else None
    return quantized_weight(form, integers, scales, zeros)


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """Every token in 127 steps, without a rounding to the dtype after it."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x.float() / scale).round() * scale


def exact(weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in float64."""
    x = rounded_activations(x) if weight.format.dynamic else x
    wide = weight.dequantize().double()
    return F.linear(x.double(), wide, None if bias is None else bias.double())


def assert_close(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Within rounding: of the result to its dtype, and of sums by their terms' sizes. For many rows
    the weight is rounded to the dtype as well.
    """
    step = torch.finfo(y.dtype).eps
    terms = x.double().norm(dim=-1, keepdim=True) * w.double().norm(dim=-1)
    sums = 2**-20 if len(y) <= 64 else max(2**-20, step / 2)
    error = (y.double() - expected).abs()
    assert (error <= 1.5 * step * expected.abs() + sums * terms + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@needs_kernels
def test_products_are_those_of_the_dequantized_weight(name: str, dtype: torch.dtype) -> None:
    for num_rows, num_columns in ((37, 101), (48, 256)):
        weight = random_weight(name, num_rows, num_columns)
        bias = torch.randn(num_rows, dtype=dtype)
        for count in NUM_ROWS:
            x = torch.randn(count, num_columns, dtype=dtype)
            for offset in (None, bias):
                y = PackedQuantizedLinear(weight, offset)(x)
                assert y.dtype == dtype
                assert_close(y, exact(weight, x, offset), x, weight.dequantize())


@pytest.mark.parametrize("name", FORMATS)
@needs_kernels
def test_the_op_equals_its_twin(name: str) -> None:
    weight = random_weight(name, 35, 90)
    linear = PackedQuantizedLinear(weight, torch.randn(35))
    for count in (3, 20):
        x = torch.randn(count, 90)
        args = (x, linear.values, linear.scales, linear.zeros, linear.bias, 35, name)
        torch.testing.assert_close(linear(x), packed_quantized_linear_reference(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@needs_kernels
def test_a_row_has_the_same_bits_in_any_company(name: str, dtype: torch.dtype) -> None:
    linear = PackedQuantizedLinear(random_weight(name, 150, 77), torch.randn(150))
    x = torch.randn(64, 77, dtype=dtype)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(1, 18), 31, 64):
        assert torch.equal(linear(x[:count]), alone[:count])
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x), alone)
        assert torch.equal(linear(x[:1]), alone[:1])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["int8", "int8-dynamic", "int4-row", "int4-g32-dynamic", "int4-g32-asym-dynamic"]
)
@needs_kernels
def test_many_rows_have_the_bits_of_one_where_nothing_is_scaled_before(
    name: str, dtype: torch.dtype
) -> None:
    """Sums of whole rows, or of integers, are the same numbers in the same order."""
    linear = PackedQuantizedLinear(random_weight(name, 70, 333), torch.randn(70))
    x = torch.randn(103, 333, dtype=dtype)
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["int8", "int4-g32-asym", "int8-dynamic", "int4-g32-dynamic", "mxfp4"]
)
@needs_kernels
def test_many_columns_are_read_in_several_panels(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(name, 70, 4203)
    x = torch.randn(67, 4203, dtype=dtype)
    linear = PackedQuantizedLinear(weight)
    assert_close(linear(x), exact(weight, x, None), x, weight.dequantize())


@needs_kernels
def test_more_rows_than_are_laid_out_at_a_time() -> None:
    weight = random_weight("int4-g32", 20, 64)
    linear, x = PackedQuantizedLinear(weight), torch.randn(1100, 64)
    y = linear(x)
    assert_close(y, exact(weight, x, None), x, weight.dequantize())
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x), y)
    finally:
        torch.set_num_threads(1)


@needs_kernels
def test_x_may_lie_anyhow_and_have_any_dimensions() -> None:
    weight = random_weight("int4-g32", 20, 64)
    linear = PackedQuantizedLinear(weight)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert torch.equal(linear(x), linear(x.reshape(6, 64).contiguous()).view(2, 3, 20))
    assert linear(x[0, 0]).shape == (20,)
    assert linear(x[:0]).shape == (0, 3, 20)
    half = linear(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), linear(x), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="columns"):
        linear(torch.randn(2, 72))


@needs_kernels
def test_the_largest_integers_do_not_overflow() -> None:
    for name in ("int8-dynamic", "int4-row-dynamic", "int8", "int4-row"):
        form = Format.parse(name)
        for least in (True, False):
            integers = torch.full((17, 4096), form.qmin if least else form.qmax)
            weight = quantized_weight(form, integers, torch.ones(17, 1))
            for x in (torch.ones(2, 4096), -torch.ones(2, 4096)):
                y = PackedQuantizedLinear(weight)(x)
                torch.testing.assert_close(y.double(), exact(weight, x, None))


@needs_kernels
def test_dynamic_products_are_exact_but_for_the_last_steps() -> None:
    """Integers and powers of two as scales: nothing is rounded, so the bits are known."""
    form = Format.parse("int4-g32-dynamic")
    weight = quantized_weight(form, torch.randint(-8, 8, (40, 96)), torch.full((40, 3), 0.5))
    x = torch.randint(-127, 128, (5, 96)).float()
    x[:, 0] = 127  # the scale is then one
    assert torch.equal(PackedQuantizedLinear(weight)(x), F.linear(x, weight.dequantize()))


@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing(name: str) -> None:
    for shape in ((37, 101), (16, 64), (3, 5, 19)):
        weight = random_weight(name, *shape)
        kind = PackedQuantizedLinear if len(shape) == 2 else PackedQuantizedGroupedLinear
        packed = kind(weight)
        again = packed.canonical()
        assert again.format == weight.format and again.num_columns == weight.num_columns
        assert again.tensors.keys() == weight.tensors.keys()
        for key, tensor in weight.tensors.items():
            assert again.tensors[key].dtype == tensor.dtype
            assert torch.equal(again.tensors[key], tensor), key
        assert torch.equal(packed.dequantize(), weight.dequantize())
        assert packed.in_features == shape[-1] and packed.out_features == shape[-2]


def test_every_exponent_and_scale_survives() -> None:
    exponents = torch.arange(256, dtype=torch.uint8).view(8, 32)
    weight = QuantizedWeight(
        Format.parse("mxfp4"), 1024, torch.zeros(8, 512, dtype=torch.uint8), exponents
    )
    assert torch.equal(PackedQuantizedLinear(weight).canonical().scales, exponents)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scales = torch.randn(4, 2).to(dtype)
        integers = torch.randint(-8, 8, (4, 64))
        stored = quantized_weight(Format.parse("int4-g32"), integers, scales)
        assert torch.equal(PackedQuantizedLinear(stored).canonical().scales, scales)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@needs_kernels
def test_scales_of_any_dtype(dtype: torch.dtype) -> None:
    form = Format.parse("int4-g32-asym")
    scales, zeros = torch.randn(20, 4).to(dtype), torch.randn(20, 4).to(dtype)
    weight = quantized_weight(form, torch.randint(-8, 8, (20, 100)), scales, zeros)
    x = torch.randn(3, 100)
    linear, expected = PackedQuantizedLinear(weight), exact(weight, x, None)
    assert_close(linear(x), expected, x, weight.dequantize())
    assert_close(linear(x.repeat(9, 1))[:3], expected, x, weight.dequantize())


@pytest.mark.parametrize("name", ["int8", "int4-g32-asym", "mxfp4", "int8-g64-dynamic"])
def test_a_packed_slice_is_a_slice_of_the_packed(name: str) -> None:
    weight = random_weight(name, 256, 256)
    whole = PackedQuantizedLinear(weight)
    rows = PackedQuantizedLinear(weight.rows(slice(64, 192)))
    assert torch.equal(rows.values, whole.values[1:3])
    assert torch.equal(rows.scales, whole.scales[1:3])
    columns = PackedQuantizedLinear(weight.columns(64, 192))
    per_chunk = 8 if weight.format.in_nibbles else 4
    assert torch.equal(columns.values, whole.values[:, 64 // per_chunk : 192 // per_chunk])
    size = weight.format.group_size
    if size is not None:
        assert torch.equal(columns.scales, whole.scales[:, 64 // size : 192 // size])


@needs_kernels
def test_columns_in_another_order() -> None:
    order = torch.randperm(96)
    plain = random_weight("int4-g32", 20, 96)
    weight = QuantizedWeight(plain.format, 96, plain.values, plain.scales, None, order)
    x = torch.randn(4, 96)
    linear = PackedQuantizedLinear(weight)
    torch.testing.assert_close(linear(x), F.linear(x, weight.dequantize()))
    assert torch.equal(linear.canonical().order, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int8", "int4-g32-asym", "mxfp4", "int4-g32-dynamic"])
@needs_kernels
def test_groups_of_rows(name: str, dtype: torch.dtype) -> None:
    """Groups without rows, with few and with many, and rows that belong to none."""
    weight = random_weight(name, 5, 21, 45)
    bias = torch.randn(5, 21, dtype=dtype)
    x = torch.randn(40, 45, dtype=dtype)
    ends = torch.tensor([3, 3, 30, 30, 36])
    for offset in (None, bias):
        linear = PackedQuantizedGroupedLinear(weight, offset)
        y = linear(x, ends)
        assert y.shape == (40, 21)
        for group, (start, end) in enumerate(((0, 3), (3, 3), (3, 30), (30, 30), (30, 36))):
            one = QuantizedWeight(
                weight.format,
                45,
                weight.values[group],
                weight.scales[group],
                None if weight.zeros is None else weight.zeros[group],
            )
            own = None if offset is None else offset[group]
            alone = PackedQuantizedLinear(one, own)(x[start:end])
            assert torch.equal(y[start:end], alone)
        twin = packed_quantized_grouped_linear_reference(
            x, linear.values, linear.scales, linear.zeros, offset, ends, 21, name
        )
        loose = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(y[:36], twin[:36], **loose)
    assert linear(x[:0], torch.zeros(5, dtype=torch.int64)).shape == (0, 21)


def test_what_is_supported() -> None:
    built = LINEAR.load() is not None
    assert PackedQuantizedLinear.supports(Format.parse("int4-g64"), (7, 9), torch.float32) == built
    assert not PackedQuantizedLinear.supports(Format.parse("fp8"), (64, 64), torch.float32)
    assert not PackedQuantizedLinear.supports(Format.parse("int8"), (64, 64), torch.float16)


def test_bytes_are_those_that_a_product_reads() -> None:
    packed = PackedQuantizedLinear(random_weight("int4-g32", 64, 256))
    assert packed.weight_bytes == 64 * (256 // 2 + 256 // 32 * 2)
    assert sum(b.nbytes for b in packed.buffers()) == packed.weight_bytes


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_all_layers(backend: str) -> None:
    torch.compiler.reset()
    layers = [PackedQuantizedLinear(random_weight("int4-g32", 24, 64)) for _ in range(3)]
    compiled = torch.compile(lambda layer, x: layer(x) + 1, backend=backend, fullgraph=True)
    x = torch.randn(2, 64)
    with torch.inference_mode(), torch.compiler.set_stance("default"):
        compiled(layers[0], x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for layer in layers[1:]:
                assert torch.equal(compiled(layer, x), layer(x) + 1)


@pytest.mark.slow
def test_inductor_calls_the_op() -> None:
    torch.compiler.reset()
    linear = PackedQuantizedLinear(random_weight("int4-g32", 24, 64), torch.randn(24))
    x = torch.randn(2, 64)
    with torch.inference_mode():
        y = torch.compile(lambda x: linear(x).relu(), fullgraph=True)(x)
    assert torch.equal(y, linear(x).relu())


# ---- building ----

PROBE = """
import ctypes
import sys
import torch
for library in sys.argv[1:]:
    ctypes.CDLL(library)
from quantize.kernels.build import LINEAR
from quantize.kernels.cpu import PackedQuantizedLinear, packed_quantized_linear_reference
from quantize.formats import Format, quantized_weight
form = Format.parse("int4-g32")
torch.manual_seed(0)
weight = quantized_weight(form, torch.randint(-8, 8, (20, 64)), torch.rand(20, 2))
lines = []
path = LINEAR.load(lines.append)
linear = PackedQuantizedLinear(weight)
x = torch.randn(3, 64)
torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight.dequantize()))
twin = packed_quantized_linear_reference(
    x, linear.values, linear.scales, None, None, 20, form.name
)
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print("compiled" if lines else "found", path, LINEAR.why_not(), len(runtimes))
print("same" if torch.equal(linear(x), twin) else "differs")
"""


def probe(cache: Path, *libraries: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that packs a linear and uses it, with a cache of its own."""
    names = ("PATH", "HOME", "LD_LIBRARY_PATH")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    environment = {**inherited, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, *libraries],
        env={"GPTFAST_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Overriding" not in err
    return out


@needs_kernels
def test_two_processes_build_once_and_a_third_finds_it(tmp_path: Path) -> None:
    """A package in the same process had brought a libgomp of its own, and the kernels were linked
    with that: the next process did not find its file.
    """
    (own,) = loaded_openmp()
    other = tmp_path / "libgomp-0.so.1"
    shutil.copy(own, other)
    both = [probe(tmp_path, str(other)), probe(tmp_path, str(other))]
    outputs = [output(process) for process in both]
    assert sorted(out.split()[0] for out in outputs) == ["compiled", "found"]
    folder = tmp_path / "kernels"
    other.unlink()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("*.so"))) == 1
    assert not list(folder.glob("tmp*"))
    third = output(probe(tmp_path, PATH=os.environ["PATH"]))
    assert third.startswith("found") and third.split()[2:4] == ["None", "1"]  # one OpenMP
    os.chmod(folder, 0o777)
    assert "others can write it" in output(probe(tmp_path))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler not found"),
        ({"CXX": "false"}, "false failed"),
        ({"GPTFAST_NO_KERNELS": "1"}, "GPTFAST_NO_KERNELS is set"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "AVX2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_without_kernels_the_twins_run(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    out = output(probe(tmp_path, **environment))
    assert out.startswith("found None") and reason in out
    assert out.endswith("same\n")


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = output(probe(blocked))
    assert out.startswith("found None") and out.endswith("same\n")


@pytest.mark.slow
@needs_kernels
def test_processors_without_avx512(tmp_path: Path) -> None:
    """This file's own tests of products, with the kernels of AVX2."""
    keyword = "products or twin or company or overflow or dynamic or groups or dtype"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__),
            *("-k", f"({keyword}) and not avx512"),
        ],
        env={**os.environ, "GPTFAST_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@needs_kernels
def test_what_does_not_fit_is_refused_and_never_read() -> None:
    """The packed weight is padded, so 70 columns would have found something to multiply with 67."""
    weight = random_weight("int4-g32-asym", 16, 67)
    for columns in (65, 66, 68, 70, 72):
        with pytest.raises(ValueError, match=f"x has {columns} columns; the weight has 67"):
            PackedQuantizedLinear(weight)(torch.randn(2, columns))
    with pytest.raises(ValueError, match="a bias for 16 rows"):
        PackedQuantizedLinear(weight, torch.zeros(3))(torch.randn(2, 67))
    mixed = replace(weight, zeros=weight.zeros.float(), scales=weight.scales.half())
    with pytest.raises(ValueError, match="zeros are"):
        mixed.check()
    x = torch.randn(2, 67)
    torch.testing.assert_close(PackedQuantizedLinear(mixed)(x), QuantizedLinear(mixed)(x))


@needs_kernels
@pytest.mark.parametrize("name", ["int8-dynamic", "int4-g32-dynamic", "int8", "int4-g32"])
@pytest.mark.parametrize("place", [0, 33, 63, 66])
def test_activations_that_are_no_numbers_stay_visible(name: str, place: int) -> None:
    weight, x = random_weight(name, 16, 67), torch.randn(2, 67)
    x[0, place] = torch.nan
    y = PackedQuantizedLinear(weight)(x)
    assert y[0].isnan().all() and y[1].isfinite().all()
