"""A checkpoint in, a checkpoint out: with our own names and fused weights, which loads fastest, or
as Hugging Face publishes it.

Our parameters pull their tensors as in loading, one at a time, and pass to the new files. Nothing
appears under the final name before everything is on the disk.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.checkpoint import (
    FORMAT,
    FORMAT_KEY,
    Checkpoint,
    Progress,
    check_tied_head,
    inspect,
    match,
    parameter_shapes,
    read_config,
    read_parameters,
)
from gptfast.device import format_bytes, parse_dtype
from gptfast.families import language_part, model_config
from gptfast.foreign import is_foreign, read_foreign
from gptfast.lora import merge
from gptfast.model import Transformer, fused_rows, keeps_float32
from gptfast.shards import Stored, write_tensors
from gptfast.sources import Source
from gptfast.tensor_files import Tensors, some

TARGETS = ("gptfast", "hf")
# Where names alone do not follow from the facts: our parameter -> the tensor it was read from.
PLACES_KEY = "gptfast_places"
# What stands beside the weights and belongs to the model.
COMPANIONS = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.json *.model *.model.v[0-9]* *.tiktoken "
    "*.jinja LICENSE* NOTICE* USE_POLICY*"
).split()
COMPANIONS_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class Conversion:
    """What was written. `left_out`: what the source holds beside the language model, "" where
    nothing; `has_tokenizer`: whether text can be read with the new folder.
    """

    folder: Path
    num_parameters: int
    num_bytes: int
    dtype: torch.dtype
    left_out: str
    has_tokenizer: bool


def convert(
    source: Path,
    out: Path,
    to: str = "gptfast",
    dtype: str | torch.dtype = "auto",
    adapters: Sequence[Path] = (),
    *,
    facts: Path | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    progress: Progress = iter,
) -> Conversion:
    """Writes the model of the folder or foreign file `source` into the new folder `out`, with LoRA
    `adapters` merged.

    "auto" is the dtype that loading would choose. `facts`: a json file for formats that do not say
    all. `overwrite`: a checkpoint at `out` makes way, once the new one is complete. ValueError says
    in one line what is in the way; `out` is then as it was.
    """
    if to not in TARGETS:
        raise ValueError(f"target {to!r} is unknown; use one of: {', '.join(TARGETS)}")
    chosen, out = parse_dtype(dtype), Path(os.path.abspath(out))
    _check_places(source, out, adapters, overwrite)
    checkpoint, raw = _read(source, allow_pickle, facts)
    check_tied_head(checkpoint)
    left_out = checkpoint.left_out
    if adapters:
        checkpoint, raw = _merged(checkpoint, raw, adapters)
    job = _Job(checkpoint, raw, chosen or checkpoint.dtype, to == "gptfast")
    companions = _companions(source)
    with _new_folder(out, overwrite) as folder:
        _check_space(out.parent, job.num_bytes + sum(path.stat().st_size for path in companions))
        for path in companions:
            target = folder / path.relative_to(checkpoint.tensors.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        (folder / "config.json").write_text(json.dumps(job.config(), indent=2) + "\n")
        write_tensors(folder, job.stored(), job.tensors(progress), shard_bytes)
        inspect(folder)  # what was written is what will be read
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.model", "*.tiktoken")
    return Conversion(
        folder=out,
        num_parameters=checkpoint.config.num_parameters,
        num_bytes=job.num_bytes,
        dtype=job.dtype,
        left_out=left_out,
        has_tokenizer=any(fnmatchcase(p.name, t) for p in companions for t in tokenizers),
    )


def _read(
    source: Path, allow_pickle: bool, facts: Path | None
) -> tuple[Checkpoint, dict[str, Any]]:
    """What `source` holds, and its config.json or what stands for it."""
    if is_foreign(source):
        raw, tensors = read_foreign(source, allow_pickle, facts)
        return match(model_config(raw), raw, tensors), raw
    if facts is not None:
        raise ValueError(f"{source} has a config.json of its own; leave out --config")
    return inspect(source), read_config(source)[1]


class _Job:
    """Which tensors there will be, and how they come about."""

    def __init__(
        self, checkpoint: Checkpoint, raw: Mapping[str, Any], dtype: torch.dtype, own: bool
    ) -> None:
        self.checkpoint, self.raw, self.dtype, self.own = checkpoint, raw, dtype, own
        self.places = published_places(checkpoint, raw)
        with torch.device("meta"):
            self.model = Transformer(checkpoint.config)

    def config(self) -> dict[str, Any]:
        """The new config.json."""
        raw = dict(self.raw) if self.own else dict(language_part(self.raw))
        for key in (FORMAT_KEY, PLACES_KEY):
            raw.pop(key, None)
        parts = [raw]
        if self.own and isinstance(raw.get("text_config"), Mapping):
            raw["text_config"] = dict(raw["text_config"])
            parts.append(raw["text_config"])
        for part in parts:
            part.pop("quantization_config", None)  # weights are plain numbers now
            for key in {"dtype", "torch_dtype"} & part.keys() or {"torch_dtype"}:
                part[key] = str(self.dtype).removeprefix("torch.")
        if self.own:
            raw[FORMAT_KEY] = FORMAT
            if places := self._places_to_remember():
                raw[PLACES_KEY] = places
        return raw

    def _places_to_remember(self) -> dict[str, str]:
        family = self.checkpoint.family
        return {
            name: place.names[0]
            for name, place in self.places.items()
            if place != family.sources(name)[0]
        }

    def stored(self) -> dict[str, Stored]:
        """Every tensor of the new files, in the order of our parameters."""
        found: dict[str, Stored] = {}
        for name, parameter in self.model.named_parameters():
            dtype = torch.float32 if keeps_float32(name) else self.dtype
            shape = tuple(parameter.shape)
            shapes = {name: shape} if self.own else self._published_shapes(name, shape)
            found |= {theirs: Stored(dtype, shape) for theirs, shape in shapes.items()}
        return found

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.stored().values())

    def _published_shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return self.places[name].shapes(shape, fused_rows(self.checkpoint.config, name))

    def tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        config = self.checkpoint.config
        cpu = torch.device("cpu")
        for name, ours in read_parameters(self.checkpoint, self.model, self.dtype, cpu, progress):
            if self.dtype == torch.float16 and not ours.isfinite().all():
                raise ValueError(
                    f"{self.checkpoint.folder}: {name} has numbers that float16 cannot hold (or "
                    "that are none); use --dtype bf16 or fp32"
                )
            if self.own:
                yield name, ours
            else:
                yield from self.places[name].write(ours, config, fused_rows(config, name))


def published_places(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Our parameter -> where published files have it, in plain numbers: of several places the one
    it was read from.
    """
    remembered = raw.get(PLACES_KEY)
    remembered = remembered if isinstance(remembered, Mapping) else {}
    places = {}
    for name, found in checkpoint.sources.items():
        plain = [place for place in checkpoint.family.sources(name) if not place.mxfp4]
        read_from = str(remembered.get(name, found.names[0]))
        # Beginnings of names differ between files.
        same = [place for place in plain if _ending(place.names[0]) == _ending(read_from)]
        places[name] = (same or plain)[0]
    return places


