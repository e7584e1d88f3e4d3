"""Attention of new tokens over the cached keys and values of their row, at a cost that follows the
used length.

`attention` is a `torch.library` op, opaque to the compiler: how many slots are read is decided on
the host at every call, without a recompilation. Its meaning is `attention_reference`.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.kernels.cpu_step import MAX_TOKENS, STEP
from gptfast.kernels.rounding import restore, widen

# Scores, or numbers of a mask, that are held at a time; longer prompts are read in parts.
MAX_SCORES = 1 << 24
# Up to so many tokens, numbers of eight bits are multiplied as they are and scales go to scores and
# weights; beyond, the slots are restored for the fused attention. In bfloat16 with 4000 slots of 8
# heads of 128 (one thread) that is 1.6 and 6.5 ms for 1 token, 8 and 18 for 16, 59 and 53 for 64.
MAX_TOKENS_UNRESTORED = 16
# On a CPU without a kernel so many tokens read the same slots: fewer leave out more of what
# none of them sees, more multiply faster. In bfloat16, 32 heads of 64 (4 of keys), two threads, ms
# for 512 tokens from slot 0 on: together 15.1, in parts of 256 10.2, 128 8.6, 64 10.9; from 2048:
# 71.6, 62.6, 61.0, 70.6.
TOKENS_TOGETHER = 128

# Not `custom_op`: that costs 14 us a call beside 2.5, and the first one imports the compiler (1 s).
torch.library.define(
    "gptfast::attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor? bound=None, "
    "float? scale=None, int? window=None, float? softcap=None, Tensor? sinks=None, "
    "Tensor? slopes=None, Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
)


def attention(
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
    """q [B, T, H, D], keys [B, H_kv, S + 1, D], values [B, H_kv, S + 1, E], positions [B, T]
    -> [B, T, H, E].

    The token at position p sees slots 0..p of its row, with `window` only the latest that many.
    Position S is padding: its result is finite and meaningless. `bound`, a number on the CPU, says
    that no position reaches it, for devices whose positions the host cannot read without waiting;
    None: all S slots may be used.

    Scores are `scale` (None: 1/sqrt(D)) times query times key; softcap c makes a score s
    c * tanh(s / c) (Gemma 2, 2408.00118); `slopes` [H] times the distance is taken off (ALiBi,
    2108.12409); `sinks` [H] are scores of a key that has no value (gpt-oss).

    Keys and values of eight bits a number (rounding.py) come with `key_scales` and `value_scales`
    [B, H_kv, S + 1, 1]; key scales [B, H_kv, S + 1, 2] are those of the first E numbers and of the
    others.
    """
    return torch.ops.gptfast.attention.default(
        q,
        keys,
        values,
        positions,
        bound,
        scale,
        window,
        softcap,
        sinks,
        slopes,
        key_scales,
        value_scales,
    )


@torch.library.register_fake("gptfast::attention")
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], values.size(-1))


def attention_reference(
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
    """The meaning of `attention`: softmax in float32 over all slots, those that a token does not
    see masked out.
    """
    num_slots, group = keys.size(2) - 1, q.size(2) // keys.size(1)
    if key_scales is not None and value_scales is not None:
        keys = restore(keys, key_scales, torch.float32, values.size(-1))
        values = restore(values, value_scales, torch.float32, values.size(-1))
    k, v = (t[:, :, :num_slots].float().repeat_interleave(group, dim=1) for t in (keys, values))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = q.transpose(1, 2).float() @ k.transpose(-1, -2) * scale  # [B, H, T, S]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    slots = torch.arange(num_slots, device=q.device)
    distance = positions.unsqueeze(-1) - slots  # [B, T, S]
    if slopes is not None:
        scores = scores - slopes.float().view(-1, 1, 1) * distance.unsqueeze(1)
    scores = scores.masked_fill(
        ~_seen(positions, slots, num_slots, window).unsqueeze(1), -torch.inf
    )
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., :num_slots]
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


def _seen(positions: Tensor, slots: Tensor, num_slots: int, window: int | None) -> Tensor:
    """Which of `slots` [N] each token sees [B, T, N].

    Padding sees the first of them: something finite, whatever it holds.
    """
    positions = positions.where(positions < num_slots, slots[0]).unsqueeze(-1)
    seen = slots <= positions
    return seen if window is None else seen & (slots > positions - window)


@dataclass(frozen=True)
class _Scoring:
    """How scores come about, as `attention` says."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None and self.slopes is None


