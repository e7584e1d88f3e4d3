"""Where one of our parameters stands in other people's files, and how its numbers are laid out
there. Both directions: `read` brings theirs into ours, `write` ours into theirs.

Knows names and shapes; knows no file format and no model family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptfast.config import ModelConfig
from quantize.formats import QuantizedWeight
from quantize.mxfp4 import dequantize_mxfp4
from quantize.readers import mxfp4_weight

Order = Callable[[ModelConfig], Tensor]


@dataclass(frozen=True)
class Source:
    """The tensors `names`, one below the other along the rows, make up a parameter.

    With `{e}` in the names, entry e of the parameter's first dimension has tensors of its own.
    `transposed`: stored [.., in, out]. `order`: for each of our rows, which of theirs it is; rows
    are dimension `rows_dim` (-1 for stacked biases). `mxfp4`: the two tensors are blocks and scales
    of a weight in that format.
    """

    names: tuple[str, ...]
    transposed: bool = False
    order: Order | None = None
    rows_dim: int = -2
    mxfp4: bool = False

    def renamed(self, change: Callable[[str], str]) -> "Source":
        return replace(self, names=tuple(map(change, self.names)))

    @property
    def is_split(self) -> bool:
        return "{e}" in self.names[0]

    def all_names(self, shape: tuple[int, ...]) -> list[str]:
        """Every tensor that a parameter of `shape` comes from."""
        return [name for names in self._groups(shape) for name in names]

    def shapes(
        self, shape: tuple[int, ...], parts: tuple[int, ...] | None
    ) -> dict[str, tuple[int, ...]]:
        """Their tensor -> its shape, for a parameter of `shape` whose fused `parts` have that many
        rows.
        """
        if self.mxfp4:
            blocks, scales = self.names
            *rows, columns = shape
            return {blocks: (*rows, columns // 32, 16), scales: (*rows, columns // 32)}
        found = {}
        for names in self._groups(shape):
            inner = shape[1:] if self.is_split else shape
            for name, rows_here in zip(names, self._parts(inner, parts), strict=True):
                needed = list(inner)
                needed[self._rows_dim(inner)] = rows_here
                if self.transposed:
                    needed[-2:] = needed[:-3:-1]
                found[name] = tuple(needed)
        return found

    def read(self, target: Tensor, config: ModelConfig, tensor: Callable[[str], Tensor]) -> None:
        """Fills `target` from the tensors that `tensor` gives by name, converting as it copies."""
        order = None if self.order is None else self.order(config)
        if self.mxfp4:
            blocks, scales = map(tensor, self.names)
            for entry, *packed in zip(target, blocks, scales, strict=True):
                weight = dequantize_mxfp4(*(part.to(target.device) for part in packed))
                entry.copy_(weight if order is None else weight[order])
            return
        entries = target if self.is_split else (target,)
        for entry, names in zip(entries, self._groups(tuple(target.shape)), strict=True):
            start = 0
            for name in names:
                theirs = tensor(name)
                theirs = theirs.transpose(-1, -2) if self.transposed else theirs
                if order is not None:
                    theirs = theirs.index_select(self._rows_dim(theirs.shape), order)
                if len(names) == 1:
                    entry.copy_(theirs)
                else:
                    entry[start : start + theirs.size(0)].copy_(theirs)
                    start += theirs.size(0)

    def read_quantized(
        self,
        shape: tuple[int, ...],
        config: ModelConfig,
        quantized: Callable[[str], QuantizedWeight],
    ) -> QuantizedWeight | None:
        """The stored form of a weight of `shape`, of which `quantized` gives the parts by name;
        None where they have no form in common.
        """
        order = None if self.order is None else self.order(config)
        entries = []
        for names in self._groups(shape):
            parts = [quantized(name) for name in names]
            if not QuantizedWeight.can_join(parts):
                return None
            weight = QuantizedWeight.join(parts)
            entries.append(weight if order is None else weight.rows(order))
        if not self.is_split:
            return entries[0]
        return QuantizedWeight.stack(entries) if QuantizedWeight.can_join(entries) else None

    def read_mxfp4(self, config: ModelConfig, tensor: Callable[[str], Tensor]) -> QuantizedWeight:
        """A weight in that format, as it is stored."""
        assert self.mxfp4
        weight = mxfp4_weight(*map(tensor, self.names))
        return weight if self.order is None else weight.rows(self.order(config))

    def write(
        self, ours: Tensor, config: ModelConfig, parts: tuple[int, ...] | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors that `read` would make `ours` of. Not for mxfp4."""
        assert not self.mxfp4
        order = None if self.order is None else self.order(config).argsort()
        entries = ours if self.is_split else (ours,)
        for entry, names in zip(entries, self._groups(tuple(ours.shape)), strict=True):
            rows = self._parts(tuple(entry.shape), parts)
            pieces = entry.split(rows) if len(names) > 1 else (entry,)
            for name, piece in zip(names, pieces, strict=True):
                if order is not None:
                    piece = piece.index_select(self._rows_dim(piece.shape), order)
                yield name, (piece.transpose(-1, -2) if self.transposed else piece).contiguous()

    def _groups(self, shape: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
        if not self.is_split:
            yield self.names
            return
        for entry in range(shape[0]):
            yield tuple(name.replace("{e}", str(entry)) for name in self.names)

    def _parts(self, shape: tuple[int, ...], parts: tuple[int, ...] | None) -> list[int]:
        if len(self.names) == 1:
            return [shape[self._rows_dim(shape)]]
        assert parts is not None and len(parts) == len(self.names)
        return list(parts)

    def _rows_dim(self, shape: Sequence[int]) -> int:
        return max(0, len(shape) + self.rows_dim)


Names = Mapping[str, tuple[Source, ...]]  # ours -> the alternatives, the usual one first


# -- orders of rows --


def by_kv_head(config: ModelConfig) -> Tensor:
    """Theirs: for each key/value head its query heads, its key head, its value head."""
    group = config.num_heads // config.num_kv_heads
    rows = torch.arange(config.num_kv_heads * (group + 2) * config.head_dim)
    q, k, v = rows.view(config.num_kv_heads, group + 2, -1).split((group, 1, 1), dim=1)
    return torch.cat((q.flatten(), k.flatten(), v.flatten()))


def by_quarter(config: ModelConfig) -> Tensor:
    """Theirs: four quarters (the parts of a model-parallel run), each queries, values, keys."""
    rows = torch.arange(3 * config.num_heads * config.head_dim)
    q, v, k = rows.view(4, 3, -1).unbind(1)
    return torch.cat((q.flatten(), k.flatten(), v.flatten()))


def by_pair(config: ModelConfig) -> Tensor:
    """Theirs: rows of gate and up in turn."""
    assert config.experts is not None
    rows = torch.arange(2 * config.experts.hidden_dim).view(-1, 2)
    return rows.t().flatten()
