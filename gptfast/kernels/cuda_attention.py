"""The parts of a decode step that are no linears, on CUDA: heads into the cache, attention over it,
norms behind a sub-layer. Each launches kernels of triton_attention.py and has a plain twin.

Nothing here waits for the device: how much of the cache is read follows from positions that only
the device knows, so one CUDA graph serves all lengths.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.kernels.attention import attention_on_any_device
from gptfast.kernels.parts import Norm
from gptfast.kernels.rounding import LIMITS
from quantize.kernels.cuda import DTYPES, why_no_triton

# Tokens that are attended for at once; more are a prompt, which other kernels read faster.
MAX_TOKENS = 16
MAX_HEAD_DIM = 256
# As in triton_attention.py.
BLOCK_SLOTS = 64
BLOCK_PAIRS = 16
# Programs that read one row's cache: two for each multiprocessor of an H100. One number for all
# devices and batches, because it decides the order in which a row is summed.
NUM_PROGRAMS = 256
MAX_PARTS = 64
# Bytes of keys and values that a program has on their way. Two share a multiprocessor, of which
# small GPUs have 99 KiB for one.
BYTES_IN_FLIGHT = 64 << 10


class Slots(Protocol):
    """A layer's cache, as gptfast/cache.py says."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor | None: ...
    @property
    def key_scales(self) -> Tensor | None: ...
    @property
    def value_scales(self) -> Tensor | None: ...


def write_heads(
    qkv: Tensor,
    cache: Slots,
    positions: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    num_heads: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    interleaved: bool = False,
    by_position: bool = False,
) -> Tensor:
    """Queries [B, T, H, D] of qkv [B, T, (H + 2 H_kv) D], normed and rotated; keys, so too, and
    values go to the slots `positions` [B, T], rounded where the cache has scales.

    cos and sin are [B, T, 1, R / 2], float32, of the tokens, or [1, S + 1, 1, R / 2] of all slots;
    None: nothing is rotated. Both norms are of a kind.
    """
    from gptfast.kernels.triton_attention import split_heads  # only where Triton is

    assert cache.values is not None and (q_norm is None) == (k_norm is None)
    (num_rows, num_tokens), num_kv_heads = positions.shape, cache.keys.size(1)
    dim, num_slots = cache.keys.size(-1), cache.keys.size(2) - 1
    cos, sin = (None, None) if cos_sin is None else cos_sin
    queries = qkv.new_empty(num_rows, num_tokens, num_heads, dim)
    with torch.cuda.device_of(qkv):
        split_heads[num_rows * num_tokens, num_heads + 2 * num_kv_heads](
            qkv.contiguous(),
            queries,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            positions,
            cos,
            sin,
            None if q_norm is None else q_norm.weight,
            None if q_norm is None else q_norm.bias,
            None if k_norm is None else k_norm.weight,
            None if k_norm is None else k_norm.bias,
            num_tokens,
            num_slots,
            0.0 if q_norm is None else q_norm.eps,
            0.0 if k_norm is None else k_norm.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            DIM=dim,
            BLOCK_DIM=_power_of_two(dim),
            ROTARY=0 if cos is None else 2 * cos.size(-1),
            BY_POSITION=by_position,
            INTERLEAVED=interleaved,
            LIMIT=0 if cache.key_scales is None else int(LIMITS[cache.keys.dtype]),
            num_warps=1,
            **_norm_kind(q_norm),
        )
    return queries