@dataclass(frozen=True)
class _Slots:
    """The cache as `attention` says, or some of its slots."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def part(self, used: slice) -> "_Slots":
        scales = (self.key_scales, self.value_scales)
        return _Slots(
            self.keys[:, :, used],
            self.values[:, :, used],
            *(None if tensor is None else tensor[:, :, used] for tensor in scales),
        )

    def restored(self, dtype: torch.dtype) -> "_Slots":
        """Without scales."""
        if self.key_scales is None or self.value_scales is None:
            return self
        width = self.values.size(-1)
        return _Slots(
            restore(self.keys, self.key_scales, dtype, width),
            restore(self.values, self.value_scales, dtype, width),
        )


def attention_on_any_device(
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
    *scales: Tensor | None,
) -> Tensor:
    """`attention` for devices without a kernel of their own."""
    num_slots, how = keys.size(2) - 1, _Scoring(scale, window, softcap, sinks, slopes)
    num_used = num_slots if bound is None else min(int(bound), num_slots)
    return _attend(q, _Slots(keys, values, *scales), positions, slice(0, num_used), how)


def attention_on_cpu(
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
    *scales: Tensor | None,
) -> Tensor:
    """On a CPU the positions themselves say which slots are used. There it has kernels of its own:
    that of the fused step for few tokens, another for many.
    """
    if _has_kernel(q, keys, values, *scales):
        factor = q.size(-1) ** -0.5 if scale is None else scale
        options = (factor, window, softcap, sinks, slopes, *(scales or (None, None)))
        return torch.ops.gptfast.slots_attention(q, keys, values, positions, *options)
    num_slots, how = keys.size(2) - 1, _Scoring(scale, window, softcap, sinks, slopes)
    host, cache = positions.tolist(), _Slots(keys, values, *scales)
    slots = _used(host, num_slots, window)
    if len(host) == 1 and host[0] == [slots.stop - 1]:  # one token sees all of them: no mask
        return _attend(q, cache, None, slots, how)
    if q.size(1) <= TOKENS_TOGETHER:
        return _attend(q, cache, positions, slots, how)
    cache = cache.part(slice(0, slots.stop + 1)).restored(q.dtype)  # once for all parts
    parts = []
    for start in range(0, q.size(1), TOKENS_TOGETHER):
        part = slice(start, start + TOKENS_TOGETHER)
        slots = _used([row[part] for row in host], num_slots, window)
        parts.append(_attend(q[:, part], cache, positions[:, part], slots, how))
    return torch.cat(parts, dim=1)


def _has_kernel(q: Tensor, keys: Tensor, values: Tensor, *scales: Tensor | None) -> bool:
    """Whether there is one for so many tokens (for many only with AVX-512: on others PyTorch's own
    is faster) and such slots: all but latents of eight bits, which have two scales a slot.
    """
    if q.size(1) == 0 or q.dtype not in (torch.bfloat16, torch.float32):
        return False
    if not (keys.stride(-1) == values.stride(-1) == 1 and keys.size(2) > 1):
        return False
    own = [each for each in scales if each is not None]
    is_plain = keys.dtype == values.dtype == q.dtype and not own
    is_scaled = len(own) == 2 and all(s.size(-1) == 1 and s.is_contiguous() for s in own)
    if not (is_plain or is_scaled) or STEP.load() is None:
        return False
    return q.size(1) <= MAX_TOKENS or torch.ops.gptfast.has_prompt_attention()


def _used(positions: list[list[int]], num_slots: int, window: int | None) -> slice:
    """The slots that tokens at these positions see; padding sees whatever there is."""
    used = [p for row in positions for p in row if p < num_slots] or [0]
    first = 0 if window is None else max(0, min(used) - window + 1)
    return slice(first, max(used) + 1)


def _attend(
    q: Tensor, cache: _Slots, positions: Tensor | None, used: slice, how: _Scoring
) -> Tensor:
    """Attention over the slots `used`, query heads grouped under their key/value head, which is not
    repeated. `positions` None: one row's one token, at the last of the slots.
    """
    num_slots, cache = cache.keys.size(2) - 1, cache.part(used)
    slots = torch.arange(used.start, used.stop, device=q.device)
    if positions is None:
        positions = slots[-1:].view(1, 1)
        seen = None
    else:
        seen = _seen(positions, slots, num_slots, how.window)  # [B, T, used]
    # In float16 products of whole numbers would overflow.
    if q.size(1) > MAX_TOKENS_UNRESTORED or q.dtype == torch.float16:
        cache = cache.restored(q.dtype)
    num_kv_heads, has_scales = cache.keys.size(1), cache.key_scales is not None
    is_fused = how.is_plain and q.size(-1) == cache.values.size(-1) and not has_scales
    # Of each token either a mask for the query heads of a group or scores for all heads are held.
    held = q.size(0) * (q.size(2) // num_kv_heads if is_fused else q.size(2)) * len(slots)
    size = max(1, MAX_SCORES // held)
    parts = []
    for part in (slice(i, i + size) for i in range(0, q.size(1), size)):
        seen_here = None if seen is None else seen[:, part]
        if is_fused:
            parts.append(_attend_fused(q[:, part], cache, seen_here, how.scale))
        else:
            inputs = (q[:, part], cache, positions[:, part], slots, seen_here)
            parts.append(_attend_explicitly(*inputs, how))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _attend_fused(q: Tensor, cache: _Slots, seen: Tensor | None, scale: float | None) -> Tensor:
    """PyTorch's flash attention."""
    grouped = _group(q, cache.keys.size(1))  # [B, H_kv, G, T, D]
    if seen is not None:
        group = grouped.size(2)
        seen = seen.unsqueeze(1).expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
    y = F.scaled_dot_product_attention(
        grouped.flatten(2, 3), cache.keys, cache.values, attn_mask=seen, scale=scale
    )
    return _ungroup(y.unflatten(2, grouped.shape[2:4]))


