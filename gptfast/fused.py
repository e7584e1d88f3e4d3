"""From a model and its cache to the fused step that a device runs in place of the blocks' own
`forward`, which says what it means.

A model of which a part has no place in it (experts, latent attention) has no such step.
"""

import torch
from torch import Tensor, nn

from gptfast.attention import Attention
from gptfast.cache import KVCache
from gptfast.kernels import cpu_step, cuda_step
from gptfast.kernels.cpu_step import MAX_TOKENS, CpuStep
from gptfast.kernels.cuda_step import CudaStep
from gptfast.kernels.parts import BlockParts, Norm
from gptfast.layers import MLP, GatedMLP, RMSNorm
from gptfast.model import Block, Transformer
from gptfast.rope import Rope
from quantize.kernels.build import kernels_wanted


class FusedStep:
    """All blocks and the head of a model, over one cache."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.step: CpuStep | CudaStep
        on_host = model.device.type == "cpu"
        reduce = None if model.group.is_alone else model.group.all_reduce
        self.step = CpuStep(model.dtype, model.group.shared) if on_host else CudaStep(reduce)
        for parts, rope, layer in zip(_parts(model), model.rope_of, cache.layers, strict=True):
            assert parts is not None and layer.values is not None
            scales = (layer.key_scales, layer.value_scales)
            self.step.add_block(parts, rope, layer.keys, layer.values, *scales)
        norm = _norm(model.norm)
        assert norm is not None
        self.step.set_head(norm, model.head)
        self.turns: list[tuple[Tensor, Tensor]] | None = None
        if not any(rope.depends_on_length for rope in model.ropes):
            # Of every position, the spare one too.
            places = torch.arange(cache.max_seq_len + 1, device=model.device).unsqueeze(0)
            self.turns = self._turns(places, cache.lengths)

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T], positions [B, T], at most 16 in all -> float32 logits [B, T, V], as
        `Transformer.forward` with the cache, and their `first_argmax` [B, T] where it is known. In
        a group of several ranks V is this rank's part of the vocabulary, and so is the argmax.
        """
        x = self.model.embedded(tokens, positions)
        turns = self.turns
        if turns is None:
            turns = self._turns(positions, self.cache.lengths)
        logits, best = self.step(x, positions, turns, self.turns is not None)
        if self.model.scales_logits:
            return self.model.scaled(logits), None
        return logits, best

    def _turns(self, positions: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            (cos.contiguous(), sin.contiguous())
            for cos, sin in (rope(positions, lengths) for rope in self.model.ropes)
        ]


def fused_step(model: Transformer, cache: KVCache) -> FusedStep | None:
    """The step of a model over a cache; None where `why_no_step` says why."""
    return FusedStep(model, cache) if why_no_step(model, cache.num_rows) is None else None


def why_no_step(model: Transformer, num_rows: int = 1) -> str | None:
    """Why a model has no fused step for so many rows; None where it has one."""
    if num_rows > MAX_TOKENS:
        return f"it is for at most {MAX_TOKENS} rows"
    if not kernels_wanted():
        return "GPTFAST_NO_KERNELS is set"
    if model.device.type == "cuda":
        reasons = [cuda_step.why_not(p, model.dtype, model.device) for p in _parts(model)]
        reasons.append(cuda_step.why_no_linear(model.head))
        return next((reason for reason in reasons if reason is not None), None)
    if model.device.type != "cpu":
        return f"there is none for {model.device.type}"
    if not model.group.is_alone and model.group.shared < 0:
        return "its ranks share no memory"
    for parts in _parts(model):
        reason = cpu_step.why_not(parts, model.dtype)
        if reason is not None:
            return reason
    return cpu_step.why_no_linear(model.head, model.dtype)


def _parts(model: Transformer) -> list[BlockParts | None]:
    dims = [rope.dim for rope in model.ropes if isinstance(rope, Rope)]
    return [
        block_parts(block, 0 if rope is None else dims[rope])
        for block, rope in zip(model.blocks, model.rope_of, strict=True)
        if isinstance(block, Block)
    ]


def block_parts(block: Block, rotary_dim: int) -> BlockParts | None:
    """The parts of a block that rotates `rotary_dim` numbers a head; None where it has parts
    that have no place here.
    """
    attention, mlp = block.attention, block.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP | MLP):
        return None
    heads = (attention.q_norm, attention.k_norm)
    if attention.clip is not None or attention.norms_all_heads:
        return None
    if not all(isinstance(norm, RMSNorm | nn.LayerNorm | nn.Identity) for norm in heads):
        return None
    is_gated = isinstance(mlp, GatedMLP)
    if isinstance(mlp, GatedMLP) and mlp.limit is not None:
        return None
    return BlockParts(
        attention_norm=_norm(block.attention_norm),
        qkv=attention.qkv,
        q_norm=_norm(attention.q_norm),
        k_norm=_norm(attention.k_norm),
        out=attention.out,
        attention_post_norm=_norm(block.attention_post_norm),
        mlp_norm=_norm(block.mlp_norm),
        up=mlp.gate_up if isinstance(mlp, GatedMLP) else mlp.up,
        down=mlp.down,
        mlp_post_norm=_norm(block.mlp_post_norm),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        rotary_dim=rotary_dim,
        interleaved=attention.interleaved,
        scale=attention.scale,
        window=attention.window,
        softcap=attention.softcap,
        sinks=attention.sinks,
        slopes=attention.slopes,
        is_gated=is_gated,
        activation=mlp.activation,
        parallel=block.parallel,
        shared_norm=block.shared_norm,
        multiplier=block.multiplier,
    )


def _norm(module: nn.Module) -> Norm | None:
    if isinstance(module, RMSNorm):
        return Norm(module.weight, None, module.eps, False, module.offset)
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps, True, False)
    assert isinstance(module, nn.Identity)
    return None
