"""A checkpoint in, a checkpoint out: with our own names and fused weights, which loads fastest, or
as Hugging Face publishes it.

Our parameters pull their tensors as in loading, one at a time, and pass to the new files. Nothing
appears under the final name before everything is on the disk.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    empty_model,
    inspect,
    match,
    parameter_shapes,
    read_config,
)
from gptfast.device import parse_dtype
from gptfast.families import language_part, model_config
from gptfast.foreign import is_foreign, read_foreign
from gptfast.loading import check_plan, read_stored, read_weights
from gptfast.lora import merge
from gptfast.model import fused_rows, keeps_float32
from gptfast.new_folder import check_places, check_space, companions, new_folder
from gptfast.quantization import QuantPlan
from gptfast.shards import Stored, write_tensors
from gptfast.sources import Source
from gptfast.stored import quantization_config, stored_parts, tensors_of
from gptfast.tensor_files import Tensors
from quantize.formats import Format, QuantizedWeight

TARGETS = ("gptfast", "hf")
# Where names alone do not follow from the facts: our parameter -> the tensor it was read from.
PLACES_KEY = "gptfast_places"


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
    quant: QuantPlan | None = None,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    progress: Progress = iter,
) -> Conversion:
    """Writes the model of the folder or foreign file `source` into the new folder `out`, with LoRA
    `adapters` merged.

    "auto" is the dtype that loading would choose. `facts`: a json file for formats that do not say
    all. With a plan `quant` linears are rounded to its formats; what is quantized already stays so,
    or becomes plain numbers for "hf". `overwrite`: a checkpoint at `out` makes way, once the new
    one is complete. ValueError says in one line what is in the way; `out` is then as it was.
    """
    if to not in TARGETS:
        raise ValueError(f"target {to!r} is unknown; use one of: {', '.join(TARGETS)}")
    chosen, out = parse_dtype(dtype), Path(os.path.abspath(out))
    check_places(source, out, adapters, overwrite)
    checkpoint, raw = _read(source, allow_pickle, facts)
    check_tied_head(checkpoint)
    left_out = checkpoint.left_out
    if adapters:
        if checkpoint.is_quantized:
            raise ValueError(
                f"{source} is quantized ({checkpoint.quantized_as}) and adapters are merged into "
                "plain weights: convert it with --to hf first"
            )
        checkpoint, raw = _merged(checkpoint, raw, adapters)
    plan = check_plan(checkpoint, quant)
    if plan is not None and to != "gptfast":
        raise ValueError(f"a quantized model is written for gptfast only, not for {to!r}")
    job = _Job(checkpoint, raw, chosen or checkpoint.dtype, to == "gptfast", plan)
    beside = companions(source)
    place = checkpoint.tensors.folder
    with new_folder(out, overwrite) as folder:
        check_space(out.parent, job.num_bytes + sum(path.stat().st_size for path in beside))
        write_checkpoint(
            folder, place, beside, job.config(), job.stored(), job.tensors(progress), shard_bytes
        )
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.model", "*.tiktoken")
    return Conversion(
        folder=out,
        num_parameters=checkpoint.config.num_parameters,
        num_bytes=job.num_bytes,
        dtype=job.dtype,
        left_out=left_out,
        has_tokenizer=any(fnmatchcase(p.name, t) for p in beside for t in tokenizers),
    )


def write_checkpoint(
    folder: Path,
    source: Path,
    beside: Sequence[Path],
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int | None = None,
) -> None:
    """Fills a new folder: the files `beside` the weights of `source`, config.json and tensors."""
    for path in beside:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(folder, stored, tensors, shard_bytes)
    inspect(folder)  # what was written is what will be read


def own_config(
    checkpoint: Checkpoint, raw: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of a checkpoint under our own names."""
    return _Job(checkpoint, raw, dtype, own=True).config()


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
        self,
        checkpoint: Checkpoint,
        raw: Mapping[str, Any],
        dtype: torch.dtype,
        own: bool,
        plan: QuantPlan | None = None,
    ) -> None:
        self.checkpoint, self.raw, self.dtype, self.own = checkpoint, raw, dtype, own
        self.places = published_places(checkpoint, raw)
        self.model = empty_model(checkpoint.config, checkpoint.formats if checkpoint.is_own else ())
        self.to_make = {} if plan is None else plan.formats(self.model)
        self.formats: dict[str, Format] = {}
        self._parts: dict[str, dict[str, Stored]] = {}
        if own:
            self._parts = self._made_parts() if self.to_make else self._kept_parts()
            formats = self.to_make or checkpoint.formats
            self.formats = {module: formats[module] for module in self._parts}

    def _made_parts(self) -> dict[str, dict[str, Stored]]:
        """Module -> the tensors that quantizing will make."""
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        shapes.setdefault("head.weight", shapes["embed.weight"])
        return {
            module: stored_parts(module, form, shapes[f"{module}.weight"])
            for module, form in self.to_make.items()
        }

    def _kept_parts(self) -> dict[str, dict[str, Stored]]:
        """Module -> its stored tensors. They are looked at: the parts of a published weight may
        turn out to have no form in common.
        """
        found = {}
        for name, parameter in self.model.named_parameters():
            module = name.removesuffix(".weight")
            if module not in self.checkpoint.formats:
                continue
            weight = read_stored(self.checkpoint, module, tuple(parameter.shape))
            if weight is not None:
                parts = tensors_of(module, weight)
                found[module] = {n: Stored(t.dtype, tuple(t.shape)) for n, t in parts.items()}
        return found

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
            part.pop("quantization_config", None)  # of others
            for key in {"dtype", "torch_dtype"} & part.keys() or {"torch_dtype"}:
                part[key] = str(self.dtype).removeprefix("torch.")
        if self.own:
            raw[FORMAT_KEY] = FORMAT
            if self.formats:
                raw["quantization_config"] = self._quantization_config()
            if places := self._places_to_remember():
                raw[PLACES_KEY] = places
        return raw

    def _quantization_config(self) -> dict[str, Any]:
        if self.checkpoint.is_own and not self.to_make:  # with all that it says to people
            return self.raw["quantization_config"]
        return quantization_config(self.formats, "rtn" if self.to_make else self.checkpoint.method)

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
        for parts in self._parts.values():
            found |= parts
        for name, parameter in self.model.named_parameters():
            if name.removesuffix(".weight") in self._parts or name in self._left_out:
                continue
            dtype = torch.float32 if keeps_float32(name) else self.dtype
            shape = tuple(parameter.shape)
            shapes = {name: shape} if self.own else self._published_shapes(name, shape)
            found |= {theirs: Stored(dtype, shape) for theirs, shape in shapes.items()}
        return found

    @property
    def _left_out(self) -> set[str]:
        """A tied head that was quantized apart is the embedding again."""
        tied = self.checkpoint.config.tied_head and not self.own
        return {"head.weight"} if tied else set()

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.stored().values())

    def _published_shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return self.places[name].shapes(shape, fused_rows(self.checkpoint.config, name))

    def tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        config, cpu = self.checkpoint.config, torch.device("cpu")
        arguments = (self.to_make, self.dtype, cpu, progress, self.own)
        for name, ours in read_weights(self.checkpoint, self.model, *arguments):
            if isinstance(ours, QuantizedWeight):
                yield from tensors_of(name.removesuffix(".weight"), ours).items()
                continue
            if self.dtype == torch.float16 and not ours.isfinite().all():
                raise ValueError(
                    f"{self.checkpoint.folder}: {name} has numbers that float16 cannot hold (or "
                    "that are none); use --dtype bf16 or fp32"
                )
            if self.own:
                yield name, ours
            elif name not in self._left_out:
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