def _ending(name: str) -> list[str]:
    return name.split(".")[-2:]


class _Published:
    """The tensors of a checkpoint of our own names as published files have them; the parameter
    asked for last is kept.
    """

    def __init__(self, checkpoint: Checkpoint, raw: Mapping[str, Any]) -> None:
        self.folder = checkpoint.tensors.folder
        self._checkpoint, self._places = checkpoint, published_places(checkpoint, raw)
        config = checkpoint.config
        self._parameters = parameter_shapes(config)
        self._ours: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for ours, shape in self._parameters.items():
            shapes = self._places[ours].shapes(shape, fused_rows(config, ours))
            self._shapes |= shapes
            self._ours |= dict.fromkeys(shapes, ours)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._checkpoint.tensors.dtype(self._ours[name])

    def tensor(self, name: str) -> Tensor:
        ours, config = self._ours[name], self._checkpoint.config
        if self._last[0] != ours:
            tensor = self._checkpoint.tensors.tensor(ours)
            parts = fused_rows(config, ours)
            self._last = (ours, dict(self._places[ours].write(tensor, config, parts)))
        return self._last[1][name]

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        yield self.tensor


def _merged(
    checkpoint: Checkpoint, raw: dict[str, Any], adapters: Sequence[Path]
) -> tuple[Checkpoint, dict[str, Any]]:
    if checkpoint.is_own:
        tensors: Tensors = _Published(checkpoint, raw)
        raw = {key: value for key, value in raw.items() if key not in (FORMAT_KEY, PLACES_KEY)}
        checkpoint = match(checkpoint.config, raw, tensors)
    tensors, raw = merge(checkpoint, raw, adapters)
    merged = match(model_config(raw), raw, tensors)
    return replace(merged, dtype=checkpoint.dtype), raw


