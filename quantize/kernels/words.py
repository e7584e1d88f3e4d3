"""Quantized weights as the kernels of triton_packed.py read them: 16-bit words in tiles of 16 rows.

A word holds PARTS = 16 / bits numbers of one row, part j in bits j * bits and up, as they are
stored: q + 8 or a code of mxfp4 in 4 bits, a byte of int8 or fp8 in 8. A chunk is C words in a row
(C the group, from 16 to 64): part j of word c is column j * C + c of the chunk's PARTS * C columns,
so each part of a chunk is consecutive columns, all in one group. Words are [tiles, chunks, 16, C]:
16 rows of a chunk lie together, and a thread's 16 bytes are 8 words of a row.

Scales (and zeros) of groups are [pairs of groups, rows, 2] in 16 bits, so that 32 bits bring both,
or [groups, rows, 1] in 32; those of whole rows are [rows]. Rows are padded to 16, columns to
chunks. Packing is exact: `unpack_words` gives the stored weight back bit for bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.mxfp4 import SCALE_BIAS

TILE_ROWS = 16
LEAST_GROUP, WIDEST_CHUNK = 16, 64


@dataclass(frozen=True)
class PackedWords:
    """`values` int16 [tiles, chunks, 16, C]; `scales`, `zeros` as above."""

    values: Tensor
    scales: Tensor
    zeros: Tensor | None


def words_in_row(form: Format) -> int:
    """C: words of a row in a chunk."""
    return WIDEST_CHUNK if form.group_size is None else min(form.group_size, WIDEST_CHUNK)


def pack_words(weight: QuantizedWeight) -> PackedWords:
    """A stored weight [N, K] in the order of the kernels."""
    form, (num_rows, num_columns) = weight.format, weight.shape
    wide, parts = words_in_row(form), 2 if form.bits == 8 else 4
    chunks = -(-num_columns // (parts * wide))
    padding = (0, chunks * parts * wide - num_columns, 0, -num_rows % TILE_ROWS)
    codes = F.pad(_codes(weight), padding).view(-1, TILE_ROWS, chunks, parts, wide)
    values = codes.new_zeros(codes.size(0), TILE_ROWS, chunks, wide, dtype=torch.int16)
    for part in range(parts):
        values |= codes[:, :, :, part].to(torch.int16) << (part * 16 // parts)
    values = values.transpose(1, 2).contiguous()
    zeros = None if weight.zeros is None else _narrowed(weight.zeros)
    groups = None if form.group_size is None else -(-chunks * parts * wide // form.group_size)
    return PackedWords(
        values,
        _of_groups(_float_scales(weight.scales), groups),
        None if zeros is None else _of_groups(zeros, groups),
    )


def unpack_words(
    form: Format,
    packed: PackedWords,
    num_rows: int,
    num_columns: int,
    order: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """What was packed; `scale_dtype` where scales and zeros were of another than they are now."""
    parts = 2 if form.bits == 8 else 4
    words = packed.values.transpose(1, 2)  # [tiles, 16, chunks, C]
    mask = (1 << (16 // parts)) - 1
    codes = [((words >> (part * 16 // parts)) & mask).to(torch.uint8) for part in range(parts)]
    stored = torch.stack(codes, dim=3).flatten(2).flatten(0, 1)[:num_rows, :num_columns]
    if form.in_nibbles:
        if num_columns % 2:
            stored = F.pad(stored, (0, 1), value=8 if form.kind == "int" else 0)
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    groups = form.num_groups(num_columns)
    scales = _in_rows(packed.scales, form, num_rows, groups)
    zeros = None
    if packed.zeros is not None:
        zeros = _in_rows(packed.zeros, form, num_rows, groups)
        zeros = zeros if scale_dtype is None else zeros.to(scale_dtype)
    if form.kind == "mxfp4":
        scales = ((scales.view(torch.int16) & 0x7FFF) >> 7).to(torch.uint8)
    elif scale_dtype is not None:
        scales = scales.to(scale_dtype)
    values = stored.contiguous().view(form.values_dtype)
    return QuantizedWeight(form, num_columns, values, scales, zeros, order)


def _codes(weight: QuantizedWeight) -> Tensor:
    """The stored numbers' bits, uint8 [N, K]."""
    stored = weight.values.view(torch.uint8)
    if not weight.format.in_nibbles:
        return stored
    halves = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
    return halves[:, : weight.num_columns]


def _float_scales(scales: Tensor) -> Tensor:
    """Scales as floats of 16 or 32 bits; mxfp4's exponents as the bfloat16 that they mean."""
    if scales.dtype != torch.uint8:
        return scales if scales.element_size() <= 4 else scales.float()
    ones = torch.ones_like(scales, dtype=torch.float32)
    return torch.ldexp(ones, scales.to(torch.int32) - SCALE_BIAS).to(torch.bfloat16)


def _narrowed(zeros: Tensor) -> Tensor:
    """Zeros in bfloat16 where that holds them (integers, as a rule), else in float32."""
    narrow = zeros.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(zeros.dtype), zeros) else zeros.float()


