"""Compiles the kernels of linears for an H100, down to machine code, where there is no GPU: what
hardware refuses and the interpreter does not shows here. A program of its own, because the
interpreter decides when Triton is imported.

    PYTHONPATH=. python tests/compile_linears.py

Prints one JSON line a kernel, with the facts of compile_for_hopper.py.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from compile_for_hopper import facts
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from quantize.formats import Format, QuantizedWeight
from quantize.kernels.call import Call
from quantize.kernels.triton_configs import LinearConfig
from quantize.kernels.triton_launch import dequantized, launch
from quantize.kernels.words import PackedWords, pack_words
from quantize.rounding import round_to_nearest

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALL = Call(torch.empty(0), torch.empty(0), None, None, None, "", None, None, 1e-5, None, 1.0, "",
            False, 0, "")  # fmt: skip
# Format, activations, weight [N, K], rows of x, configuration, what else there is.
CASES: list[tuple[str, torch.dtype, tuple[int, int], int, LinearConfig | None, str]] = [
    ("", BF16, (2048, 2048), 1, None, "norm"),
    ("", BF16, (2048, 2048), 16, None, "layer bias residual"),
    ("", FP16, (4096, 1030), 3, None, "gate bias"),
    ("", FP32, (2048, 2048), 1, None, "norm gate"),
    ("", BF16, (64, 48), 1, LinearConfig(64, 4, 4, 64, 3, pad=1, pdl=True), "activation"),
    ("int4-g32", BF16, (4096, 4096), 1, None, "residual"),
    (
        "int4-g32",
        BF16,
        (4096, 4096),
        16,
        LinearConfig(64, 4, 4, 64, 4, False, pdl=True),
        "norm gate",
    ),
    ("int4-g32-asym", BF16, (2048, 2048), 2, None, ""),
    ("int4-g64-asym", FP16, (2048, 2048), 2, LinearConfig(16, 8, 1, 64, 4, False), "norm"),
    ("int4-g16", FP16, (2048, 2048), 1, None, "bias"),
    ("int4-g128", BF16, (2048, 2056), 9, None, ""),
    ("int4-g512", FP32, (2048, 2048), 1, None, ""),
    ("int8", BF16, (4096, 4096), 1, None, "gate"),
    ("int8-g128", FP16, (2048, 2048), 16, None, ""),
    ("int8-asym", BF16, (2048, 2048), 1, None, ""),
    ("fp8", BF16, (2048, 2048), 1, None, ""),
    ("fp8-g64", FP16, (2048, 2048), 1, None, ""),
    ("mxfp4", BF16, (4096, 14336), 1, None, ""),
    ("mxfp4", BF16, (28672, 4096), 16, None, "norm gate"),
    ("", BF16, (128256, 4096), 16, None, "norm"),
    ("mxfp4", FP16, (2048, 2048), 1, LinearConfig(32, 2, 1, 64, 2, pad=2), ""),
]


def main() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )

    def compile_only(self: KernelInterface[Any], grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            kernel = JITFunction.run(self, *args, grid=grid, warmup=True, **options)
            about = {"case": case[:2], "default": case[4] is None, **facts(kernel)}
            print(json.dumps(about, default=str), flush=True)

        return run

    KernelInterface.__getitem__ = compile_only
    for case in CASES:
        compile_case(*case)


def compile_case(
    form: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    num_rows: int,
    config: LinearConfig | None,
    what: str,
) -> None:
    """No number of it is looked at."""
    rows, columns = size
    packed = PackedWords(torch.empty(size, dtype=dtype), torch.empty(0), None)
    if form:
        packed = pack_words(zeros(form, size))
        dequantized(Format.parse(form), packed, *size, dtype)
    call = CALL._replace(
        x=torch.empty(num_rows, columns, dtype=dtype),
        weight=packed.values,
        scales=packed.scales if form else None,
        zeros=packed.zeros,
        out_features=rows,
        format=form,
    )
    line = torch.empty(max(size), dtype=dtype)
    if "norm" in what or "layer" in what:
        norm = "layer" if "layer" in what else "rms"
        call = call._replace(
            norm=norm, norm_weight=line, norm_bias=line if norm == "layer" else None
        )
    if "gate" in what or "activation" in what:
        call = call._replace(activation="silu", gated="gate" in what)
    call = call._replace(bias=line if "bias" in what else None)
    if "residual" in what:
        call = call._replace(residual=call.result())
    launch(call, call.result(), config)


def zeros(form: str, size: tuple[int, int]) -> QuantizedWeight:
    """A weight of zeros, which cost no time to round; zeros of groups that need float32."""
    weight = round_to_nearest(torch.zeros(size), Format.parse(form), search=False)
    if weight.zeros is None or weight.zeros.dtype != torch.bfloat16 or "g64" not in form:
        return weight
    return replace(weight, scales=weight.scales.float(), zeros=weight.zeros.float() + 1 / 3)


if __name__ == "__main__":
    main()
