"""Compiles every kernel that a decode step launches for an H100, down to machine code, where there
is no GPU: what hardware refuses and the interpreter does not shows here. A program of its own,
because the interpreter decides when Triton is imported.

    PYTHONPATH=. python tests/compile_for_hopper.py [SHAPE ...]

Prints one JSON line a kernel: its name, registers and stack of a thread (spilled registers are on
the stack), shared memory of a program, and how often instructions that matter occur.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from gptfast.cache import KVCache
from gptfast.families import model_config
from gptfast.fused import block_parts
from gptfast.kernels.cuda_step import decode_block
from gptfast.model import Block
from gptfast.shapes import shape_config
from quantize.formats import Format
from quantize.kernels import cuda
from quantize.kernels.cuda import CudaLinear, CudaQuantizedLinear
from quantize.rounding import round_to_nearest

# Shape of the block, formats of its weights, cache, rows.
CASES = [
    ("llama-3.2-1b", "bf16", "auto", 1),
    ("llama-3.2-1b", "int8", "int8", 3),
    ("llama-3.2-1b", "int4-g64", "fp8", 16),
    ("gemma-2-2b", "bf16", "auto", 1),
    ("pythia-1.4b", "fp8", "auto", 2),
    ("smollm-135m", "fp32", "int8", 1),
]
INSTRUCTIONS = ("mma.sync", "wgmma", "cp.async.cg", "ld.global.v4", "fma.rn")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    kernels: dict[str, dict[str, Any]] = {}

    def compile_only(self: KernelInterface[Any], grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernel = JITFunction.run(self, *args, grid=grid, warmup=True, **options)
            if kernel.hash not in kernels:
                kernels[kernel.hash] = facts(kernel)
                print(json.dumps({"case": case, **kernels[kernel.hash]}), flush=True)

        return launch

    KernelInterface.__getitem__ = compile_only
    cuda.why_no_triton = lambda device: None
    asked = sys.argv[1:]
    for case in CASES:
        if not asked or case[0] in asked:
            step(*case)


def step(shape: str, form: str, kv_cache_dtype: str, num_rows: int) -> None:
    """Compiles one block's decode step; no number of it is looked at."""
    config = model_config(shape_config(shape, 1))
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        block = Block(config, 0)
    block = block.to_empty(device="cpu").requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for owner in (block.attention, block.mlp):
        for name, linear in list(owner.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(owner, name, device_linear(linear, form))
    rope = config.layer_rope(0)
    rotary_dim = 0 if rope is None else rope.dim or config.head_dim
    parts = block_parts(block, rotary_dim)
    assert parts is not None
    cache = KVCache.allocate(config, num_rows, 2000, dtype, "cpu", kv_cache_dtype)
    x = torch.empty(num_rows, 1, config.dim, dtype=dtype)
    cos, sin = torch.empty(2, 1, 2001, 1, rotary_dim // 2)
    positions = torch.empty(num_rows, 1, dtype=torch.int64)
    turn = (cos, sin) if rotary_dim else None
    decode_block(parts, x, positions, turn, cache.layers[0], by_position=True)


def device_linear(linear: nn.Linear, form: str) -> nn.Module:
    if form in ("bf16", "fp32"):
        return CudaLinear(linear)
    # Of zeros, which cost no time to round.
    weight = round_to_nearest(torch.zeros_like(linear.weight), Format.parse(form))
    return CudaQuantizedLinear(weight, linear.bias)


def facts(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    found = {name: kernel.asm["ptx"].count(name) for name in INSTRUCTIONS}
    return {
        "kernel": kernel.metadata.name,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        **{name: count for name, count in found.items() if count},
    }


if __name__ == "__main__":
    main()