def why_no_attention(
    keys: Tensor, values: Tensor, key_scales: Tensor | None, dtype: torch.dtype
) -> str | None:
    """Why `decode_attention` does not read such a cache with queries in `dtype`; None where it
    does.
    """
    if keys.shape != values.shape or (key_scales is not None and key_scales.size(-1) != 1):
        return "keys and values are of different sizes"
    if keys.size(-1) > MAX_HEAD_DIM:
        return f"heads of {keys.size(-1)} are larger than {MAX_HEAD_DIM}"
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "the cache has gaps"
    if dtype not in DTYPES or (key_scales is None and keys.dtype != dtype):
        return f"there is no kernel for queries in {dtype} and keys in {keys.dtype}"
    return why_no_triton(keys.device)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """What `attention_reference` means (attention.py), for at most 16 tokens; padding becomes
    zeros.

    A row's cache is read by a fixed number of programs, which take turns at its blocks of slots.
    So the work is even at every length, and a token has the same bits alone, in a batch and among
    the tokens of a draft.
    """
    from gptfast.kernels.triton_attention import attend_parts, join_parts  # as above

    (num_rows, num_tokens, num_heads, dim), num_kv_heads = q.shape, keys.size(1)
    num_slots, num_parts = keys.size(2) - 1, _num_parts(keys)
    sizes: dict[str, Any] = {
        "NUM_HEADS": num_heads,
        "DIM": dim,
        "BLOCK_DIM": _power_of_two(dim),
        "NUM_PARTS": num_parts,
        "WINDOW": window or 0,
    }
    num_blocks = -(-num_tokens * (num_heads // num_kv_heads) // BLOCK_PAIRS)
    shape = (num_rows, num_tokens, num_heads, num_parts)
    tops, totals = q.new_empty((2, *shape), dtype=torch.float32)
    sums, out = q.new_empty((*shape, dim), dtype=torch.float32), torch.empty_like(q)
    with torch.cuda.device_of(q):
        attend_parts[num_parts, num_kv_heads * num_blocks, num_rows](
            q,
            keys,
            values,
            key_scales,
            value_scales,
            positions,
            slopes,
            sums,
            tops,
            totals,
            num_tokens,
            num_slots,
            dim**-0.5 if scale is None else scale,
            softcap or 1.0,
            NUM_KV_HEADS=num_kv_heads,
            HAS_SOFTCAP=softcap is not None,
            HAS_SLOPES=slopes is not None,
            HAS_SCALES=key_scales is not None,
            num_warps=8 if q.dtype == torch.float32 else 4,
            num_stages=_num_stages(keys),
            **sizes,
        )
        join_parts[num_rows * num_tokens, num_heads](
            sums,
            tops,
            totals,
            positions,
            sinks,
            out,
            num_slots,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            **sizes,
        )
    return out


def attention_on_cuda(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bound: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The op of attention.py: few tokens by the kernels here, prompts and latents as anywhere."""
    scoring = (scale, window, softcap, sinks, slopes, key_scales, value_scales)
    is_short = q.size(0) * q.size(1) <= MAX_TOKENS
    if is_short and why_no_attention(keys, values, key_scales, q.dtype) is None:
        return decode_attention(q.contiguous(), keys, values, positions.contiguous(), *scoring)
    return attention_on_any_device(q, keys, values, positions, bound, *scoring)


torch.library.impl("gptfast::attention", "cuda", attention_on_cuda)


def add_normed(x: Tensor, y: Tensor, norm: Norm, multiplier: float = 1.0) -> Tensor:
    """x + multiplier * norm(y), for x and y [..., K]."""
    from gptfast.kernels import triton_attention  # as above

    x, y = x.contiguous(), y.contiguous()
    out, dim = torch.empty_like(x), x.size(-1)
    with torch.cuda.device_of(x):
        triton_attention.add_normed[(x.numel() // dim,)](
            x,
            y,
            norm.weight,
            norm.bias,
            out,
            norm.eps,
            multiplier,
            DIM=dim,
            BLOCK_DIM=_power_of_two(dim),
            num_warps=8,
            **_norm_kind(norm),
        )
    return out


def _norm_kind(norm: Norm | None) -> dict[str, Any]:
    if norm is None:
        return {"NORM": "none", "OFFSET": False, "HAS_BIAS": False}
    kind = "layer" if norm.is_layer else "rms"
    return {"NORM": kind, "OFFSET": norm.offset, "HAS_BIAS": norm.bias is not None}


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, and 16, which products need."""
    return max(16, 1 << (size - 1).bit_length())


def _num_parts(keys: Tensor) -> int:
    """A power of two; no more than there are blocks of slots in a row."""
    wanted = max(4, min(MAX_PARTS, NUM_PROGRAMS // keys.size(1)))
    num_blocks = -(-(keys.size(2) - 1) // BLOCK_SLOTS)
    return min(1 << (wanted.bit_length() - 1), 1 << (num_blocks - 1).bit_length())


def _num_stages(keys: Tensor) -> int:
    """One more than blocks that are read ahead."""
    block_bytes = 2 * BLOCK_SLOTS * _power_of_two(keys.size(-1)) * keys.itemsize
    return min(4, 1 + BYTES_IN_FLIGHT // block_bytes)
