"""Writes safetensors: one file, or several and their index.

What will be written is said first and then passes through, in any order and one tensor at a time:
no more than one is ever in memory. Knows files and nothing of models.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from gptfast.tensor_files import DTYPES

SHARD_BYTES = 5_000_000_000
SPELLINGS = {dtype: name for name, dtype in DTYPES.items()}
# Of the first number in a file: tensors are mapped and computed with where they lie.
ALIGNMENT = 64


@dataclass(frozen=True)
class Stored:
    """What a tensor will be in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    folder: Path,
    stored: Mapping[str, Stored],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int | None = None,
) -> None:
    """Writes the `tensors`, which are those of `stored`.

    More than `shard_bytes` (None: SHARD_BYTES) go into shards of at most that size, or of a single
    tensor.
    """
    shards = _split(stored, SHARD_BYTES if shard_bytes is None else shard_bytes)
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    places: dict[str, tuple[BinaryIO, int]] = {}
    with ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            opened = stack.enter_context((folder / name).open("wb"))
            places |= {tensor: (opened, start) for tensor, start in _begin(opened, shard).items()}
        for name, tensor in tensors:
            assert Stored(tensor.dtype, tuple(tensor.shape)) == stored[name], name
            file, start = places.pop(name)
            file.seek(start)
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        assert not places, places.keys()
    if len(shards) > 1:
        shard_of = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        size = sum(entry.num_bytes for entry in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": shard_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _split(stored: Mapping[str, Stored], limit: int) -> list[dict[str, Stored]]:
    """In their order, a new shard wherever the next one would make it too large."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, entry in stored.items():
        if shards[-1] and size + entry.num_bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.num_bytes
    return shards


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _begin(file: BinaryIO, shard: Mapping[str, Stored]) -> dict[str, int]:
    """Writes the header and says where in the file each tensor starts. Wide dtypes come first, so
    that every number lies at a multiple of its own size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, entry in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name], end = end, end + entry.num_bytes
        header[name] = {
            "dtype": SPELLINGS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}
