"""Attention of new tokens over the cached keys and values of their row, at a cost that follows the
used length.

`attention` is a `torch.library` op, opaque to the compiler: how many slots are read is decided on
the host at every call, without a recompilation. Its meaning is `attention_reference`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores, or numbers of a mask, that are held at a time; longer prompts are read in parts.
MAX_SCORES = 1 << 24

# Not `custom_op`: that costs 14 us a call beside 2.5, and the first one imports the compiler (1 s).
torch.library.define(
    "gptfast::attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor? bound=None, "
    "float? scale=None, int? window=None, float? softcap=None, Tensor? sinks=None, "
    "Tensor? slopes=None) -> Tensor",
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
    """
    return torch.ops.gptfast.attention.default(
        q, keys, values, positions, bound, scale, window, softcap, sinks, slopes
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
) -> Tensor:
    """The meaning of `attention`: softmax in float32 over all slots, those that a token does not
    see masked out.
    """
    num_slots, group = keys.size(2) - 1, q.size(2) // keys.size(1)
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


def attention_on_any_device(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bound: Tensor | None = None,
    *scoring: Any,
) -> Tensor:
    """`attention` for devices without a kernel of their own."""
    num_slots = keys.size(2) - 1
    num_used = num_slots if bound is None else min(int(bound), num_slots)
    return _attend(q, keys, values, positions, slice(0, num_used), _Scoring(*scoring))


def attention_on_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bound: Tensor | None = None,
    *scoring: Any,
) -> Tensor:
    """On a CPU the positions themselves say which slots are used."""
    num_slots, how = keys.size(2) - 1, _Scoring(*scoring)
    host = positions.tolist()
    used = [p for row in host for p in row if p < num_slots] or [0]
    first = 0 if how.window is None else max(0, min(used) - how.window + 1)
    slots = slice(first, max(used) + 1)
    if host == [used] and len(used) == 1:  # one token of one row sees all of them: no mask
        return _attend(q, keys, values, None, slots, how)
    return _attend(q, keys, values, positions, slots, how)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, used: slice, how: _Scoring
) -> Tensor:
    """Attention over the slots `used`, query heads grouped under their key/value head, which is not
    repeated. `positions` None: one row's one token, at the last of the slots.
    """
    num_slots = keys.size(2) - 1
    keys, values = keys[:, :, used], values[:, :, used]
    slots = torch.arange(used.start, used.stop, device=q.device)
    if positions is None:
        positions = slots[-1:].view(1, 1)
        seen = None
    else:
        seen = _seen(positions, slots, num_slots, how.window)  # [B, T, used]
    is_fused = how.is_plain and keys.size(-1) == values.size(-1)
    # Of each token either a mask for the query heads of a group or scores for all heads are held.
    held = q.size(0) * (q.size(2) // keys.size(1) if is_fused else q.size(2)) * len(slots)
    size = max(1, MAX_SCORES // held)
    parts = []
    for part in (slice(i, i + size) for i in range(0, q.size(1), size)):
        seen_here = None if seen is None else seen[:, part]
        if is_fused:
            parts.append(_attend_fused(q[:, part], keys, values, seen_here, how.scale))
        else:
            inputs = (q[:, part], keys, values, positions[:, part], slots, seen_here)
            parts.append(_attend_explicitly(*inputs, how))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _attend_fused(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float | None
) -> Tensor:
    """PyTorch's flash attention."""
    grouped = _group(q, keys.size(1))  # [B, H_kv, G, T, D]
    if seen is not None:
        group = grouped.size(2)
        seen = seen.unsqueeze(1).expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
    y = F.scaled_dot_product_attention(
        grouped.flatten(2, 3), keys, values, attn_mask=seen, scale=scale
    )
    return _ungroup(y.unflatten(2, grouped.shape[2:4]))


def _attend_explicitly(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    seen: Tensor | None,
    how: _Scoring,
) -> Tensor:
    """The definition, with all scores in memory."""
    grouped = _group(q, keys.size(1))  # [B, H_kv, G, T, D]
    shape = (*grouped.shape[:4], len(slots))  # of scores, by key/value head and query head
    scores = (grouped.flatten(2, 3) @ keys.transpose(-1, -2)).float().view(shape)
    scores = scores * (q.size(-1) ** -0.5 if how.scale is None else how.scale)
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
    y = weights.to(values.dtype).flatten(2, 3) @ values
    return _ungroup(y.unflatten(2, shape[2:4]))


def _group(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, H, D] -> [B, H_kv, G, T, D], G query heads under each key/value head."""
    return q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungroup(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


torch.library.impl("gptfast::attention", "default", attention_on_any_device)
torch.library.impl("gptfast::attention", "cpu", attention_on_cpu)
