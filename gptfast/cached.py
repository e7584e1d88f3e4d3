"""CachedModel: a model over one cache, eager or compiled. Tokens go in at their places, logits come
out.

Knows rows and positions; knows nothing of sampling or requests. It owns the graphs of the blocks,
and the rule that nothing recompiles once they are warm. In a group of several ranks each has such a
thing, and whatever rank 0 asks of its own the others do with theirs.
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
from gptfast.parallel import Group, Op
from gptfast.together import number_of, together

# A piece of prompt is padded to one of these lengths: few shapes, at most half of one wasted.
PREFILL_SHAPES = (16, 32, 64, 128, 256, 512)
LARGEST_PIECE = PREFILL_SHAPES[-1]
SMALLEST_BOUND = 256
ALL_ROWS = -1


class CachedModel:
    """Reads tokens into the rows of `cache`.

    A few tokens (at most 16) run through a fused step where the model has it (see fused.py): on a
    CPU always, on CUDA where it is compiled; not where it is said that `steps` will not be asked
    for.

    Compiled graphs: blocks at one token a row (one graph for all blocks of a kind), blocks at two
    or more tokens (any number), the head; beside a fused step only blocks at two or more tokens.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, compile: bool = False, steps: bool = True
    ) -> None:
        self.model, self.cache, self.group = model, cache, model.group
        self.device, self.compiled = model.device, compile
        self._blocks: dict[Hashable, Callable[..., Tensor]] = {}  # compiled, by kind of block
        self._compiled_logits: Callable[..., Tensor] = model.own_logits
        # On CUDA it is many small kernels, worth their launches in a graph only.
        fuses = steps and (compile or self.device.type == "cpu")
        self.step = fused_step(model, cache) if fuses else None
        if compile:
            cache.mark_static()
            self._blocks = {
                kind: compile_alone(_run_block, self.device)
                for kind in dict.fromkeys(block.kind for block in model.blocks)
            }
            if self.step is None:
                self._compiled_logits = partial(compile_alone(_run_logits, self.device), model)

    # -- what is asked of it --

    def __call__(
        self, tokens: Tensor, positions: Tensor, needs_logits: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] at `positions` [B, T] -> float32 logits [B, T, V], and of each the first of
        the largest [B, T] where it is known. Of every row: B is the cache's. `set_bound` comes
        first.

        Where ranks share the work and only the largest are wanted, the logits are this rank's own.
        """
        with self.group.unbroken():
            self._tell(Op.STEP, ALL_ROWS, tokens, positions, needs_logits)
            return self._step(tokens, positions, needs_logits)

    def hidden(self, tokens: Tensor, positions: Tensor, row: int = ALL_ROWS) -> Tensor:
        """As `Transformer.hidden`, of one row or all, its blocks compiled where this is."""
        with self.group.unbroken():
            self._tell(Op.READ, row, tokens, positions)
            return self._read(tokens, positions, row)

    def logits(self, x: Tensor, compiled: bool = True) -> Tensor:
        """Hidden [B, T, dim] -> float32 logits [B, T, V]. Each number of tokens would be a graph of
        its own: `compiled` is for those of a step.
        """
        with self.group.unbroken():
            if self.group.leads:
                self.group.send(Op.LOGITS, number_of(self), x.size(0), x.size(1), compiled)
                x = self.group.broadcast(x)
            return self._logits(x, compiled)

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
        return self.hidden(tokens.to(self.device), positions.to(self.device), row)

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

    def _bound(self, num_used: int) -> int:
        """`num_used` rounded up to a power of two, so that there are few CUDA graphs."""
        return min(self.cache.max_seq_len, max(SMALLEST_BOUND, 1 << (num_used - 1).bit_length()))

    # -- what every rank does --

    def _step(
        self, tokens: Tensor, positions: Tensor, needs_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        best = None
        if self.fuses(tokens.size(1)):
            assert self.step is not None
            logits, best = self.step(tokens, positions)
        else:
            logits = self._compiled_logits(self._read(tokens, positions, ALL_ROWS))
        if self.group.is_alone:
            return logits, best
        if needs_logits:
            return self.model.gathered(logits), None
        return logits, self.model.likeliest(logits, best)

    def _read(self, tokens: Tensor, positions: Tensor, row: int) -> Tensor:
        cache = self.cache if row == ALL_ROWS else self.cache.row(row)
        run_block = self._run_compiled if self.compiled else None
        return self.model.hidden(tokens, positions, cache, run_block)

    def _logits(self, x: Tensor, compiled: bool) -> Tensor:
        own = self._compiled_logits(x) if compiled else self.model.own_logits(x)
        return self.model.gathered(own)

    def _run_compiled(self, block: Block, x: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        if x.size(1) > 1:
            for tensor in (x, positions, *(rest[0] or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self._blocks[block.kind](block, x, positions, *rest)

    # -- between ranks --

    def _tell(
        self, op: Op, row: int, tokens: Tensor, positions: Tensor, needs_logits: bool = False
    ) -> None:
        """Tells the other ranks to do the same. Tokens are known on the device only."""
        if self.group.leads:
            number, bound = number_of(self), int(self.cache.bound)
            self.group.send(op, number, row, *tokens.shape, bound, needs_logits)
            every = (self.cache.lengths, tokens.flatten(), positions.flatten())
            self.group.broadcast(torch.cat(every))

    @torch.no_grad()
    def follow(self, op: Op, numbers: Sequence[int]) -> None:
        """Does what rank 0 has told, on another rank."""
        if op == Op.LOGITS:
            num_rows, num_tokens, compiled, *_ = numbers
            shape = (num_rows, num_tokens, self.model.config.dim)
            x = torch.empty(shape, dtype=self.model.dtype, device=self.device)
            self._logits(self.group.broadcast(x), bool(compiled))
            return
        row, num_rows, num_tokens, bound, needs_logits, *_ = numbers
        count, num_lengths = num_rows * num_tokens, self.cache.num_rows
        said = torch.empty(num_lengths + 2 * count, dtype=torch.int64, device=self.device)
        lengths, *places = self.group.broadcast(said).split((num_lengths, count, count))
        tokens, positions = (each.view(num_rows, num_tokens) for each in places)
        self.cache.lengths.copy_(lengths)
        self.cache.bound.fill_(bound)
        if op == Op.STEP:
            self._step(tokens, positions, bool(needs_logits))
        else:
            self._read(tokens, positions, row)


@together
def cached_model(
    group: Group,
    model: Transformer,
    num_rows: int,
    max_seq_len: int,
    compile: bool = False,
    kv_cache_dtype: str = "auto",
    steps: bool = True,
) -> CachedModel:
    """A model over a new cache of `num_rows` rows of up to `max_seq_len` tokens. MemoryError where
    it does not fit.
    """
    cache = KVCache.allocate(
        model.config, num_rows, max_seq_len, model.dtype, model.device, kv_cache_dtype
    )
    return CachedModel(model, cache, compile, steps)


@together
def cached_beside(group: Group, other: CachedModel, model: Transformer) -> CachedModel:
    """A model over the cache that another has: its blocks are the other's first ones, or coarser
    copies.
    """
    cache = KVCache(other.cache.layers[: len(model.blocks)], other.cache.lengths)
    return CachedModel(model, cache, other.compiled)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning: their keys are the same."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _run_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _run_logits(model: Transformer, x: Tensor) -> Tensor:
    return model.own_logits(x)
