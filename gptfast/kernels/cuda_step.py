"""A whole decode step on CUDA, all blocks and the head. A block is seven kernels (four linears that
take norm, activation and residual along, heads into the cache, attention in two), two more where
norms stand behind. Where ranks share the work, two sums over ranks come between, and the residual
behind each.

Its meaning is `Transformer.hidden` and the head of it: for the same tokens it writes the same keys
and values and returns the same logits, but for the order in which sums are added up. Between 1 and
16 tokens it gives each token the same bits, whatever stands beside it. Nothing waits for the
device, so a step is one CUDA graph for all lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptfast.kernels.cuda_attention import (
    MAX_HEAD_DIM,
    Slots,
    add_normed,
    decode_attention,
    write_heads,
)
from gptfast.kernels.parts import BlockParts, Norm
from quantize.kernels.cuda import (
    ACTIVATIONS,
    DTYPES,
    CudaLinear,
    CudaQuantizedLinear,
    NormSpec,
    fused_linear,
    why_no_triton,
)

CosSin = tuple[Tensor, Tensor]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """A layer's cache, as LayerCache has it."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


class CudaStep:
    """All blocks and the head. Blocks are added in their order, each with its layer's keys and
    values, and the head at the end; `why_not` and `why_no_linear` of them say nothing.

    `reduce` sums x [M, dim] over the ranks of a group, of which each has some of the heads, hidden
    units and rows of the head: logits are those of its own rows. None: all are here.
    """

    def __init__(self, reduce: Reduce | None = None) -> None:
        self._reduce = reduce
        self._blocks: list[tuple[BlockParts, int | None, _Layer]] = []
        self._head: tuple[Norm, nn.Module] | None = None

    def add_block(
        self,
        parts: BlockParts,
        rope: int | None,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None,
        value_scales: Tensor | None,
    ) -> None:
        """`rope` is which of the step's turns the block rotates by."""
        self._blocks.append((parts, rope, _Layer(keys, values, key_scales, value_scales)))

    def set_head(self, norm: Norm, head: nn.Module) -> None:
        self._head = norm, head

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        turns: Sequence[CosSin],
        by_position: bool,
    ) -> tuple[Tensor, None]:
        """x [B, T, dim], positions [B, T] -> float32 logits [B, T, V], rounded to x's dtype (and no
        choice among them); keys and values go to their slots. Turns are cos and sin, float32
        [.., 1, R / 2]: of every position, or of every token.
        """
        for parts, rope, layer in self._blocks:
            turn = None if rope is None else turns[rope]
            x = decode_block(parts, x, positions, turn, layer, by_position, self._reduce)
        assert self._head is not None
        norm, head = self._head
        return fused_linear(x, head, norm=_spec(norm)).float(), None


def why_not(parts: BlockParts | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a block whose stream is of `dtype` cannot be part of a step; None where it can."""
    if parts is None:
        return "it has parts of a kind that the step does not know"
    if (reason := why_no_triton(device)) is not None:
        return reason
    if dtype not in DTYPES:
        return f"there is no kernel for activations in {str(dtype).removeprefix('torch.')}"
    if parts.head_dim > MAX_HEAD_DIM:
        return f"heads have {parts.head_dim} numbers, and {MAX_HEAD_DIM} is the most"
    if parts.activation not in ACTIVATIONS:
        return f"there is no kernel for the activation {parts.activation}"
    reasons = (why_no_linear(linear) for linear in parts.linears)
    return next((reason for reason in reasons if reason is not None), None)


def why_no_linear(linear: nn.Module) -> str | None:
    """Why the step cannot multiply by a linear; None where it can."""
    if type(linear) in (nn.Linear, CudaLinear, CudaQuantizedLinear):
        return None
    return f"there is no kernel for {type(linear).__name__}"


def decode_block(
    parts: BlockParts,
    x: Tensor,
    positions: Tensor,
    cos_sin: CosSin | None,
    cache: Slots,
    by_position: bool = False,
    reduce: Reduce | None = None,
) -> Tensor:
    """What the block makes of x [B, T, dim] at `positions` [B, T], for at most 16 tokens; their
    keys and values are written to the cache. cos and sin are [B, T, 1, R / 2] of the tokens, or
    [1, S + 1, 1, R / 2] of all slots; None without rotation.

    A token's result has the same bits whatever tokens are beside it, if `reduce` (see CudaStep)
    adds in one order for any number of them. Padding is finite.
    """
    stream = x.flatten(0, 1)  # [M, dim]
    qkv = fused_linear(stream, parts.qkv, norm=_spec(parts.attention_norm))
    facts = (parts.num_heads, parts.q_norm, parts.k_norm, parts.interleaved, by_position)
    q = write_heads(qkv, cache, positions, cos_sin, *facts)
    assert cache.values is not None
    y = decode_attention(
        q,
        cache.keys,
        cache.values,
        positions,
        parts.scale,
        parts.window,
        parts.softcap,
        parts.sinks,
        parts.slopes,
        cache.key_scales,
        cache.value_scales,
    )
    y = y.flatten(0, 1).flatten(1)
    attended = _added(stream, y, parts.out, parts.attention_post_norm, parts.multiplier, reduce)
    source, norm = attended, parts.mlp_norm
    if parts.parallel:
        source, norm = stream, parts.attention_norm if parts.shared_norm else parts.mlp_norm
    gate, activation = (parts.activation, None) if parts.is_gated else (None, parts.activation)
    hidden = fused_linear(source, parts.up, norm=_spec(norm), gate=gate, activation=activation)
    ended = _added(attended, hidden, parts.down, parts.mlp_post_norm, parts.multiplier, reduce)
    return ended.view_as(x)


def _added(
    stream: Tensor,
    y: Tensor,
    linear: nn.Module,
    norm: Norm | None,
    multiplier: float,
    reduce: Reduce | None,
) -> Tensor:
    """stream + multiplier * norm(reduce(linear(y))), all [M, dim]."""
    if norm is None and reduce is None:
        return fused_linear(y, linear, residual=stream, multiplier=multiplier)
    y = fused_linear(y, linear)
    y = y if reduce is None else reduce(y)
    if norm is None:
        return torch.add(stream, y, alpha=multiplier)
    return add_normed(stream, y, norm, multiplier)


def _spec(norm: Norm | None) -> NormSpec | None:
    if norm is None:
        return None
    return NormSpec(norm.weight, norm.bias, norm.eps, norm.is_layer, norm.offset)