def _attend_explicitly(
    q: Tensor,
    cache: _Slots,
    positions: Tensor,
    slots: Tensor,
    seen: Tensor | None,
    how: _Scoring,
) -> Tensor:
    """The definition, with all scores in memory."""
    grouped = _group(q, cache.keys.size(1))  # [B, H_kv, G, T, D]
    shape = (*grouped.shape[:4], len(slots))  # of scores, by key/value head and query head
    scale = q.size(-1) ** -0.5 if how.scale is None else how.scale
    scores = _scaled_products(grouped.flatten(2, 3), cache, scale).view(shape)
    if how.softcap is not None:
        scores = how.softcap * (scores / how.softcap).tanh()
    if how.slopes is not None:
        distance = positions.unsqueeze(-1) - slots  # [B, T, used]
        slopes = how.slopes.float().view(1, *shape[1:3], 1, 1)
        scores = scores - slopes * distance[:, None, None]
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.float().view(1, *shape[1:3], 1, 1).expand(*shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.flatten(2, 3)
    if cache.value_scales is not None:
        weights = weights * cache.value_scales.transpose(-1, -2)
    y = weights.to(q.dtype) @ widen(cache.values, q.dtype)
    return _ungroup(y.unflatten(2, shape[2:4]))


def _scaled_products(q: Tensor, cache: _Slots, scale: float) -> Tensor:
    """`scale` times queries [B, H_kv, N, D] times keys -> float32 [B, H_kv, N, used]."""
    if cache.key_scales is None:
        return (q @ cache.keys.transpose(-1, -2)).float() * scale
    widths = [cache.values.size(-1), cache.keys.size(-1) - cache.values.size(-1)]
    if cache.key_scales.size(-1) == 1:
        widths = [cache.keys.size(-1)]
    parts = (tensor.split(widths, dim=-1) for tensor in (q, widen(cache.keys, q.dtype)))
    scales = (cache.key_scales * scale).transpose(-1, -2).split(1, dim=2)  # [B, H_kv, 1, used]
    products = (
        (queries @ keys.transpose(-1, -2)).float() * key_scale
        for queries, keys, key_scale in zip(*parts, scales, strict=True)
    )
    return reduce(torch.add, products)


def _group(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, H, D] -> [B, H_kv, G, T, D], G query heads under each key/value head."""
    return q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungroup(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


torch.library.impl("gptfast::attention", "default", attention_on_any_device)
torch.library.impl("gptfast::attention", "cpu", attention_on_cpu)
