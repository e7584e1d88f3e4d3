"""Attention of new tokens over the cached keys and values of their row, at a cost that follows the
used length.

`attention` is a `torch.library` op, opaque to the compiler: how many slots are read is decided on
the host at every call, without a recompilation. Its meaning is `attention_reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Not `custom_op`: that costs 14 us a call beside 2.5, and the first one imports the compiler (1 s).
torch.library.define(
    "gptfast::attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor? bound=None) -> Tensor",
)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bound: Tensor | None = None
) -> Tensor:
    """q [B, T, H, D], keys and values [B, H_kv, S + 1, D], positions [B, T] -> [B, T, H, D].

    The token at position p sees slots 0..p of its row. Position S is padding: its result is finite
    and meaningless. `bound`, a number on the CPU, says that no position reaches it, for devices
    whose positions the host cannot read without waiting; None: all S slots may be used.
    """
    return torch.ops.gptfast.attention.default(q, keys, values, positions, bound)


@torch.library.register_fake("gptfast::attention")
def _(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bound: Tensor | None = None
) -> Tensor:
    return q.new_empty(q.shape)


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The meaning of `attention`: softmax in float32 over all slots, those after a token's position
    masked out.
    """
    num_slots, group = keys.size(2) - 1, q.size(2) // keys.size(1)
    k, v = (t[:, :, :num_slots].float().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = q.transpose(1, 2).float() @ k.transpose(-1, -2) * q.size(-1) ** -0.5  # [B, H, T, S]
    seen = _seen(positions, num_slots, num_slots).unsqueeze(1)  # [B, 1, T, S]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


def _seen(positions: Tensor, num_slots: int, num_used: int) -> Tensor:
    """Which of the first `num_used` slots each token sees [B, T, used].

    Padding sees slot 0: something finite, whatever the slots hold.
    """
    positions = positions.where(positions < num_slots, 0)
    return torch.arange(num_used, device=positions.device) <= positions.unsqueeze(-1)


def attention_on_any_device(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bound: Tensor | None = None
) -> Tensor:
    """`attention` for devices without a kernel of their own."""
    num_slots = keys.size(2) - 1
    num_used = num_slots if bound is None else min(int(bound), num_slots)
    return _attend(q, keys, values, _seen(positions, num_slots, num_used))


def attention_on_cpu(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bound: Tensor | None = None
) -> Tensor:
    """On a CPU the positions themselves say how many slots are used."""
    num_slots = keys.size(2) - 1
    host = positions.tolist()
    num_used = 1 + max(p for row in host for p in (*row, 0) if p < num_slots)
    if host == [[num_used - 1]]:  # one token of one row sees all of them: no mask
        return _attend(q, keys[:, :, :num_used], values[:, :, :num_used], None)
    return _attend(q, keys, values, _seen(positions, num_slots, num_used))


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Flash attention, query heads grouped under their key/value head, which is not repeated.

    `seen` [B, T, used]; the slots beyond it are not read.
    """
    batch, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = keys.size(1)
    q = q.view(batch, num_tokens, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch, num_kv_heads, -1, head_dim)  # [B, H_kv, G * T, D]
    if seen is not None:
        num_used, group = seen.size(-1), num_heads // num_kv_heads
        keys, values = keys[:, :, :num_used], values[:, :, :num_used]
        seen = seen.unsqueeze(1).expand(-1, group, -1, -1).reshape(batch, 1, -1, num_used)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    y = y.view(batch, num_kv_heads, -1, num_tokens, head_dim).permute(0, 3, 1, 2, 4)
    return y.reshape(batch, num_tokens, num_heads, head_dim).contiguous()


torch.library.impl("gptfast::attention", "default", attention_on_any_device)
torch.library.impl("gptfast::attention", "cpu", attention_on_cpu)
