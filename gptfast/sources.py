"""Where one of our parameters stands in other people's files, and how its numbers are laid out
there. Both directions: `read` brings theirs into ours, `write` ours into theirs.

Knows names and shapes; knows no file format and no model family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.sharding import WHOLE, Shard, why_not_ordered
from gptfast.tensor_files import Read, taken
from quantize.formats import QuantizedWeight
from quantize.mxfp4 import BLOCK_SIZE, dequantize_mxfp4
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

    def read(self, target: Tensor, config: ModelConfig, tensor: Read, shard: Shard = WHOLE) -> None:
        """Fills `target`, the shard of a parameter, from the tensors that `tensor` gives by name,
        converting as it copies.
        """
        order = None if self.order is None else self.order(config)
        if self.mxfp4:
            self._read_mxfp4_as_plain(target, order, tensor, shard)
            return
        entries = target if self.is_split else (target,)
        inner = replace(shard, entries=None) if self.is_split else shard
        for entry, names in zip(entries, self._groups(tuple(target.shape), shard), strict=True):
            start, dim = 0, self._dim_of_rows(entry.dim(), shard)
            for name, part in zip(names, _of_each(names, inner), strict=True):
                for theirs in self._taken(name, entry.dim(), order, tensor, part):
                    entry.narrow(dim, start, theirs.size(dim)).copy_(theirs)
                    start += theirs.size(dim)
            assert start == entry.size(dim)

    def _taken(
        self, name: str, num_dims: int, order: Tensor | None, tensor: Read, shard: Shard
    ) -> Iterator[Tensor]:
        """The shard of one of their tensors, laid out as ours, a range of rows after the other."""
        near, rows = (shard, None) if order is None else _around(shard, order)
        for index in near.indices(num_dims):
            if self.transposed and index:
                whole = (*index, *[slice(None)] * (num_dims - len(index)))
                index = (*whole[:-2], whole[-1], whole[-2])
            theirs = taken(tensor, name, index)
            theirs = theirs.transpose(-1, -2) if self.transposed else theirs
            if rows is not None:
                theirs = theirs.index_select(self._dim_of_rows(num_dims, shard), rows)
            yield theirs

    def _read_mxfp4_as_plain(
        self, target: Tensor, order: Tensor | None, tensor: Read, shard: Shard
    ) -> None:
        blocks, scales, rows = self._mxfp4_parts(order, tensor, shard)
        start = 0 if shard.columns is None else shard.columns.start % BLOCK_SIZE
        for entry, *packed in zip(target, blocks, scales, strict=True):
            weight = dequantize_mxfp4(*(part.to(target.device) for part in packed))
            weight = weight if rows is None else weight[rows]
            entry.copy_(weight.narrow(-1, start, entry.size(-1)))

    def _mxfp4_parts(
        self, order: Tensor | None, tensor: Read, shard: Shard
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Blocks and scales that a shard lies in, and which of their rows it is (None: all)."""
        near, rows = _around(shard, order)
        [index] = near.in_groups(BLOCK_SIZE).indices(3)
        blocks, scales = (taken(tensor, name, index) for name in self.names)
        return blocks, scales, rows

    def read_quantized(
        self,
        shape: tuple[int, ...],
        config: ModelConfig,
        quantized: Callable[[str], QuantizedWeight],
        shard: Shard = WHOLE,
    ) -> QuantizedWeight | None:
        """The stored form of a weight, or of a shard, of `shape`; None where the parts, which
        `quantized` gives by name, have no form in common. Parts are read whole, then cut.
        """
        order = None if self.order is None else self.order(config)
        entries = []
        for names in self._groups(shape, shard):
            each = zip(names, _of_each(names, shard), strict=True)
            parts = [_rows(quantized(name), order, part) for name, part in each]
            if not QuantizedWeight.can_join(parts):
                return None
            entries.append(_columns(QuantizedWeight.join(parts), shard, names[0]))
        if not self.is_split:
            return entries[0]
        return QuantizedWeight.stack(entries) if QuantizedWeight.can_join(entries) else None

    def read_mxfp4(
        self, config: ModelConfig, tensor: Read, shard: Shard = WHOLE
    ) -> QuantizedWeight:
        """A weight in that format, or a shard of whole blocks, as it is stored."""
        assert self.mxfp4
        order = None if self.order is None else self.order(config)
        blocks, scales, rows = self._mxfp4_parts(order, tensor, shard)
        weight = mxfp4_weight(blocks, scales)
        return weight if rows is None else weight.rows(rows)

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

    def _groups(self, shape: tuple[int, ...], shard: Shard = WHOLE) -> Iterator[tuple[str, ...]]:
        if not self.is_split:
            yield self.names
            return
        for entry in shard.entries or range(shape[0]):
            yield tuple(name.replace("{e}", str(entry)) for name in self.names)

    def _parts(self, shape: tuple[int, ...], parts: tuple[int, ...] | None) -> list[int]:
        if len(self.names) == 1:
            return [shape[self._rows_dim(shape)]]
        assert parts is not None and len(parts) == len(self.names)
        return list(parts)

    def _rows_dim(self, shape: Sequence[int]) -> int:
        return max(0, len(shape) + self.rows_dim)

    def _dim_of_rows(self, num_dims: int, shard: Shard) -> int:
        return max(0, num_dims + (self.rows_dim if shard.rows is None else shard.rows_dim))


def _of_each(names: Sequence[str], shard: Shard) -> list[Shard]:
    """What is held of each of the tensors that stand one below the other."""
    return [shard] if len(names) == 1 else [shard.part(number) for number in range(len(names))]


def _around(shard: Shard, order: Tensor | None) -> tuple[Shard, Tensor | None]:
    """The rows from the first to the last that a shard needs of theirs, and which of these are its
    own, in its order (None: all, as they are).
    """
    if shard.rows is None:
        return shard, order
    rows = shard.row_numbers if order is None else order[shard.row_numbers]
    first, end = int(rows.min()), int(rows.max()) + 1
    return replace(shard, parts=(end,), rows=(range(first, end),)), rows - first


def _rows(weight: QuantizedWeight, order: Tensor | None, shard: Shard) -> QuantizedWeight:
    rows = order
    if shard.rows is not None:
        rows = shard.row_numbers if order is None else order[shard.row_numbers]
    return weight if rows is None else weight.rows(rows)


def _columns(weight: QuantizedWeight, shard: Shard, name: str) -> QuantizedWeight:
    """In memory of their own."""
    if shard.columns is None:
        return weight
    if weight.order is not None:
        raise ValueError(why_not_ordered(name))
    weight = weight.columns(shard.columns.start, shard.columns.stop)
    parts: dict[str, Any] = {part: numbers.clone() for part, numbers in weight.tensors.items()}
    return replace(weight, **parts)


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
