"""Weights in fp8 (e4m3) beside their scales: one for the tensor, one for each row, or one for each
block of rows and columns.

`weight_scale_inv` [ceil(N / 128), ceil(K / 128)] in DeepSeek-V3 and Qwen3-FP8 (despite its name it
is multiplied: DeepSeek-V3/inference/kernel.py), `weight_scale` [] or [1] as AutoFP8, ModelOpt and
vLLM write it, and [N, 1] in FBGEMM's files. Blocks become groups of columns: each row has the scale
of its block, so that nothing is lost.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.readers.layout import (
    FLOATS,
    Header,
    Headers,
    Read,
    Reader,
    Stored,
    absent,
    check_dtype,
    check_matrix,
    check_shape,
    group_reason,
    known,
)

ACTIVATIONS = "activations keep their precision, though the checkpoint asks for 8 bits"
KV_CACHE = "the KV cache is not quantized, though the checkpoint asks for it"
# Scales that serve activations and the KV cache.
HIDDEN = re.compile(r"(.*\.)?((input|output|q|k|v|kv)_scale(_ub|_inv)?|activation_scale)")
Block = tuple[int, int]


class FP8Reader(Reader):
    """Also FBGEMM's ("fbgemm_fp8") and ModelOpt's ("modelopt") files."""

    roles: Mapping[str, str] = {
        ".weight": "weight",
        ".weight_scale": "scale",
        ".weight_scale_inv": "scale_inv",
    }
    required = ("weight",)
    hidden = HIDDEN

    def __init__(self, settings: Mapping[str, Any]) -> None:
        known(settings, "fmt", ("e4m3", "float8_e4m3fn"))
        known(settings, "activation_scheme", ("dynamic", "static"))
        known(settings, "scale_fmt", ("float", "ue8m0"))
        known(settings, "expert_dtype", ("fp8",))
        known(settings, "quant_algo", ("FP8",))
        absent(settings, "is_marlin_format")
        block = settings.get("weight_block_size")
        self.block = None if block is None else block_of(block, "weight_block_size")
        self.notes += (ACTIVATIONS,)
        if settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo"):
            self.notes += (KV_CACHE,)

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        role, scale = _scale(module, headers)
        return look_fp8(headers["weight"], scale, self.block, role)


def block_of(value: Any, key: str) -> Block:
    """Rows and columns of a block: [128, 128] or "128x128"."""
    sides = value.split("x") if isinstance(value, str) else value
    if isinstance(sides, list | tuple) and len(sides) == 2:
        rows, columns = (int(s) if str(s).isdecimal() else 0 for s in sides)
        if rows and columns:
            return rows, columns
    raise ValueError(f"quantization_config: {key} is {value!r}; rows and columns are needed")


def look_fp8(weight: Header, scale: Header, block: Block | None, role: str = "scale") -> Stored:
    """A weight [N, K] and its scale, which is read by `role`."""
    check_matrix(weight)
    check_dtype(weight, "F8_E4M3")
    check_dtype(scale, *FLOATS, "F8_E8M0")
    num_rows, num_columns = weight.shape
    check_shape(scale, *scale_shapes(num_rows, num_columns, block))
    size = None if block is None else block[1]
    reason = group_reason(size)
    form = None if reason else Format("fp8", 8, size)
    return Stored(weight.shape, form, partial(_load, form, block, role), reason)


def scale_shapes(num_rows: int, num_columns: int, block: Block | None) -> list[tuple[int, ...]]:
    """Shapes that a scale may have: of blocks, else of rows or of the tensor."""
    if block is not None:
        return [(-(-num_rows // block[0]), -(-num_columns // block[1]))]
    return [(num_rows, 1), (num_rows,), (), (1,), (1, 1)]


def row_scales(scales: Tensor, num_rows: int, block: Block | None) -> Tensor:
    """Whatever they belong to -> [N, 1 or groups]."""
    if block is not None:
        return scales.repeat_interleave(block[0], dim=0)[:num_rows].contiguous()
    return scales.reshape(-1, 1).expand(num_rows, 1).contiguous()


def _load(form: Format | None, block: Block | None, role: str, read: Read) -> Any:
    values = read("weight")
    scales = row_scales(read(role).float(), values.size(0), block)
    if form is None:
        assert block is not None
        return values.float() * scales.repeat_interleave(block[1], dim=1)[:, : values.size(1)]
    return QuantizedWeight(form, values.size(1), values, scales).check()


def _scale(module: str, headers: Headers) -> tuple[str, Header]:
    found = [role for role in ("scale", "scale_inv") if role in headers]
    if len(found) != 1:
        raise ValueError(f"{module} has both weight_scale and weight_scale_inv; one is needed")
    return found[0], headers[found[0]]
