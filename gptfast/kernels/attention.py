"""Attention of new tokens over the cached keys and values of their row, at a cost that follows the
used length.

`attention` is a `torch.library` op, opaque to the compiler, so that the number of used slots may be
read on the host (free on a CPU) without a recompilation. Its meaning is `attention_reference`,
which reads every slot.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("gptfast::attention", mutates_args=())
def attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """q [B, T, H, D], keys and values [B, H_kv, S + 1, D], positions [B, T] -> [B, T, H, D].

    The token at position p sees slots 0..p of its row. Position S is padding: its result is finite
    and meaningless.
    """
    return attention_reference(q, keys, values, positions)


@attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The meaning of `attention`: softmax in float32 over all slots, those after a token's position
    masked out.
    """
    num_slots, group = keys.size(2) - 1, q.size(2) // keys.size(1)
    k, v = (t[:, :, :num_slots].float().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = q.transpose(1, 2).float() @ k.transpose(-1, -2) * q.size(-1) ** -0.5  # [B, H, T, S]
    seen = torch.arange(num_slots, device=q.device) <= _real(positions, num_slots)[:, None, :, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


def _real(positions: Tensor, num_slots: int) -> Tensor:
    """Positions with padding moved to slot 0, where it sees something finite at no cost."""
    return positions.where(positions < num_slots, 0)


@attention.register_kernel("cpu")
def _attention_cpu(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Flash attention on the slots that some row uses; query heads grouped under their key/value
    head.
    """
    batch, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = keys.size(1), keys.size(2) - 1
    host = positions.tolist()
    used = 1 + max(p for row in host for p in (*row, 0) if p < num_slots)
    k, v = keys[:, :, :used], values[:, :, :used]
    q = q.view(batch, num_tokens, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch, num_kv_heads, -1, head_dim)  # [B, H_kv, G * T, D]
    mask = None
    if any(p != used - 1 for row in host for p in row):
        seen = torch.arange(used) <= _real(positions, num_slots).unsqueeze(-1)  # [B, T, used]
        group = num_heads // num_kv_heads
        mask = seen.unsqueeze(1).expand(-1, group, -1, -1).reshape(batch, 1, -1, used)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = y.view(batch, num_kv_heads, -1, num_tokens, head_dim).permute(0, 3, 1, 2, 4)
    return y.reshape(batch, num_tokens, num_heads, head_dim).contiguous()
