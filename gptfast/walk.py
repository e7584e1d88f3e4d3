"""A walk over a Transformer: the hidden states of calibration sequences, carried from block to
block, and what the linears of a block read.

Knows the modules of a block and which of them share an input; knows no method and no file. Letters:
S sequences of T tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.attention import LatentAttention
from gptfast.experts import Experts
from gptfast.layers import GatedMLP
from gptfast.model import Block, Transformer

# Tokens that go through a block together.
BATCH_TOKENS = 2048

Linears = tuple[str, ...]  # modules, named within their block


class Walk:
    """The hidden states of all sequences before one block after the other. In memory: S * T * dim
    numbers in the model's dtype, and what a block computes for a batch.

    `ids` [S, T] are on the model's device. Of the model, embeddings must be there from the start, a
    block when it is run.
    """

    def __init__(self, model: Transformer, ids: Tensor) -> None:
        seq_len = ids.size(1)
        self.model = model
        self._turns: list[Any] = []  # of each block
        self._positions = torch.arange(seq_len, device=ids.device).unsqueeze(0)
        size = max(1, BATCH_TOKENS // seq_len)
        with torch.no_grad():
            self.hidden = [self._embedded(part) for part in ids.split(size)]

    def _embedded(self, ids: Tensor) -> Tensor:
        """[B, T, dim] before the first block. On the way the model says how each block rotates."""
        turns = []

        def skip(block: nn.Module, x: Tensor, positions: Tensor, turn: Any, cache: None) -> Tensor:
            # All rows have the same positions.
            turns.append(None if turn is None else tuple(part[:1] for part in turn))
            return x

        x = self.model.hidden(ids, self._positions.expand_as(ids), run_block=skip)
        self._turns = turns
        return x

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Takes the hidden states through a block; ValueError where they are no numbers."""
        block = self.model.blocks[layer]
        for x in self.hidden:
            x.copy_(self._run(block, layer, x))
            if not x.isfinite().all():
                raise ValueError(
                    f"block {layer} makes numbers that {x.dtype} cannot hold; use bf16 or fp32"
                )

    @torch.no_grad()
    def watch(self, layer: int, watchers: Mapping[str, Callable[..., None]]) -> None:
        """Runs a block and shows each watcher the arguments of its module (named within the block),
        batch by batch. What comes after the last of them is not computed.
        """
        block = self.model.blocks[layer]
        for x in self.hidden:
            with _watching(block, watchers):
                try:
                    self._run(block, layer, x)
                except _AllSeen:
                    continue

    def _run(self, block: nn.Module, layer: int, x: Tensor) -> Tensor:
        return block(x, self._positions.expand(x.shape[:2]), self._turns[layer], None)


class _AllSeen(Exception):
    """All watchers have been called."""


@contextmanager
def _watching(block: nn.Module, watchers: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    waiting = set(watchers)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            watchers[name](*arguments)
            waiting.discard(name)
            if not waiting:
                raise _AllSeen

        return seen

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- which linears read what --


def stages(block: Block) -> list[list[Linears]]:
    """The linears of a block in the order in which they run: those of a stage depend only on
    earlier stages, and what is together in a tuple reads the same input.
    """
    mlp_first, mlp_last = _mlp_stages(block.mlp)
    first: Linears = ("attention.qkv",)
    inner: list[list[Linears]] = []
    if isinstance(block.attention, LatentAttention):
        first = ("attention.q", "attention.kv_a")
        if block.attention.latent.q_rank is not None:
            first, inner = ("attention.q_a", "attention.kv_a"), [[("attention.q",)]]
    out: list[Linears] = [("attention.out",)]
    middle = [*inner, out]
    if block.shared_norm and len(mlp_first) == 1:
        return [[first + mlp_first[0]], *middle, mlp_last]
    return [[first], *middle, mlp_first, mlp_last]


def _mlp_stages(mlp: nn.Module) -> tuple[list[Linears], list[Linears]]:
    if not isinstance(mlp, Experts):
        return [("mlp.gate_up" if isinstance(mlp, GatedMLP) else "mlp.up",)], [("mlp.down",)]
    first: list[Linears] = [("mlp.expert_gate_up",)]
    last: list[Linears] = [("mlp.expert_down",)]
    if mlp.shared is not None:
        first.append(("mlp.shared.gate_up",))
        last.append(("mlp.shared.down",))
    return first, last
