"""Triton kernels of a decode step, all but its linears: heads on their way into the cache,
attention over the used slots, norms behind a sub-layer.

Knows pointers and sizes; cuda_attention.py checks and launches. Letters: B rows, T new tokens of
each, M = B * T, H heads, D head size, S slots of a row (and a spare one).

Arithmetic is in float32, and every narrower number is widened by hand before it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Slots that are read at a time, and pairs of token and head that share them: the smallest tile that
# matrix units take. Both fixed, so that a row is summed in one order whatever else is computed.
BLOCK_SLOTS = tl.constexpr(64)
BLOCK_PAIRS = tl.constexpr(16)
# 1.5 * 2^23: adding and subtracting it rounds a float32 to an integer, halves to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def split_heads(
    qkv,  # [M, (H + 2 H_kv) D]
    queries,  # out: [M, H, D]
    keys,  # in place: [B, H_kv, S + 1, D], like values
    values,
    key_scales,  # in place: [B, H_kv, S + 1] where LIMIT, like value_scales
    value_scales,
    positions,  # [M]
    cos,  # [M, ROTARY / 2], or BY_POSITION [S + 1, ROTARY / 2]; like sin
    sin,
    q_weight,  # [D], like the three others of the norms
    q_bias,
    k_weight,
    k_bias,
    num_tokens,  # T
    num_slots,  # S
    q_eps,
    k_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BY_POSITION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,  # "none", "rms" or "layer"
    OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest stored number of a cache with scales, else 0
):
    """One head of one token: norm and rotation of a query or key; keys and values go to the
    cache.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = qkv.dtype.element_ty
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    position = tl.load(positions + token)
    x_at = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM) + head * DIM
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    # Where the number comes from that ends up at each place, and the one that it is rotated with.
    HALF: tl.constexpr = ROTARY // 2
    pair = tl.where(dims < HALF, dims, dims - HALF)
    is_turned = (dims < ROTARY) & (head < NUM_HEADS + NUM_KV_HEADS)
    source, partner = dims, tl.where(dims < HALF, dims + HALF, dims - HALF)
    if INTERLEAVED:
        source = tl.where(is_turned, tl.where(dims < HALF, 2 * pair, 2 * pair + 1), dims)
        partner = tl.where(dims < HALF, 2 * pair + 1, 2 * pair)
    x = tl.load(x_at + source, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_at + partner, mask=is_turned & inside, other=0.0).to(tl.float32)
    if NORM != "none":  # noqa: SIM102 (decided while this is compiled, the other one is not)
        if head < NUM_HEADS + NUM_KV_HEADS:
            eps = tl.where(is_query, q_eps, k_eps)
            mean = 0.0
            if NORM == "layer":
                mean = tl.sum(x, axis=0) / DIM
            centered = tl.where(inside, x - mean, 0.0)
            factor = tl.rsqrt(tl.sum(centered * centered, axis=0) / DIM + eps)
            weight = q_weight if is_query else k_weight
            bias = weight  # unread, unless there are biases
            if HAS_BIAS:
                bias = q_bias if is_query else k_bias
            x, other = (x - mean) * factor, (other - mean) * factor
            x = _weighted(x, weight + source, bias + source, inside, NORM, OFFSET, HAS_BIAS, dtype)
            both = is_turned & inside
            weight, bias = weight + partner, bias + partner
            other = _weighted(other, weight, bias, both, NORM, OFFSET, HAS_BIAS, dtype)
    if ROTARY > 0:
        turn = (position if BY_POSITION else token) * HALF + pair
        c = tl.load(cos + turn, mask=is_turned, other=1.0)
        s = tl.load(sin + turn, mask=is_turned, other=0.0)
        x = x * c + tl.where(dims < HALF, -other, other) * s
    if is_query:
        tl.store(queries + (token * NUM_HEADS + head) * DIM + dims, x.to(dtype), mask=inside)
    else:
        row = token // num_tokens
        kv_head = tl.where(is_value, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
        slot = (row * NUM_KV_HEADS + kv_head).to(tl.int64) * (num_slots + 1) + position
        x = x.to(dtype).to(tl.float32)  # a cache with scales rounds what the others store
        if is_value:
            _store_vector(values, value_scales, slot, x, dims, inside, DIM, LIMIT)
        else:
            _store_vector(keys, key_scales, slot, x, dims, inside, DIM, LIMIT)


@triton.jit
def _weighted(
    x,
    weight_at,
    bias_at,
    mask,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Normalised numbers times their weights, rounded to `dtype` where layers.py does."""
    weight = tl.load(weight_at, mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = x * weight
        if HAS_BIAS:
            x += tl.load(bias_at, mask=mask, other=0.0).to(tl.float32)
    elif OFFSET:
        x = x * (1.0 + weight)
    else:
        x = x.to(dtype).to(tl.float32) * weight
    return x.to(dtype).to(tl.float32)


@triton.jit
def _store_vector(stored, scales, slot, x, dims, inside, DIM: tl.constexpr, LIMIT: tl.constexpr):
    """x [D], zero beyond, to a slot; rounded as rounding.py does where the cache has scales."""
    dtype: tl.constexpr = stored.dtype.element_ty
    if LIMIT > 0:
        x = tl.where(inside, x, 0.0)
        tiniest: tl.constexpr = 1.1754943508222875e-38
        scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), axis=0), LIMIT * 1.0), tiniest)
        # The largest of numbers with NaN among them is a number; what is stored must not be.
        num_nans = tl.sum((x != x).to(tl.int32), axis=0)
        scale = tl.where(num_nans > 0, float("nan"), scale)
        tl.store(scales + slot, scale)
        x = tl.math.div_rn(x, tl.zeros_like(x) + scale)
        step = tl.full(x.shape, 1.0, tl.float32)
        if dtype != tl.int8:  # e4m3: the leading bit and three more, from 2^-6 on
            leading = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            step = tl.maximum(leading, 0.015625) * 0.125
        x = (x + step * _TO_INTEGER) - step * _TO_INTEGER
        if dtype == tl.int8:
            tl.store(stored + slot * DIM + dims, x.to(tl.int32).to(tl.int8), mask=inside)
        else:
            tl.store(stored + slot * DIM + dims, x.to(dtype), mask=inside)
    else:
        tl.store(stored + slot * DIM + dims, x.to(dtype), mask=inside)


@triton.jit
def attend_parts(
    queries,  # [M, H, D]
    keys,  # [B, H_kv, S + 1, D], like values
    values,
    key_scales,  # [B, H_kv, S + 1] where HAS_SCALES, like value_scales
    value_scales,
    positions,  # [M]
    slopes,  # [H] where HAS_SLOPES
    sums,  # out: [M, H, NUM_PARTS, D], weighted values of each part
    tops,  # out: [M, H, NUM_PARTS], the largest score of each part
    totals,  # out: [M, H, NUM_PARTS], the sum of its weights
    num_tokens,  # T
    num_slots,  # S
    scale,
    softcap,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Part p of the slots of a row are its blocks p, p + NUM_PARTS, ... of BLOCK_SLOTS. Which
    blocks are read follows from the positions, here: a part with none ends at once. What a token
    makes of a part does not depend on the tokens beside it: a block that it does not see adds
    zeros.
    """
    part, lane, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    num_blocks = tl.cdiv(num_tokens * GROUP, BLOCK_PAIRS)  # of pairs, for each key/value head
    kv_head = lane // num_blocks
    pairs = (lane % num_blocks) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    token = row * num_tokens + pairs // GROUP
    head = kv_head * GROUP + pairs % GROUP
    inside = pairs < num_tokens * GROUP
    position = tl.load(positions + token, mask=inside, other=num_slots).to(tl.int32)
    is_used = position < num_slots  # padding sees nothing
    last = tl.max(tl.where(is_used, position, -1), axis=0)
    first = 0
    if WINDOW > 0:
        earliest = tl.min(tl.where(is_used, position, num_slots), axis=0)
        first = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_SLOTS
    first += (part + NUM_PARTS - first % NUM_PARTS) % NUM_PARTS
    if first * BLOCK_SLOTS > last:
        return

    dims = tl.arange(0, BLOCK_DIM)
    in_head = dims < DIM
    pair_at = token * NUM_HEADS + head
    q_mask = inside[:, None] & in_head[None, :]
    q = tl.load(queries + pair_at[:, None] * DIM + dims[None, :], mask=q_mask, other=0.0)
    dtype: tl.constexpr = queries.dtype.element_ty
    base = (row * NUM_KV_HEADS + kv_head).to(tl.int64) * (num_slots + 1)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=inside, other=0.0).to(tl.float32)

    top = tl.full([BLOCK_PAIRS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_PAIRS], tl.float32)
    weighted = tl.zeros([BLOCK_PAIRS, BLOCK_DIM], tl.float32)
    for block in range(first, last // BLOCK_SLOTS + 1, NUM_PARTS):
        slots = block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        is_filled = slots <= last
        mask = is_filled[:, None]
        if BLOCK_DIM != DIM:
            mask = mask & in_head[None, :]
        k_at = keys + base * DIM + slots[:, None] * DIM + dims[None, :]
        k = _operand(tl.load(k_at, mask=mask, other=0.0), dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SCALES:
            scores *= tl.load(key_scales + base + slots, mask=is_filled, other=0.0)[None, :]
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        distance = position[:, None] - slots[None, :]
        if HAS_SLOPES:
            scores -= slope[:, None] * distance.to(tl.float32)
        is_seen = (distance >= 0) & is_used[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (distance < WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))

        higher = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(top - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        v_at = values + base * DIM + slots[:, None] * DIM + dims[None, :]
        v = _operand(tl.load(v_at, mask=mask, other=0.0), dtype)
        if HAS_SCALES:
            weights *= tl.load(value_scales + base + slots, mask=is_filled, other=0.0)[None, :]
        weighted = tl.dot(weights.to(dtype), v, weighted * fade[:, None], input_precision="ieee")
        top = higher

    out = pair_at * NUM_PARTS + part
    is_out = inside & is_used
    tl.store(tops + out, top, mask=is_out)
    tl.store(totals + out, total, mask=is_out)
    sums_at = sums + out[:, None] * DIM + dims[None, :]
    tl.store(sums_at, weighted, mask=is_out[:, None] & in_head[None, :])


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """Stored numbers as a product takes them: eight bits widen without loss."""
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)
    return x


@triton.jit
def join_parts(
    sums,  # as attend_parts leaves them
    tops,
    totals,
    positions,  # [M]
    sinks,  # [H] where HAS_SINKS
    out,  # out: [M, H, D]
    num_slots,  # S
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Softmax over the parts of one head of one token. Parts that its position does not reach were
    never written. Padding becomes zeros.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // BLOCK_SLOTS
    parts = tl.arange(0, NUM_PARTS)
    turn = (parts + NUM_PARTS - first % NUM_PARTS) % NUM_PARTS
    is_read = (turn <= position // BLOCK_SLOTS - first) & (position < num_slots)
    at = (token * NUM_HEADS + head) * NUM_PARTS + parts
    tops_here = tl.load(tops + at, mask=is_read, other=float("-inf"))
    totals_here = tl.load(totals + at, mask=is_read, other=0.0)
    top = tl.max(tops_here, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    factors = tl.exp(tops_here - top)
    total = tl.sum(factors * totals_here, axis=0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    dims = tl.arange(0, BLOCK_DIM)
    in_head = dims < DIM
    mask = is_read[:, None] & in_head[None, :]
    sums_here = tl.load(sums + at[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    y = tl.sum(sums_here * factors[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    y_at = out + (token * NUM_HEADS + head) * DIM + dims
    tl.store(y_at, y.to(out.dtype.element_ty), mask=in_head)


@triton.jit
def add_normed(
    x,  # [M, K]
    y,  # [M, K]
    weight,  # [K], like bias
    bias,
    out,  # out: [M, K]
    eps,
    multiplier,
    DIM: tl.constexpr,  # K
    BLOCK_DIM: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """x + multiplier * norm(y) of one token."""
    at = tl.program_id(0) * DIM
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < DIM
    dtype: tl.constexpr = y.dtype.element_ty
    wide = tl.load(y + at + dims, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        wide = tl.where(inside, wide - tl.sum(wide, axis=0) / DIM, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
    weight_at, bias_at = weight + dims, weight + dims
    if HAS_BIAS:
        bias_at = bias + dims
    normed = _weighted(wide, weight_at, bias_at, inside, NORM, OFFSET, HAS_BIAS, dtype)
    stream = tl.load(x + at + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at + dims, (stream + multiplier * normed).to(dtype), mask=inside)