def _of_groups(numbers: Tensor, groups: int | None) -> Tensor:
    """[N, groups] -> [groups / 2, rows, 2] or [groups, rows, 1]; [rows] where rows have one."""
    padding = -len(numbers) % TILE_ROWS
    if groups is None:
        return F.pad(numbers[:, 0], (0, padding)).contiguous()
    together = 4 // numbers.element_size()
    groups += -groups % together
    numbers = F.pad(numbers, (0, groups - numbers.size(1), 0, padding))
    return numbers.view(len(numbers), -1, together).transpose(0, 1).contiguous()


def _in_rows(packed: Tensor, form: Format, num_rows: int, groups: int) -> Tensor:
    """The inverse: [N, groups]."""
    if form.group_size is None:
        return packed[:num_rows, None].contiguous()
    return packed.transpose(0, 1).flatten(1)[:num_rows, :groups].contiguous()


# -- unpacking in PTX --

BFLOAT16, FLOAT16 = "bf16x2", "f16x2"
_NAMES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
# Bits of 128 and 1024, whose mantissa has room for a 4-bit integer, twice.
_BASE = {BFLOAT16: 0x4300, FLOAT16: 0x6400}
_ONE, _MINUS_ONE = {BFLOAT16: 0x3F80, FLOAT16: 0x3C00}, {BFLOAT16: 0xBF80, FLOAT16: 0xBC00}
# Small floats: bits of the exponent and mantissa, mantissa's bits, and what makes up for the
# exponent's other bias when these bits stand where a wider float has them.
_SMALL = {"fp8": (7, 3), "mxfp4": (3, 1)}
_FACTOR = {
    ("fp8", BFLOAT16): 0x7B80,  # 2^120
    ("fp8", FLOAT16): 0x5C00,  # 2^8
    ("mxfp4", BFLOAT16): 0x7E80,  # 2^126
    ("mxfp4", FLOAT16): 0x7400,  # 2^14
}
_MANTISSA = {BFLOAT16: 7, FLOAT16: 10}
AND_OR, AND_XOR = "0xEA", "0x6A"  # lop3: (a & b) | c, (a & b) ^ c


def assembly(form: Format, dtype: torch.dtype) -> tuple[str, ...] | None:
    """For each part of a word, PTX that turns two words ($1) into two floats of a 16-bit dtype
    ($0), without error; None for other dtypes.
    """
    if dtype not in _NAMES:
        return None
    name = _NAMES[dtype]
    if form.kind != "int":
        lines = [_small_float(form.kind, form.bits, part, name) for part in range(16 // form.bits)]
    elif form.in_nibbles:
        lines = [_nibble(part, name) for part in range(4)]
    else:
        lines = [_byte(part, name) for part in range(2)]
    return tuple("{ .reg .b32 a, b, p, q; " + " ".join(each) + " }" for each in lines)


def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


def _shift(to: str, bits: int) -> str:
    """$1 moved to the left by this many bits, or to the right; into the neighbour's bits, too."""
    return f"{'shl' if bits > 0 else 'shr'}.b32 {to}, $1, {abs(bits)};"


def _fma(name: str, factor: int, addend: str) -> list[str]:
    """$0 = a * factor + addend."""
    return [f"mov.b32 p, {_twice(factor)};", f"fma.rn.{name} $0, a, p, {addend};"]


def _nibble(part: int, name: str) -> list[str]:
    """An integer joins the mantissa of a power of two, which is then subtracted with the 8."""
    base = _BASE[name]
    return [
        _shift("a", -4 * part),
        f"lop3.b32 a, a, {_twice(0xF)}, {_twice(base)}, {AND_OR};",
        f"mov.b32 q, {_twice((base + 8) | 0x8000)};",
        *_fma(name, _ONE[name], "q"),
    ]


def _byte(part: int, name: str) -> list[str]:
    """In bfloat16 the mantissa of 128 has room for 7 bits; the sign's bit makes 256 of another 128,
    and the difference is the integer. In float16 it has room for all 8.
    """
    move = _shift("a", -8 * part)
    if name == FLOAT16:
        join = f"lop3.b32 a, a, {_twice(0xFF)}, {_twice(0x6480)}, {AND_XOR};"
        return [move, join, f"mov.b32 q, {_twice(0xE480)};", *_fma(name, _ONE[name], "q")]
    return [
        move,
        f"lop3.b32 q, a, {_twice(0x7F)}, {_twice(0x4300)}, {AND_OR};",
        f"lop3.b32 a, a, {_twice(0x80)}, {_twice(0x4300)}, {AND_OR};",
        *_fma(name, _MINUS_ONE[name], "q"),
    ]


def _small_float(kind: str, bits: int, part: int, name: str) -> list[str]:
    """Sign, exponent and mantissa go where the wider float has them."""
    size, mantissa = _SMALL[kind]
    lowest = _MANTISSA[name] - mantissa
    field = ((1 << size) - 1) << lowest
    return [
        _shift("b", lowest - bits * part),
        f"and.b32 b, b, {_twice(field)};",
        _shift("a", 15 - (bits * part + size)),
        f"lop3.b32 a, a, {_twice(0x8000)}, b, {AND_OR};",
        f"mov.b32 q, {_twice(0x8000)};",
        *_fma(name, _FACTOR[kind, name], "q"),
    ]
