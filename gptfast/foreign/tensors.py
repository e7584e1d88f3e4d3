"""Tensors of a foreign file under published names."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.shards import SPELLINGS

Raw = dict[str, Any]


class ForeignTensors:
    """Tensors under published names, as views of mapped files. `paired`: name -> number of heads,
    whose rows are stored in the order of rotated pairs and come out in that of halves.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], paired: Mapping[str, int] | None = None
    ) -> None:
        self.folder, self._tensors, self._paired = folder, dict(tensors), dict(paired or {})

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return "F64" if dtype == torch.float64 else SPELLINGS.get(dtype, str(dtype))

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return halves(tensor, self._paired[name]) if name in self._paired else tensor

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        yield self.tensor


def halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2+1, ... (Meta's: neighbours rotate together) ->
    0, 1, ... D-1 (Hugging Face's: halves do). weight [H D, ...].
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
