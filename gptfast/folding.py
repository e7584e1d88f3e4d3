"""Where the inputs of a block's linears come from, so that their channels can be scaled: columns of
the linears times s, what makes the channels divided by s, and the block computes the same.

This is the walk over the model that AWQ (2306.00978) needs; which s is good is its own question.
Knows the modules of a block; names no family.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptfast.attention import Attention, LatentAttention
from gptfast.experts import Experts
from gptfast.layers import MLP, GatedMLP, RMSNorm
from gptfast.model import Block

# Divides a producer by s [K] (of experts [E, K]) and returns the s that it really was divided by.
Divide = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fold:
    """Linears that read one input, and what makes it.

    `linears` are modules of the block, `beside` parameters [.., K] that read the same input and are
    never quantized. `watched` is the module whose first input it is. Channels with the same number
    in `tied` [K] must have the same s. `is_kept`: whether plain weights are scaled, which are to
    keep their bits: s must be powers of two then. `by_expert`: each expert has its own s.
    """

    linears: tuple[str, ...]
    watched: str
    divide: Divide
    beside: tuple[str, ...] = ()
    producer: str | None = None  # the linear that is divided
    tied: Tensor | None = None
    is_kept: bool = False
    by_expert: bool = False


@torch.no_grad()
def apply_fold(block: Block, fold: Fold, scale: Tensor) -> Tensor:
    """Scales channels by `scale` [K] (of experts [E, K]), all positive, in place. Returns what it
    came to be: a norm in 16 bits cannot be divided by every number.
    """
    scale = fold.divide(scale)
    columns = scale.unsqueeze(-2) if fold.by_expert else scale
    for name in (*(f"{linear}.weight" for linear in fold.linears), *fold.beside):
        block.get_parameter(name).mul_(columns)
    return scale


def find_folds(block: Block) -> list[Fold]:
    """In the order in which the block computes."""
    attention, mlp = block.attention, block.mlp
    mlp_reads, mlp_beside = _reads(mlp)
    folds: list[Fold] = []
    readers, beside = _attention_reads(attention), mlp_beside[:0]
    if block.shared_norm:
        readers, beside = readers + mlp_reads, mlp_beside
    if (divide := divide_norm(block.attention_norm)) is not None:
        folds.append(Fold(readers, "attention", divide, beside, is_kept=bool(beside)))
    folds += _inside_attention(attention)
    if not block.shared_norm and (divide := divide_norm(block.mlp_norm)) is not None:
        folds.append(Fold(mlp_reads, "mlp", divide, mlp_beside, is_kept=bool(mlp_beside)))
    return folds + _inside_mlp(mlp, "mlp")


def _attention_reads(attention: nn.Module) -> tuple[str, ...]:
    if isinstance(attention, LatentAttention):
        q = "attention.q" if attention.latent.q_rank is None else "attention.q_a"
        return q, "attention.kv_a"
    return ("attention.qkv",)


def _reads(mlp: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The linears and the other parameters that read the input of the MLP."""
    if isinstance(mlp, GatedMLP):
        return ("mlp.gate_up",), ()
    if isinstance(mlp, MLP):
        return ("mlp.up",), ()
    assert isinstance(mlp, Experts)
    linears, beside = ["mlp.expert_gate_up"], ["mlp.router.weight"]
    if mlp.shared is not None:
        linears.append("mlp.shared.gate_up")
    if mlp.shared_gate is not None:
        beside.append("mlp.shared_gate.weight")
    return tuple(linears), tuple(beside)


def _inside_attention(attention: nn.Module) -> list[Fold]:
    """Values on their way through the weighted sum, which is linear in them."""
    if isinstance(attention, LatentAttention):
        folds = []
        if (divide := divide_norm(attention.q_norm)) is not None:
            folds.append(Fold(("attention.q",), "attention.q", divide))
        out = ("attention.out",)
        return [*folds, Fold(out, "attention.out", _divide_latents(attention), is_kept=True)]
    assert isinstance(attention, Attention)
    if attention.clip is not None:  # clips at the same number whatever the channel's scale
        return []
    size = attention.head_dim
    group = attention.num_heads // attention.num_kv_heads
    # Query heads of a group weigh the same values.
    channels = torch.arange(attention.num_kv_heads * size).view(-1, 1, size)
    tied = channels.expand(-1, group, -1).flatten()
    first_of_group = torch.arange(attention.num_heads * size).view(-1, group, size)[:, 0].flatten()
    divide = _divide_rows(attention.qkv, len(first_of_group), first_of_group)
    return [Fold(("attention.out",), "attention.out", divide, (), "attention.qkv", tied)]


def _inside_mlp(mlp: nn.Module, name: str) -> list[Fold]:
    """What multiplies an activation; what goes through one only where it keeps the scale."""
    if isinstance(mlp, Experts):
        folds = []
        if mlp.limit is None:
            rows = mlp.expert_down.weight.size(-1)
            divide = _divide_rows(mlp.expert_gate_up, rows)
            down, gate_up = (f"{name}.expert_down",), f"{name}.expert_gate_up"
            folds = [Fold(down, down[0], divide, (), gate_up, by_expert=True)]
        return folds if mlp.shared is None else folds + _inside_mlp(mlp.shared, f"{name}.shared")
    gated = isinstance(mlp, GatedMLP)
    assert isinstance(mlp, GatedMLP | MLP)
    if (gated and mlp.limit is not None) or (not gated and mlp.activation != "relu"):
        return []
    producer = "gate_up" if gated else "up"
    divide = _divide_rows(mlp.get_submodule(producer), mlp.down.weight.size(-1))
    return [Fold((f"{name}.down",), f"{name}.down", divide, (), f"{name}.{producer}")]


# -- producers --


def divide_norm(norm: nn.Module) -> Divide | None:
    """None where there is no norm, or one without weights."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor):
        return None
    offset = 1.0 if isinstance(norm, RMSNorm) and norm.offset else 0.0

    def divide(scale: Tensor) -> Tensor:
        old = weight.double() + offset
        weight.copy_(old / scale.double() - offset)
        new = weight.double() + offset
        # What rounding to 16 bits made of it, so that the columns make up for it.
        real = torch.where((new != 0) & (old != 0), old / new, scale.double())
        if bias is not None:
            bias.copy_(bias.double() / real)
        return real.float()

    return divide


def _divide_rows(linear: nn.Module, num_rows: int, channels: Tensor | None = None) -> Divide:
    """The last `num_rows` rows; row r by the scale of channel `channels[r]` (None: r)."""

    def divide(scale: Tensor) -> Tensor:
        rows = scale if channels is None else scale[channels.to(scale.device)]
        linear.get_parameter("weight")[..., -num_rows:, :] /= rows.unsqueeze(-1)
        if linear.bias is not None:
            linear.get_parameter("bias")[..., -num_rows:] /= rows
        return scale

    return divide


def _divide_latents(attention: LatentAttention) -> Divide:
    """The projection from latents to values."""

    def divide(scale: Tensor) -> Tensor:
        heads = attention.kv_b.unflatten(0, (attention.num_heads, -1))  # [H, nope + value, R]
        values = heads[:, attention.latent.nope_dim :]
        values /= scale.view(attention.num_heads, -1, 1)
        return scale

    return divide
