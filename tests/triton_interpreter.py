"""Triton kernels on a CPU: imported before any kernel is, it turns Triton's interpreter on, or
skips the module that imports it.

Where there is a CUDA device, kernels are compiled for it and tests/test_gpu.py runs them.
"""

import os
import sys
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("there is a CUDA device: test_gpu.py runs the kernels", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported to compile: run this file alone", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="needs Triton's interpreter: pip install triton")

import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def _repair() -> None:
    """What the interpreter of Triton 3.6 gets wrong and hardware does not: it cuts float32 down to
    16 bits instead of rounding, loses carries while rounding to 8, multiplies matrices of bfloat16
    as if their bits were integers, and since numpy 2.4 cannot make a loop's bound of a number.
    """
    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast, dot = builder.cast_impl, builder.create_dot

    def exact_cast(self: Any, src: Any, dst_type: Any) -> Any:
        known = src.dtype.scalar in TORCH_DTYPES and dst_type.scalar in TORCH_DTYPES
        return _converted(src, dst_type.scalar) if known else cast(self, src, dst_type)

    def exact_conversion(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return _converted(src, dst_type.scalar)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar in TORCH_DTYPES:
            a, b = _converted(a, tl.float32), _converted(b, tl.float32)
        return dot(self, a, b, *rest)

    def patch_tensor_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_fp_to_fp = exact_cast, exact_conversion
    builder.create_dot, interpreter._patch_lang_tensor = wide_dot, patch_tensor_too


def _converted(handle: Any, dtype: Any) -> Any:
    """A value of the interpreter in another floating dtype, as PyTorch rounds."""
    numbers = torch.from_numpy(handle.data.copy()).view(TORCH_DTYPES[handle.dtype.scalar])
    stored = interpreter._get_np_dtype(dtype)
    bits = numbers.to(TORCH_DTYPES[dtype]).contiguous().view(getattr(torch, stored.name))
    return interpreter.TensorHandle(bits.numpy(), dtype)


_repair()
