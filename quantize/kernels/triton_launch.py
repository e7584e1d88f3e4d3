"""Launches of the kernels of triton_linear.py and triton_packed.py: what `Call`s mean to them.

Imports Triton; `quantize.kernels.cuda` imports this file where it is there.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantize.formats import Format
from quantize.kernels import triton_linear, triton_packed
from quantize.kernels.call import Call
from quantize.kernels.triton_configs import Device, LinearConfig, linear_config, stages_that_fit
from quantize.kernels.words import PackedWords, assembly, words_in_row

LEAST_SHARED = 99 << 10  # bytes that any device from 8.0 on has for a program


def launch(call: Call, out: Tensor, config: LinearConfig | None = None) -> None:
    """Computes a call with up to 16 rows of x into a contiguous `out`."""
    num_columns, num_out = call.x.size(-1), call.out_shape[-1]
    x = call.x.reshape(-1, num_columns).contiguous()
    num_rows, device = len(x), device_of(x.device)
    if config is None:
        name = call.format or _name_of(call.weight)
        config = linear_config(device.name, name, call.out_features, num_columns)
    options: dict[str, Any] = {"PDL": config.pdl}
    if config.pdl:
        options["launch_pdl"] = True
    norm_weight, norm_bias = call.norm_weight, call.norm_bias
    if norm_weight is not None and not config.norm_inside:
        x = _norm_rows(x, call, options)
        norm_weight = norm_bias = None
    part = None
    if config.splits > 1:
        shape = (config.splits, 2 if call.gated else 1, num_rows, num_out)
        part = torch.empty(shape, dtype=torch.float32, device=x.device)
    residual = None if call.residual is None else call.residual.contiguous()
    ends = (call.bias, norm_weight, norm_bias, residual, out, part, num_rows)
    row_count = max(config.pad, 1 << (num_rows - 1).bit_length())
    form = Format.parse(call.format) if call.format else None
    grid = (-(-num_out // config.rows), config.splits)
    bytes_of = _shared_bytes(call, config, row_count)
    constants: dict[str, Any] = {
        "N": call.out_features,
        "K": num_columns,
        "NORM": call.norm if norm_weight is not None else None,
        "ROW_COUNT": row_count,
        "GATED": call.gated,
        "ACTIVATION": call.activation,
        "BLOCK_N": config.rows,
        "SLICES": config.slices,
        "SPLITS": config.splits,
        "NUM_STAGES": stages_that_fit(config, *bytes_of, grid[0] * grid[1], device),
        "num_warps": config.slices,
        **options,
    }
    factors = (call.eps, call.multiplier)
    if form is None or call.scales is None:
        triton_linear.plain_linear[grid](
            x, call.weight, *ends, *factors, BLOCK_K=config.block, **constants
        )
    else:
        packed = PackedWords(call.weight, call.scales, call.zeros)
        pointers, meaning = _as_words(form, packed)
        lines = _assembly(form, x)
        triton_packed.packed_linear[grid](
            x, *pointers, *ends, *factors, ASSEMBLY=lines, **meaning, **constants
        )
    if part is not None:
        triton_linear.combine[(-(-num_out // 256), num_rows)](
            part,
            call.bias,
            residual,
            out,
            num_rows,
            call.multiplier,
            NUM_OUT=num_out,
            GATED=call.gated,
            ACTIVATION=call.activation,
            SPLITS=config.splits,
            BLOCK=256,
            num_warps=2,
            **options,
        )


def dequantized(
    form: Format, packed: PackedWords, num_rows: int, num_columns: int, dtype: torch.dtype
) -> Tensor:
    """The plain weight [N, K]."""
    pointers, meaning = _as_words(form, packed)
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=packed.values.device)
    tiles, chunks, _, _ = packed.values.shape
    triton_packed.dequantize[(tiles * chunks,)](
        *pointers, out, N=num_rows, K=num_columns, **meaning
    )
    return out


def try_launch(device: torch.device) -> None:
    """Raises what a first launch raises."""
    line = torch.zeros(16, device=device)
    grid, options = (1,), {"K": 16, "NORM": "rms", "BLOCK": 1024, "PDL": False}
    triton_linear.norm_rows[grid](line, line, None, torch.empty_like(line), 1.0, **options)


def _norm_rows(x: Tensor, call: Call, options: dict[str, Any]) -> Tensor:
    """x [M, K] under the call's norm, by a kernel of its own."""
    y = torch.empty_like(x)
    triton_linear.norm_rows[(len(x),)](
        x,
        call.norm_weight,
        call.norm_bias,
        y,
        call.eps,
        K=x.size(-1),
        NORM=call.norm,
        BLOCK=1024,
        **options,
    )
    return y


def _shared_bytes(call: Call, config: LinearConfig, row_count: int) -> tuple[int, int]:
    """Of shared memory: for what all warps read at once, and for what there is once beside it."""
    size, form = call.x.itemsize, Format.parse(call.format) if call.format else None
    words = config.block if form is None else words_in_row(form)
    parts = 1 if form is None else 16 // _bits(form)
    bytes_of_row = words * (size if form is None else 2)
    if form is not None and form.group_size is not None:
        groups = max(2, -(-words * parts // form.group_size))
        bytes_of_row += groups * (4 if call.zeros is None else 8)
    of_weight = bytes_of_row * config.rows * (2 if call.gated else 1)
    of_norm = sum(each is not None for each in (call.norm_weight, call.norm_bias))
    of_x = words * parts * size * (row_count + of_norm)
    # A norm's result goes through shared memory to where the product takes it.
    normed = words * size * row_count if of_norm else 0
    return config.slices * (of_weight + of_x), config.slices * normed


def _as_words(
    form: Format, packed: PackedWords
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """What the kernels of triton_packed.py point to, and what says how to read it."""
    scales, zeros = packed.scales, packed.zeros
    meaning = {
        "KIND": form.kind,
        "BITS": _bits(form),
        "C": words_in_row(form),
        "GROUP": form.group_size,
        "SCALE": _name_of(scales),
        "ZERO": None if zeros is None else _name_of(zeros),
    }
    if form.group_size is not None:
        scales = scales.view(torch.int32)
        zeros = None if zeros is None else zeros.view(torch.int32)
    return (packed.values, scales, zeros), meaning


def _bits(form: Format) -> int:
    """That a number takes."""
    return 4 if form.in_nibbles else 8


def _name_of(numbers: Tensor) -> str:
    return str(numbers.dtype).removeprefix("torch.")


def _assembly(form: Format, x: Tensor) -> tuple[str, ...] | None:
    """PTX, unless the interpreter would have to run it."""
    return None if triton_linear.INTERPRETED.value else assembly(form, x.dtype)


@cache
def device_of(device: torch.device) -> Device:
    """A CUDA device's facts; those of an H100 where kernels are interpreted."""
    if device.type != "cuda":
        return Device(device.type, 132, 227 << 10)
    found = torch.cuda.get_device_properties(device)
    room = getattr(found, "shared_memory_per_block_optin", LEAST_SHARED)
    return Device(found.name, found.multi_processor_count, room)
