"""Triton kernels over quantized weights: as triton_linear.py, with the weight's numbers unpacked in
registers. quantize/kernels/words.py says how they are packed.

Part j of C words in a row are C columns in a row, and multiply C columns of x as they come.
Integers (and small floats) become 16-bit floats without error, and where groups of columns have a
scale, the product of a group is scaled in float32.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from quantize.kernels.triton_linear import (
    INTERPRETED,
    _dot,
    _finish,
    _normed,
    _over_slices,
    _rounded,
    _statistics,
    _wait,
)


@triton.jit
def _numbers(words, j: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr):
    """Part j of each word, an integer or a small float, in float32 and exact."""
    code = (words.to(tl.int32) >> (BITS * j)) & ((1 << BITS) - 1)
    if KIND == "int":
        if BITS == 4:
            return (code - 8).to(tl.float32)
        else:
            return ((code ^ 128) - 128).to(tl.float32)
    elif KIND == "fp8":
        return _small_float(code, 8, 3, 7)
    else:
        return _small_float(code, 4, 1, 1)


@triton.jit
def _small_float(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Exponent and mantissa go where float32 has them; below the least exponent they are an
    integer times the least number.
    """
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA)
    sign = (code >> (BITS - 1)) << 31
    code = code & ((1 << (BITS - 1)) - 1)
    wide = (code << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    small = (code.to(tl.float32) * LEAST).to(tl.int32, bitcast=True)
    wide = tl.where(code < (1 << MANTISSA), small, wide)
    return (wide | sign).to(tl.float32, bitcast=True)


@triton.jit
def _unpacked(
    words, j: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Part j of each word as DTYPE; by PTX for two words at a time where there is some."""
    if ASSEMBLY is None:
        return _numbers(words, j, KIND, BITS).to(DTYPE)
    else:
        bits = tl.inline_asm_elementwise(
            ASSEMBLY[j], "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
        return bits.to(DTYPE, bitcast=True)


@triton.jit
def _less(numbers, zeros, NARROW: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers [S, N, C] less the zeros [S, N] of their rows, rounded once."""
    if NARROW and not INTERPRETED:
        return numbers - zeros.to(DTYPE)[:, :, None]
    else:
        return _rounded(numbers.to(tl.float32) - zeros[:, :, None], DTYPE)


@triton.jit
def _half(words, half, KIND: tl.constexpr):
    """One of the two 16-bit floats of 32-bit words, or the one 32-bit float, as float32."""
    if KIND == "float32":
        return words.to(tl.float32, bitcast=True)
    elif KIND == "bfloat16":
        return ((words >> (16 * half)) << 16).to(tl.float32, bitcast=True)
    else:
        return (words >> (16 * half)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def packed_linear(
    x, words, scales, zeros, bias, norm_weight, norm_bias, residual, out, part, M, eps, multiplier,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, ASSEMBLY: tl.constexpr,
    NORM: tl.constexpr, ROW_COUNT: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr, NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [M, N] (or N / 2 where GATED) from x [M, K] and words [tiles, chunks, 16, C]. Columns
    have one scale (and zero) a row, [rows], where GROUP is None, else one for each GROUP of them,
    as 32-bit words [.., rows] of dtypes SCALE and ZERO.
    """
    _wait(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 16 // BITS
    CHUNK: tl.constexpr = PARTS * C  # columns of C words
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    PADDED: tl.constexpr = (N + 15) // 16 * 16
    NUM_OUT: tl.constexpr = N // 2 if GATED else N
    SHARE: tl.constexpr = (CHUNKS + SLICES * SPLITS - 1) // (SLICES * SPLITS) * SLICES
    EVEN: tl.constexpr = SHARE * SPLITS * CHUNK == K
    # Groups of a chunk, and parts of a word in each.
    GROUPS: tl.constexpr = 1 if GROUP is None or GROUP >= CHUNK else CHUNK // GROUP
    TOGETHER: tl.constexpr = PARTS // GROUPS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROW_COUNT)
    c = tl.arange(0, C)
    slices = tl.program_id(1) * SHARE + tl.arange(0, SLICES)
    if NORM is not None:
        mean, inverse = _statistics(x, M, K, eps, NORM, ROW_COUNT)
        mean, inverse = mean[None, None, :], inverse[None, None, :]
    # Rows beyond the last read the last one again, and are not stored.
    row = tl.minimum(rows, NUM_OUT - 1)
    up_row = row + NUM_OUT
    from_words = words + (row // 16).to(tl.int64)[None, :, None] * (CHUNKS * 16 * C)
    from_words += (row % 16)[None, :, None] * C + c[None, None, :]
    from_up = words + (up_row // 16).to(tl.int64)[None, :, None] * (CHUNKS * 16 * C)
    from_up += (up_row % 16)[None, :, None] * C + c[None, None, :]
    from_x = x + m[None, None, :] * K + c[None, :, None]
    y = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
    up = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
    if GROUP is None and zeros is not None:
        same = tl.zeros([SLICES, BLOCK_N], tl.float32)
        row_zero = same + tl.load(zeros + row).to(tl.float32)[None, :]
        up_row_zero = same + tl.load(zeros + up_row * GATED).to(tl.float32)[None, :]
    for step in tl.range(0, SHARE, SLICES, num_stages=NUM_STAGES):
        chunk = slices + step
        is_there = (chunk < CHUNKS)[:, None]
        place = chunk[:, None, None] * (16 * C)
        if EVEN:
            block = tl.load(from_words + place)
            if GATED:
                up_block = tl.load(from_up + place)
        else:
            block = tl.load(from_words + place, mask=is_there[:, :, None], other=0)
            if GATED:
                up_block = tl.load(from_up + place, mask=is_there[:, :, None], other=0)
        for i in tl.static_range(GROUPS):
            if GROUP is not None:
                group = chunk * GROUPS + i if GROUPS > 1 else chunk * CHUNK // GROUP
                factor = _of_rows(scales, group, i, GROUPS, row, is_there, PADDED, SCALE)
                product = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
                if GATED:
                    up_factor = _of_rows(scales, group, i, GROUPS, up_row, is_there, PADDED, SCALE)
                    up_product = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
            if zeros is not None:
                if GROUP is None:
                    zero = row_zero
                    up_zero = up_row_zero
                else:
                    zero = _of_rows(zeros, group, i, GROUPS, row, is_there, PADDED, ZERO)
                    if GATED:
                        up_zero = _of_rows(zeros, group, i, GROUPS, up_row, is_there, PADDED, ZERO)
            for t in tl.static_range(TOGETHER):
                start = chunk * CHUNK + (i * TOGETHER + t) * C
                column = start[:, None] + c[None, :]
                inside = (column < K)[:, :, None]
                is_row = m[None, None, :] < M
                if EVEN:
                    tile = tl.load(from_x + start[:, None, None], mask=is_row, other=0.0)
                else:
                    tile = tl.load(from_x + start[:, None, None], mask=is_row & inside, other=0.0)
                if NORM is not None:
                    of_norm = tl.load(norm_weight + column, mask=column < K, other=0.0)[:, :, None]
                    of_bias = None
                    if norm_bias is not None:
                        of_bias = tl.load(norm_bias + column, mask=column < K, other=0.0)
                        of_bias = of_bias[:, :, None]
                    tile = _normed(tile, mean, inverse, of_norm, of_bias, NORM, DTYPE)
                numbers = _unpacked(block, i * TOGETHER + t, KIND, BITS, ASSEMBLY, DTYPE)
                if zeros is not None:
                    numbers = _less(numbers, zero, ZERO == "bfloat16", DTYPE)
                if GATED:
                    up_numbers = _unpacked(up_block, i * TOGETHER + t, KIND, BITS, ASSEMBLY, DTYPE)
                    if zeros is not None:
                        up_numbers = _less(up_numbers, up_zero, ZERO == "bfloat16", DTYPE)
                if GROUP is None:
                    y = _dot(numbers, tile, y)
                    if GATED:
                        up = _dot(up_numbers, tile, up)
                else:
                    product = _dot(numbers, tile, product)
                    if GATED:
                        up_product = _dot(up_numbers, tile, up_product)
            if GROUP is not None:
                y += product * factor[:, :, None]
                if GATED:
                    up += up_product * up_factor[:, :, None]
    y = _over_slices(y, SLICES, BLOCK_N, ROW_COUNT)
    up = _over_slices(up, SLICES, BLOCK_N, ROW_COUNT)
    if GROUP is None:
        y *= tl.load(scales + row).to(tl.float32)[:, None]
        up *= tl.load(scales + up_row * GATED).to(tl.float32)[:, None]
    _finish(y, up, rows, bias, residual, out, part, M, NUM_OUT, multiplier,
            GATED, ACTIVATION, SPLITS, ROW_COUNT)  # fmt: skip


@triton.jit
def _of_rows(
    words, group, i: tl.constexpr, GROUPS: tl.constexpr, row, is_there, PADDED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    if KIND == "float32":
        place = group[:, None] * PADDED + row[None, :]
    else:
        place = (group // 2)[:, None] * PADDED + row[None, :]
    word = tl.load(words + place, mask=is_there, other=0)
    if GROUPS > 1:
        return _half(word, i % 2, KIND)
    else:
        return _half(word, (group % 2)[:, None], KIND)


@triton.jit
def dequantize(
    words, scales, zeros, out,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The plain weight [N, K], computed in float32 and rounded to out's dtype: a program for a
    chunk of a tile.
    """
    PARTS: tl.constexpr = 16 // BITS
    CHUNKS: tl.constexpr = (K + PARTS * C - 1) // (PARTS * C)
    PADDED: tl.constexpr = (N + 15) // 16 * 16
    tile = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    r = tl.arange(0, 16)
    c = tl.arange(0, C)
    row = tile * 16 + r
    place = tl.program_id(0).to(tl.int64) * (16 * C) + r[:, None] * C + c[None, :]
    block = tl.load(words + place)
    for j in tl.static_range(PARTS):
        column = (chunk * PARTS + j) * C + c
        numbers = _numbers(block, j, KIND, BITS)
        if GROUP is None:
            scale = tl.load(scales + row).to(tl.float32)
            if zeros is not None:
                numbers -= tl.load(zeros + row).to(tl.float32)[:, None]
        else:
            group = (chunk * PARTS + j) * C // GROUP
            scale = _of_one(scales, group, row, PADDED, SCALE)
            if zeros is not None:
                numbers -= _of_one(zeros, group, row, PADDED, ZERO)[:, None]
        inside = (row[:, None] < N) & (column[None, :] < K)
        wide = _rounded(numbers * scale[:, None], out.dtype.element_ty)
        tl.store(out + row[:, None].to(tl.int64) * K + column[None, :], wide, mask=inside)


@triton.jit
def _of_one(words, group, row, PADDED: tl.constexpr, KIND: tl.constexpr):
    """Scale or zero [N] of one group."""
    index = group if KIND == "float32" else group // 2
    return _half(tl.load(words + index * PADDED + row), group % 2, KIND)