# -- files --


def _companions(source: Path) -> list[Path]:
    """Files of tokenizer, templates and licence. Beside a single file only a tokenizer is taken for
    its own, and nothing where other weights stand there too.
    """
    folder = source
    if source.is_file():
        folder, kinds = source.parent, ("*.bin", "*.pt", "*.pth", "*.safetensors")
        others = {p for kind in kinds for p in folder.glob(kind)} - {folder / "tokenizer.bin"}
        own = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
        own += [folder / name for name in ("merges.txt", "tokenizer_config.json")]
        return [path for path in own if path.is_file()] if others == {source} else []
    found = [p for p in folder.iterdir() if any(fnmatchcase(p.name, c) for c in COMPANIONS)]
    found += (folder / COMPANIONS_FOLDER).glob("*.jinja")
    return sorted(path for path in found if path.is_file())


def _check_places(source: Path, out: Path, adapters: Sequence[Path], replaces: bool) -> None:
    there = out.absolute().parent.resolve() / out.name
    place = source.resolve()
    if there == place or (place.is_dir() and there.is_relative_to(place)):
        raise ValueError(f"{out} is {source} or inside of it; convert into another folder")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if not replaces:
        raise ValueError(f"{out} exists; give another folder, or --force to replace a checkpoint")
    if out.is_symlink() or not _holds_checkpoint(out):
        raise ValueError(f"{out} exists and is no folder with a checkpoint; it is not replaced")
    for used in (source, *adapters):
        parts = used.iterdir() if used.is_dir() else ()  # links may point anywhere
        if any(part.resolve().is_relative_to(there) for part in (used, *parts)):
            raise ValueError(f"{used} is inside of {out}, which would be replaced")
    if strangers := sorted(path.name for path in out.iterdir() if not _belongs(path)):
        raise ValueError(
            f"{out} holds more than a checkpoint, which would be lost: {some(strangers)}; move it "
            "away, or convert into another folder"
        )


def _belongs(path: Path) -> bool:
    """Whether a file or folder may stand in the folder of a checkpoint."""
    if path.is_dir():
        return path.name in (COMPANIONS_FOLDER, ".cache")
    kinds = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.md", ".git*", *COMPANIONS)
    return any(fnmatchcase(path.name, kind) for kind in kinds)


def _holds_checkpoint(folder: Path) -> bool:
    weights = ("*.safetensors", "*.bin", "*.pth", "*.pt")
    return (folder / "config.json").is_file() and any(any(folder.glob(w)) for w in weights)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"the new checkpoint needs {format_bytes(num_bytes)}, and {format_bytes(free)} are "
            f"free in {folder}; nothing was written"
        )


@contextmanager
def _new_folder(out: Path, replaces: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all has gone well, and disappears otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out.parent} cannot be made ({error.strerror})") from None
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    replaced = partial / "replaced"
    try:
        folder = partial / out.name
        folder.mkdir()  # mkdtemp's own is for its owner only
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        if replaces and out.exists():
            out.rename(replaced)
        folder.rename(out)
        _sync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"{error.strerror} in {out.parent}; make space and convert again ({out} is as it "
                "was)"
            ) from None
        raise
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
