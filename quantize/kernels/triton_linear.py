"""Triton kernels that multiply up to 16 rows by a weight [N, K]: a norm before, an activation or a
residual after, in one launch. They read every weight once.

A program has BLOCK_N rows of the weight and splits the columns over its warps: warp s takes blocks
s, s + SLICES, ... of them, as one entry of a batched `tl.dot`, and the warps' sums are added in
pairs at the end. Weights are the left operand, ROW_COUNT rows of x (a power of two) the right one;
rows that are not there are zeros. So the order in which a row of x is summed depends on the
weight's shape and the configuration of the launch, never on how many rows there are or which one
it is.

Only here is Triton imported; `quantize.kernels.cuda` imports this file when it first launches.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes are pointers, whatever points; its types are in the docstrings.)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Under TRITON_INTERPRET=1, which knows no inline assembly and no bfloat16 arithmetic.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
STATISTICS = tl.constexpr(1024)  # columns of x that are read together for a norm


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until the kernel in front has ended and its results are there; lets the next one come."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _rounded(wide, DTYPE: tl.constexpr):
    """float32 to the nearest number of a dtype; the interpreter's own cast cuts bits off."""
    if INTERPRETED and DTYPE is tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        wide = tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide)
    return wide.to(DTYPE)


@triton.jit
def _row_sum(tile, ROW_COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[ROW_COUNT, 1024] -> [ROW_COUNT], neighbours added to neighbours: an order that does not
    depend on how the compiler lays out so many rows.
    """
    tl.static_assert(WIDTH == 1024)
    for step in tl.static_range(10):
        tile = tl.sum(tl.reshape(tile, [ROW_COUNT, WIDTH >> (step + 1), 2]), axis=2)
    return tl.reshape(tile, [ROW_COUNT])


@triton.jit
def _statistics(x, M, K, eps, NORM: tl.constexpr, ROW_COUNT: tl.constexpr):
    """Mean (0 for RMSNorm) and 1 / deviation of the rows of x, float32 [ROW_COUNT]."""
    m = tl.arange(0, ROW_COUNT)
    k = tl.arange(0, STATISTICS)
    here = x + m[:, None] * K + k[None, :]
    is_row = m[:, None] < M
    mean = tl.zeros([ROW_COUNT], tl.float32)
    if NORM == "layer":
        total = tl.zeros([ROW_COUNT, STATISTICS], tl.float32)
        for start in tl.range(0, K, STATISTICS, loop_unroll_factor=4):
            inside = is_row & (start + k[None, :] < K)
            total += tl.load(here + start, mask=inside, other=0.0).to(tl.float32)
        mean = _row_sum(total, ROW_COUNT, STATISTICS) / K
    squares = tl.zeros([ROW_COUNT, STATISTICS], tl.float32)
    for start in tl.range(0, K, STATISTICS, loop_unroll_factor=4):
        inside = is_row & (start + k[None, :] < K)
        wide = tl.load(here + start, mask=inside, other=0.0).to(tl.float32)
        wide = tl.where(inside, wide - mean[:, None], 0.0)
        squares += wide * wide
    return mean, tl.rsqrt(_row_sum(squares, ROW_COUNT, STATISTICS) / K + eps)


@triton.jit
def _normed(tile, mean, inverse, weight, bias, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of x under its norm, rounded where gptfast's RMSNorm and torch's LayerNorm round."""
    wide = tile.to(tl.float32)
    if NORM == "layer":
        wide = (wide - mean) * inverse * weight.to(tl.float32)
        if bias is not None:
            wide += bias.to(tl.float32)
        return _rounded(wide, DTYPE)
    elif NORM == "rms_offset":
        return _rounded(wide * inverse * (1.0 + weight.to(tl.float32)), DTYPE)
    else:
        wide = wide * inverse
        return _rounded(_rounded(wide, DTYPE).to(tl.float32) * weight.to(tl.float32), DTYPE)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == "gelu_quick":
        y = y * tl.sigmoid(1.702 * y)
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    return y


@triton.jit
def _dot(weight, x, total):
    """total [S, N, M] + weight [S, N, K] times x [S, K, M], in float32. (Interpreted, the product
    is in float64: NumPy's order of sums depends on M.)
    """
    if INTERPRETED:
        return total + tl.dot(weight.to(tl.float64), x.to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(weight, x, total, input_precision="ieee")


@triton.jit
def _over_slices(total, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, ROW_COUNT: tl.constexpr):
    """[SLICES, BLOCK_N, ROW_COUNT] -> its sum over the slices, in pairs."""
    for step in tl.static_range(6):
        if SLICES >> step > 1:
            total = tl.reshape(total, [SLICES >> (step + 1), 2, BLOCK_N, ROW_COUNT])
            total = tl.sum(total, axis=1)
    return tl.reshape(total, [BLOCK_N, ROW_COUNT])


@triton.jit
def _finish(
    y, up, rows, bias, residual, out, part, M, num_out, multiplier,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, ROW_COUNT: tl.constexpr,
):  # fmt: skip
    """Sums y (and up) [rows, ROW_COUNT] of one program: on to `out`, or to `part` where several
    programs have a share of each sum.
    """
    m = tl.arange(0, ROW_COUNT)
    inside = (rows[:, None] < num_out) & (m[None, :] < M)
    place = m[None, :].to(tl.int64) * num_out + rows[:, None]
    if SPLITS > 1:
        part += tl.program_id(1).to(tl.int64) * M * num_out * (2 if GATED else 1)
        tl.store(part + place, y, mask=inside)
        if GATED:
            tl.store(part + M * num_out + place, up, mask=inside)
    else:
        _store(y, up, rows[:, None], place, inside, bias, residual, out, num_out, multiplier,
               GATED, ACTIVATION)  # fmt: skip


@triton.jit
def _store(
    y, up, row, place, inside, bias, residual, out, num_out, multiplier,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    if bias is not None:
        y += tl.load(bias + row, mask=row < num_out, other=0.0).to(tl.float32)
    y = _activated(y, ACTIVATION)
    if GATED:
        if bias is not None:
            up += tl.load(bias + num_out + row, mask=row < num_out, other=0.0).to(tl.float32)
        y *= up
    if residual is not None:
        y = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) + multiplier * y
    tl.store(out + place, _rounded(y, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def plain_linear(
    x, weight, bias, norm_weight, norm_bias, residual, out, part, M, eps, multiplier,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, ROW_COUNT: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, N] (or N / 2 where GATED) from x [M, K] and weight [N, K] of the same dtype."""
    _wait(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = SLICES * BLOCK_K
    NUM_OUT: tl.constexpr = N // 2 if GATED else N
    EVEN: tl.constexpr = K % (STEP * SPLITS) == 0
    SHARE: tl.constexpr = (K + STEP * SPLITS - 1) // (STEP * SPLITS) * STEP  # columns of a program
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * SHARE
    m = tl.arange(0, ROW_COUNT)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_row = m[None, None, :] < M
    if NORM is not None:
        mean, inverse = _statistics(x, M, K, eps, NORM, ROW_COUNT)
    # Rows beyond the last read the last one again, and are not stored.
    row = tl.minimum(rows, NUM_OUT - 1).to(tl.int64) * K
    from_weight = weight + row[None, :, None] + k[:, None, :]
    from_x = x + m[None, None, :] * K + k[:, :, None]
    y = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
    up = tl.zeros([SLICES, BLOCK_N, ROW_COUNT], tl.float32)
    for step in tl.range(0, SHARE, STEP, num_stages=NUM_STAGES):
        start = first + step
        if EVEN:
            tile = tl.load(from_x + start, mask=is_row, other=0.0)
            block = tl.load(from_weight + start)
        else:
            inside = start + k < K
            tile = tl.load(from_x + start, mask=is_row & inside[:, :, None], other=0.0)
            block = tl.load(from_weight + start, mask=inside[:, None, :], other=0.0)
        if NORM is not None:
            inside = start + k < K
            of_norm = tl.load(norm_weight + start + k, mask=inside, other=0.0)[:, :, None]
            of_bias = None
            if norm_bias is not None:
                of_bias = tl.load(norm_bias + start + k, mask=inside, other=0.0)[:, :, None]
            tile = _normed(tile, mean[None, None, :], inverse[None, None, :], of_norm, of_bias,
                           NORM, DTYPE)  # fmt: skip
        y = _dot(block, tile, y)
        if GATED:
            beyond = from_weight + NUM_OUT * K + start
            if EVEN:
                block = tl.load(beyond)
            else:
                block = tl.load(beyond, mask=inside[:, None, :], other=0.0)
            up = _dot(block, tile, up)
    y = _over_slices(y, SLICES, BLOCK_N, ROW_COUNT)
    up = _over_slices(up, SLICES, BLOCK_N, ROW_COUNT)
    _finish(y, up, rows, bias, residual, out, part, M, NUM_OUT, multiplier,
            GATED, ACTIVATION, SPLITS, ROW_COUNT)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def combine(
    part, bias, residual, out, M, multiplier,
    NUM_OUT: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds the shares [SPLITS, 1 or 2, M, NUM_OUT] of the sums in their order and finishes them."""
    _wait(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    inside = row < NUM_OUT
    place = m * NUM_OUT + row
    y = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    size = M * NUM_OUT
    for _ in tl.static_range(SPLITS):
        y += tl.load(part + place, mask=inside, other=0.0)
        part += size
        if GATED:
            up += tl.load(part + place, mask=inside, other=0.0)
            part += size
    _store(y, up, row, place, inside, bias, residual, out, NUM_OUT, multiplier, GATED, ACTIVATION)


@triton.jit
def norm_rows(
    x, weight, bias, out, eps,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, K] = norm(x [M, K]), a program for each row, with the numbers of the prologue."""
    _wait(PDL)
    DTYPE: tl.constexpr = x.dtype.element_ty
    x += tl.program_id(0).to(tl.int64) * K
    out += tl.program_id(0).to(tl.int64) * K
    mean, inverse = _statistics(x, 1, K, eps, NORM, 1)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < K
        of_bias = None
        if bias is not None:
            of_bias = tl.load(bias + k, mask=inside, other=0.0)
        of_norm = tl.load(weight + k, mask=inside, other=0.0)
        tile = tl.load(x + k, mask=inside, other=0.0)
        tl.store(out + k, _normed(tile, mean, inverse, of_norm, of_bias, NORM, DTYPE), mask=inside)
