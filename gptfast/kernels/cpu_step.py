"""A whole decode step on a CPU, all blocks and the head in one call and one parallel region: the
C++ of step.cpp, blocks.cpp and attend.cpp. The library has the attention of many tokens too
(prompt.cpp), for kernels/attention.py.

Its meaning is `Transformer.hidden` and the head of it: for the same tokens it writes the same keys
and values and returns the same logits, but for the order in which sums are added up. Between 1 and
16 tokens (rows times tokens a row) it gives each token the same bits, whatever stands beside it.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gptfast.kernels.parts import BlockParts, Norm
from quantize.kernels.build import LINEAR, Library
from quantize.kernels.cpu import PackedQuantizedLinear
from quantize.packed import PackedLinear, packed_weight

SOURCES = ("step.cpp", "blocks.cpp", "attend.cpp", "prompt.cpp", "shared.cpp")
STEP = Library("decode_step", Path(__file__).parent, SOURCES, needs=LINEAR)
MAX_TOKENS = 16
LARGEST_ROTATION = 1024
LINEARS = ("qkv", "out", "up", "down")
NORMS = "attention_norm q_norm k_norm attention_post_norm mlp_norm mlp_post_norm".split()


class CpuStep:
    """Blocks are added in their order, each with its layer's keys and values (as LayerCache has
    them), and the head at the end. ValueError where `why_not` of any of them says something.

    Weights are read where they lie; norms and biases are copied: a model that is loaded anew needs
    a new step.

    `shared`, where it is not -1: the handle of the SharedMemory of ranks that each have some heads
    and hidden units of every block. What their blocks give is added up as `shared_all_reduce` does
    it, and each has logits of its own part of the vocabulary. RuntimeError where one ends.
    """

    def __init__(self, dtype: torch.dtype, shared: int = -1) -> None:
        self.dtype = dtype
        self._number = torch.ops.gptfast.new_step(dtype == torch.float32, shared)
        # Not at the end of the process, where a thread may still be in a step.
        weakref.finalize(self, torch.ops.gptfast.free_step, self._number).atexit = False
        self._held: list[object] = []  # what the step points into

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
        sizes = [
            parts.num_heads,
            parts.num_kv_heads,
            parts.head_dim,
            parts.rotary_dim if rope is not None else 0,
            rope or 0,
            parts.interleaved,
            parts.is_gated,
            parts.parallel,
            parts.shared_norm,
            parts.window or 0,
        ]
        factors = [parts.multiplier, parts.scale, parts.softcap or 0.0]
        slots = (keys, values, key_scales, value_scales)
        torch.ops.gptfast.add_block(
            self._number,
            [int(size) for size in sizes],
            factors,
            parts.activation,
            parts.sinks,
            parts.slopes,
            *slots,
        )
        self._held.append(slots)
        for name in NORMS:
            self._set_norm(name, getattr(parts, name))
        for name in LINEARS:
            self._set_linear(name, getattr(parts, name))

    def set_head(self, norm: Norm, head: nn.Module) -> None:
        self._set_norm("norm", norm)
        self._set_linear("head", head)

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        turns: Sequence[tuple[Tensor, Tensor]],
        by_position: bool,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, dim], positions [B, T] -> float32 logits [B, T, V], rounded to x's dtype, and of
        each the first of the largest [B, T]; keys and values go to their slots. Turns are cos and
        sin, float32 [.., R/2]: of every position, or of every token.
        """
        cos, sin = [turn[0] for turn in turns], [turn[1] for turn in turns]
        return torch.ops.gptfast.run_step(self._number, x, positions, cos, sin, by_position)

    def _set_norm(self, name: str, norm: Norm | None) -> None:
        if norm is not None:
            torch.ops.gptfast.set_norm(
                self._number, name, norm.weight, norm.bias, norm.eps, norm.is_layer, norm.offset
            )

    def _set_linear(self, name: str, linear: nn.Module) -> None:
        reason = why_no_linear(linear, self.dtype)
        if reason is not None:
            raise ValueError(reason)
        address = 0
        weights: tuple[Tensor | None, ...]
        if isinstance(linear, PackedLinear):
            kind, weights, address = "blocked", (None, None, None), linear.address
        elif isinstance(linear, PackedQuantizedLinear):
            kind, weights = linear.format.name, (linear.values, linear.scales, linear.zeros)
        else:
            assert isinstance(linear, nn.Linear)
            kind, weights = "plain", (linear.weight, None, None)
        torch.ops.gptfast.set_linear(
            self._number,
            name,
            kind,
            *weights,
            linear.bias,
            linear.out_features,
            linear.in_features,
            address,
            self.dtype == torch.float32,
        )
        if isinstance(linear, PackedLinear):  # a copy of a module does not own the numbers
            self._held.append(packed_weight(int(linear.handle)))
        # The memory itself: `module.weight.data = ...` would free what the module held.
        self._held.append([None if weight is None else weight.detach() for weight in weights])


def why_not(parts: BlockParts | None, dtype: torch.dtype) -> str | None:
    """Why a block cannot be part of a step; None where it can."""
    if parts is None:
        return "it has parts of a kind that the step does not know"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for activations in {str(dtype).removeprefix('torch.')}"
    if STEP.load() is None:
        return STEP.why_not()
    if parts.rotary_dim > LARGEST_ROTATION:
        return f"heads rotate {parts.rotary_dim} numbers, and {LARGEST_ROTATION} is the most"
    reasons = (why_no_linear(linear, dtype) for linear in parts.linears)
    return next((reason for reason in reasons if reason is not None), None)


def why_no_linear(linear: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the step cannot multiply by a linear; None where it can."""
    if isinstance(linear, PackedQuantizedLinear):
        return None if linear.order is None else "a quantized weight has its columns in an order"
    if isinstance(linear, PackedLinear):
        known = linear.address and torch.ops.gptfast.has_blocked_product()
        return None if known else "there is no kernel for weights as oneDNN lays them out here"
    if type(linear) is not nn.Linear or not linear.weight.is_contiguous():
        return f"there is no kernel for {type(linear).__name__}"
    return None if linear.weight.dtype == dtype else "a weight is of another type than activations"
