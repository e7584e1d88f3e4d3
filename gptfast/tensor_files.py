"""The safetensors of a folder: names, shapes and dtypes at once, numbers on demand from mapped
pages.

Knows files and nothing of models. Everything that can be wrong with them is a ValueError that names
the file.
"""

import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# From a name to a tensor, or with an Index (a slice of each of its first dimensions) to a part.
Index = tuple[slice, ...]
Read = Callable[..., Tensor]

MADV_POPULATE_READ = 22  # Python does not name it
AHEAD_BYTES = 16 << 20  # asked for at once
# As safetensors spells them.
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; ValueError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, found a {type(value).__name__}")
    return value


class Tensors(Protocol):
    """Named tensors of a checkpoint, whatever files they are in. `dtype` is spelled as safetensors
    does: F32, BF16, I8 ...
    """

    folder: Path

    @property
    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def tensor(self, name: str) -> Tensor: ...

    def reader(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """A function from names to tensors, for a few of them."""


class TensorFiles:
    """All tensors of a folder, whichever file they are in, or those of some `files` of it.
    `bytes_read` counts what was asked for so far, of tensors and parts of them.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.bytes_read, self._counting = 0, threading.Lock()
        paths = _weight_files(folder) if files is None else files
        self._files = {path: _open(path) for path in paths}
        self._file_of: dict[str, Path] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118
                if name in self._file_of:
                    both = f"{self._file_of[name].name} and {path.name}"
                    raise ValueError(f"{folder}: tensor {name} is in both {both}; keep one of them")
                self._file_of[name] = path
        if files is None:
            _check_index(folder, self._file_of)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        with self.reader() as read:
            return read(name)

    def mapped(self, name: str, block: range | None = None) -> Tensor:
        """The tensor, or a block of its first dimension, where it lies in its file, read into
        memory but not copied; what is written to it stays in this process. The file may be replaced
        meanwhile, not overwritten.
        """
        start, end = self._places[name]
        dtype, shape = DTYPES[self.dtype(name)], self.shape(name)
        if block is not None:
            each = (end - start) // shape[0]
            start, end = start + block.start * each, start + block.stop * each
            shape = (len(block), *shape[1:])
        if start % dtype.itemsize:
            with self.reader() as read:
                index = () if block is None else (slice(block.start, block.stop),)
                return read(name, index).clone()
        page = start - start % mmap.ALLOCATIONGRANULARITY
        # A map for each tensor: its pages are given up with it.
        with self._file_of[name].open("rb") as file:
            pages = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
        if sys.platform == "linux":
            # Resident from now on, so that they are not taken for free memory.
            with suppress(OSError):  # before Linux 5.14: read when they are used
                pages.madvise(MADV_POPULATE_READ)
        count = (end - start) // dtype.itemsize
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start - page)
        self._count(end - start)
        return flat.view(shape)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where in its file a tensor begins and ends."""
        places = {}
        for path in self._files:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                places[name] = (8 + size + start, 8 + size + end)
        return places

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """A function from names to tensors, or to parts of them, for a few of them.

        It opens files of its own, because the pages that were read through a file stay resident
        until it is closed: loading 1.1 B bf16 weights peaked at 4.7 GB instead of 2.5, and no
        faster.
        """
        opened: dict[Path, Any] = {}

        def read(name: str, index: Index = ()) -> Tensor:
            path = self._file_of[name]
            if path not in opened:
                opened[path] = _open(path)
            # Both are views of mapped pages: only what is used of them is read.
            file = opened[path]
            tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
            self._count(tensor.nbytes)
            return tensor

        yield read

    def _count(self, num_bytes: int) -> None:
        with self._counting:  # several threads read
            self.bytes_read += num_bytes


def taken(read: Read, name: str, index: Index) -> Tensor:
    """A tensor or a part of it. Only TensorFiles, and what is made of them, give parts."""
    return read(name, index) if index else read(name)


def read_ahead(folder: Path) -> None:
    """Asks the system to bring the folder's weights into the page cache, in a thread, while they
    are being used: read as pages of a map are needed, 2.2 GB took 2.4 s instead of 1.9.
    """
    if hasattr(os, "posix_fadvise"):
        paths = _weight_files(folder)
        threading.Thread(target=_read_ahead, args=(paths,), daemon=True).start()


def _read_ahead(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            size = path.stat().st_size
            for start in range(0, size, AHEAD_BYTES):
                os.posix_fadvise(file.fileno(), start, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _weight_files(folder: Path) -> list[Path]:
    """The shards that an index names, or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index}: there is no weight_map")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise ValueError(
                    f"{index}: shard {shard!r} is not a plain file name of this folder"
                )
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if (folder / "model.safetensors") in paths:
            paths = [folder / "model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{folder}: {index.name} names shards that are not there: {some(missing)}")
    if not paths:
        others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt")]
        hint = f" (found {some(others)}: pickles are not read here, see gptfast convert)"
        hint = hint if others else ""
        raise ValueError(f"{folder}: there are no .safetensors weights{hint}")
    return paths


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}; "
            f"{path.stat().st_size:,} bytes found); download or copy it again"
        ) from None


def _check_index(folder: Path, file_of: dict[str, Path]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised = read_json(index)["weight_map"]
        wrong = [n for n, shard in promised.items() if n not in file_of or file_of[n].name != shard]
        if wrong:
            raise ValueError(
                f"{index}: tensors are not in the shards it names for them: {some(wrong)}"
            )


def some(names: list[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
