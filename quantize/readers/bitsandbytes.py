"""bitsandbytes: int8 rows ("LLM.int8()") and the four-bit types nf4 and fp4.

int8: weight int8 [N, K] and SCB [N], the largest magnitude of each row; a weight is q * SCB / 127.
Four bits: the numbers of a weight one after the other, two a byte and the first in the HIGH half,
look their value up in quant_map [16]; each block of them has its largest magnitude in absmax, which
may be quantized in turn (quant_map of 256 entries, blocks of 256, an offset). JSON in a tensor of
bytes says shape and sizes: bitsandbytes/functional.py, backends/default/ops.py.
"""

import json
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.readers.fp8 import ACTIVATIONS
from quantize.readers.layout import (
    Header,
    Headers,
    Read,
    Reader,
    Stored,
    check_dtype,
    check_matrix,
    check_shape,
    known,
)

TYPES = ("nf4", "fp4")
REASON = "the sixteen values of {}"


class BitsAndBytesReader(Reader):
    """The tensors of each module say whether it has 8 bits or 4."""

    roles: Mapping[str, str] = {
        ".weight": "weight",
        ".SCB": "row_max",
        ".weight_format": "layout",
        ".weight.absmax": "absmax",
        ".weight.quant_map": "map",
        ".weight.nested_absmax": "nested_absmax",
        ".weight.nested_quant_map": "nested_map",
        **{f".weight.quant_state.bitsandbytes__{kind}": kind for kind in TYPES},
    }
    required = ("weight",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        known(settings, "bnb_4bit_quant_type", TYPES)
        if settings.get("load_in_8bit"):
            self.notes = (ACTIVATIONS,)

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        if "row_max" in headers:
            return _look_int8(headers, read)
        kinds = [kind for kind in TYPES if kind in headers]
        if len(kinds) != 1 or "absmax" not in headers or "map" not in headers:
            raise ValueError(
                f"{module}.weight needs absmax, quant_map and one quant_state beside it (or SCB)"
            )
        return _look_4bit(headers, kinds[0], read)


def _look_int8(headers: Headers, read: Read) -> Stored:
    weight = headers["weight"]
    check_matrix(weight)
    check_dtype(weight, "I8")
    check_dtype(headers["row_max"], "F32")
    check_shape(headers["row_max"], (weight.shape[0],))
    if "layout" in headers and read("layout").any():
        raise ValueError(f"{headers['layout'].name} is not 0: only rows in their order can be read")
    return Stored(weight.shape, Format("int", 8), _load_int8)


def _load_int8(read: Read) -> QuantizedWeight:
    values = read("weight")
    scales = read("row_max").unsqueeze(1) / 127  # rounded to float32, its last bit is a choice
    return QuantizedWeight(Format("int", 8), values.size(1), values, scales).check()


def _look_4bit(headers: Headers, kind: str, read: Read) -> Stored:
    state = _state(headers[kind], read(kind))
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = prod(shape)
    num_blocks = -(-count // size)
    check_shape(headers["map"], (16,))
    check_shape(headers["absmax"], (num_blocks,))
    check_dtype(headers["map"], "F32")
    weight = headers["weight"]
    check_dtype(weight, "U8")
    check_shape(weight, (-(-count // 2), 1))
    if "nested_absmax" in headers:
        inside, offset = state.get("nested_blocksize"), state.get("nested_offset")
        is_complete = isinstance(inside, int) and inside > 0 and isinstance(offset, int | float)
        if "nested_map" not in headers or not is_complete:
            raise ValueError(
                f"{weight.name} needs nested_quant_map, nested_blocksize and nested_offset"
            )
        check_dtype(headers["absmax"], "U8")
        check_shape(headers["nested_map"], (256,))
        check_shape(headers["nested_absmax"], (-(-num_blocks // state["nested_blocksize"]),))
    else:
        check_dtype(headers["absmax"], "F32")
    load = partial(_load_4bit, state, "nested_absmax" in headers)
    return Stored(shape, None, load, REASON.format(kind))


def _state(header: Header, numbers: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(numbers.tolist()))
        shape, size = state["shape"], state["blocksize"]
        usable = len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in (*shape, size))
        float(state.get("nested_offset", 0))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{header.name} is damaged ({error!r})") from None
    if not usable:
        raise ValueError(
            f"{header.name} has shape {shape} and blocksize {size}; a matrix is needed"
        )
    return state


def _load_4bit(state: Mapping[str, Any], is_nested: bool, read: Read) -> Tensor:
    pairs = read("weight").flatten()
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten()[: prod(state["shape"])]
    peaks = read("absmax")
    if is_nested:
        peaks = read("nested_map")[peaks.int()] * _each(
            read("nested_absmax"), state["nested_blocksize"], peaks.numel()
        )
        peaks = peaks + state["nested_offset"]
    peaks = _each(peaks, state["blocksize"], codes.numel())
    return (read("map")[codes.int()] * peaks).view(state["shape"])


def _each(of_blocks: Tensor, size: int, count: int) -> Tensor:
    return of_blocks.repeat_interleave(size)[:count]
