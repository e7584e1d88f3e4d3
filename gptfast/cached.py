"""CachedModel: a model over one cache, eager or compiled. Tokens go in at their places, logits come
out.

Knows rows and positions; knows nothing of sampling or requests. It owns the graphs of the blocks,
and the rule that nothing recompiles once they are warm.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.cache import KVCache
from gptfast.compiler import compile_alone
from gptfast.fused import fused_step
from gptfast.kernels.cpu_step import MAX_TOKENS
from gptfast.model import Block, Transformer

# A piece of prompt is padded to one of these lengths: few shapes, at most half of one wasted.
PREFILL_SHAPES = (16, 32, 64, 128, 256, 512)
LARGEST_PIECE = PREFILL_SHAPES[-1]
SMALLEST_BOUND = 256


class CachedModel:
    """Reads tokens into the rows of `cache`.

    A few tokens (at most 16) run through a fused step where the model has it (see fused.py): on a
    CPU always, on CUDA where it is compiled.

    Compiled graphs: blocks at one token a row (one graph for all blocks of a kind), blocks at two
    or more tokens (any number), the head; beside a fused step only blocks at two or more tokens.
    """

    def __init__(self, model: Transformer, cache: KVCache, compile: bool = False) -> None:
        self.model, self.cache = model, cache
        self.device, self.compiled = model.device, compile
        self._blocks: dict[Hashable, Callable[..., Tensor]] = {}  # compiled, by kind of block
        self.logits: Callable[..., Tensor] = model.logits
        # On CUDA it is many small kernels, worth their launches in a graph only.
        fuses = compile or self.device.type == "cpu"
        self.step = fused_step(model, cache) if fuses else None
        if compile:
            cache.mark_static()
            self._blocks = {
                kind: compile_alone(_run_block, self.device)
                for kind in dict.fromkeys(block.kind for block in model.blocks)
            }
            if self.step is None:
                self.logits = partial(compile_alone(_run_logits, self.device), model)

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] at `positions` [B, T] -> float32 logits [B, T, V], and of each the first of
        the largest [B, T] where it is known. Of every row: B is the cache's. `set_bound` comes
        first.
        """
        if self.fuses(tokens.size(1)):
            assert self.step is not None
            return self.step(tokens, positions)
        return self.logits(self.hidden(tokens, positions, self.cache)), None

    def fuses(self, num_tokens: int) -> bool:
        """Whether so many tokens a row are one fused step, in which a token has the same bits
        whatever stands beside it.
        """
        return self.step is not None and self.cache.num_rows * num_tokens <= MAX_TOKENS

    def set_bound(self, num_used: int, num_tokens: int = 1) -> int:
        """Says that no row will hold more than `num_used` tokens, before `num_tokens` a row are
        read. Returns the bound, which distinguishes CUDA graphs.
        """
        # A fused step knows the lengths on the device: one graph for all.
        bound = self.cache.max_seq_len if self.fuses(num_tokens) else self._bound(num_used)
        self.cache.bound.fill_(bound)
        return bound

    def prefill(self, piece: Sequence[int], start: int, row: int) -> Tensor:
        """Reads a piece of at most 512 tokens into a row from position `start` on.

        Returns hidden states [1, padded length, dim].
        """
        length = next(shape for shape in PREFILL_SHAPES if shape >= len(piece))
        padding = length - len(piece)
        places = range(start, start + len(piece))
        self.cache.bound.fill_(self._bound(start + len(piece)))
        tokens = torch.tensor([[*piece, *([0] * padding)]])
        positions = torch.tensor([[*places, *([self.cache.max_seq_len] * padding)]])
        return self.hidden(tokens.to(self.device), positions.to(self.device), self.cache.row(row))

    def hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """As `Transformer.hidden`, its blocks compiled where this is."""
        return self.model.hidden(
            tokens, positions, cache, self._run_compiled if self.compiled else None
        )

    def _bound(self, num_used: int) -> int:
        """`num_used` rounded up to a power of two, so that there are few CUDA graphs."""
        return min(self.cache.max_seq_len, max(SMALLEST_BOUND, 1 << (num_used - 1).bit_length()))

    def _run_compiled(self, block: Block, x: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        if x.size(1) > 1:
            for tensor in (x, positions, *(rest[0] or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self._blocks[block.kind](block, x, positions, *rest)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning: their keys are the same."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _run_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _run_logits(model: Transformer, x: Tensor) -> Tensor:
    return model.logits(x)
