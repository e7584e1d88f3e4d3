"""A folder in, its facts and where the weights stand out: a Checkpoint.

Names, shapes and dtypes are checked against the facts; no weights are read.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptfast.config import ModelConfig
from gptfast.families import Family, find_family, language_part, model_config
from gptfast.matching import RENAMES, Matching, renamed
from gptfast.model import Transformer, fused_rows
from gptfast.parallel import ALONE, Group
from gptfast.quantization import quantizable
from gptfast.quantized_files import QuantizedFiles, quantization_settings, quantized_files
from gptfast.sharding import local_config, shard_of
from gptfast.sources import Source
from gptfast.stored import (
    QUANT_METHOD,
    allowed_dtypes,
    order_name,
    part_shapes,
    read_formats,
)
from gptfast.tensor_files import DTYPES, TensorFiles, Tensors, read_json, taken
from quantize.formats import Format

Progress = Callable[[Iterable[Any]], Iterable[Any]]

# In config.json of a checkpoint that has our own names (`gptfast convert`).
FORMAT_KEY, FORMAT = "gptfast_format", 1


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The facts of a folder, and the parsed config.json they come from."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no config.json; a Hugging Face checkpoint has one")
    raw = read_json(path)
    return model_config(raw, _read_generation(folder)), raw


def suggested_sampling(folder: Path) -> dict[str, float]:
    """The sampling settings that a model's makers suggest in generation_config.json; they are shown
    and never applied.
    """
    names = "temperature top_k top_p min_p repetition_penalty".split()
    raw = _read_generation(folder) or {}
    if raw.get("do_sample") is False:
        return {}
    numbers = {name: raw.get(name) for name in names}
    return {n: x for n, x in numbers.items() if isinstance(x, int | float) and x is not True}


def _read_generation(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else None


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been checked: its facts, and for each of our parameters the tensors it
    comes from. `left_out` says what the files hold beside the language model, "" where nothing;
    `is_own` that the files have our own names. `formats`: module -> format, of those that are
    stored quantized, `method` by whom or how, and `notes` what is to be said about it.
    """

    folder: Path
    config: ModelConfig
    family: Family
    dtype: torch.dtype
    tensors: Tensors
    sources: dict[str, Source]
    left_out: str = ""
    is_own: bool = False
    formats: dict[str, Format] = field(default_factory=dict)
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether any weights are, those that have no format here included."""
        files = self.tensors
        return bool(self.formats or (isinstance(files, QuantizedFiles) and files.formats))

    @property
    def quantized_as(self) -> str:
        """For people: the method, and the formats where there are any."""
        forms = dict.fromkeys(form.name for form in self.formats.values())
        return ", ".join([self.method, *forms]) if self.method else ", ".join(forms)


def inspect(folder: Path) -> Checkpoint:
    """Reads the facts, names, shapes and dtypes of a folder, and no weights.

    ValueError names what is missing, extra, misshapen or truncated.
    """
    config, raw = read_config(folder)
    tensors: Tensors = TensorFiles(folder)
    settings = quantization_settings(folder, {**raw, **language_part(raw)})
    if settings is not None and settings.get("quant_method") != QUANT_METHOD:
        tensors = quantized_files(TensorFiles(folder), settings)
    return match(config, raw, tensors)


def match(config: ModelConfig, raw: Mapping[str, Any], tensors: Tensors) -> Checkpoint:
    """A checkpoint of these facts and tensors; ValueError where they do not fit together."""
    family = find_family(raw)
    _check_size(config, tensors)
    own_formats = _own_formats(tensors.folder, raw)
    model = empty_model(config, own_formats or ())
    sources, left_out = Matching(model, raw, family, tensors, own_formats).match()
    sources = _as_stored(sources, tensors)
    _check_shapes(model, sources, tensors, own_formats or {})
    formats = own_formats
    if formats is None:
        formats = _published_formats(model, sources, tensors)
    return Checkpoint(
        folder=tensors.folder,
        config=config,
        family=family,
        dtype=_stored_dtype(raw, tensors, sources),
        tensors=tensors,
        sources=sources,
        left_out=left_out,
        is_own=own_formats is not None,
        formats=formats,
        method=_method(tensors.folder, raw),
        notes=tensors.notes if isinstance(tensors, QuantizedFiles) else (),
    )


def empty_model(
    config: ModelConfig, formats: Container[str] = (), group: Group = ALONE
) -> Transformer:
    """A model of these facts, or this rank's share of it, on the meta device, to load into. Where
    the head is among the quantized modules `formats` it has a weight of its own, tied or not.
    """
    with torch.device("meta"):
        model = Transformer(local_config(config, group), group)
        if config.tied_head and "head" in formats:
            model.head.weight = nn.Parameter(torch.empty_like(model.embed.weight), False)
    return model


def _own_formats(folder: Path, raw: Mapping[str, Any]) -> dict[str, Format] | None:
    """Module -> format of a checkpoint of our own names; None of others."""
    if raw.get(FORMAT_KEY) is None:
        return None
    if raw[FORMAT_KEY] != FORMAT:
        raise ValueError(
            f"{folder}: {FORMAT_KEY} is {raw[FORMAT_KEY]!r}; this version reads {FORMAT}: convert "
            "the original checkpoint again, or update gptfast"
        )
    settings = raw.get("quantization_config")
    return read_formats(settings) if isinstance(settings, Mapping) else {}


def _as_stored(sources: dict[str, Source], tensors: Tensors) -> dict[str, Source]:
    """Quantized weights have rows first, also of families that store plain ones transposed."""
    if not isinstance(tensors, QuantizedFiles):
        return sources
    return {
        name: replace(source, transposed=False)
        if source.transposed and source.names[0] in tensors.formats
        else source
        for name, source in sources.items()
    }


def _method(folder: Path, raw: Mapping[str, Any]) -> str:
    settings = quantization_settings(folder, {**raw, **language_part(raw)}) or {}
    return str(settings.get("method" if raw.get(FORMAT_KEY) else "quant_method", ""))


def _published_formats(
    model: Transformer, sources: Mapping[str, Source], tensors: Tensors
) -> dict[str, Format]:
    """Module -> the one format that all tensors of its weight have."""
    found = {}
    linears = set(quantizable(model)) - {"embed"}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        source = sources[name]
        if leaf != "weight" or module not in linears:
            continue
        if source.mxfp4:
            found[module] = Format.parse("mxfp4")
        elif isinstance(tensors, QuantizedFiles):
            parts = {tensors.format(n) for n in source.all_names(tuple(parameter.shape))}
            form = parts.pop()
            if form is not None and not parts:
                found[module] = form
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of these facts, in its order."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_size(config: ModelConfig, tensors: Tensors) -> None:
    """Stops at facts far beyond the files, before a model of that size is laid out."""
    stored = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    if config.num_parameters > 100 * stored:
        raise ValueError(
            f"{tensors.folder}: config.json describes a model of {config.num_parameters:,} "
            f"weights; the files hold {stored:,}"
        )


def _check_shapes(
    model: Transformer,
    sources: dict[str, Source],
    tensors: Tensors,
    own_formats: Mapping[str, Format],
) -> None:
    for name, parameter in model.named_parameters():
        source, shape = sources[name], tuple(parameter.shape)
        module = name.removesuffix(".weight")
        if module in own_formats:
            _check_own_parts(module, own_formats[module], shape, tensors)
            continue
        for theirs, needed in source.shapes(shape, fused_rows(model.config, name)).items():
            _check_shape(tensors, theirs, needed)
            supported = ("U8",) if source.mxfp4 else ("F32", "F16", "BF16", "F64")
            if tensors.dtype(theirs) not in supported:
                kind = "bytes (U8)" if source.mxfp4 else "float weights (F32, F16, BF16)"
                raise ValueError(
                    f"{tensors.folder}: {theirs} is stored as {tensors.dtype(theirs)}; "
                    f"only {kind} are read there"
                )


def _check_shape(tensors: Tensors, name: str, needed: tuple[int, ...]) -> None:
    if (found := tensors.shape(name)) != needed:
        raise ValueError(
            f"{tensors.folder}: {name} has shape {list(found)}; config.json needs {list(needed)}"
        )


def _check_own_parts(module: str, form: Format, shape: tuple[int, ...], tensors: Tensors) -> None:
    has_order = order_name(module) in tensors.names
    for name, needed in part_shapes(module, form, shape, has_order).items():
        _check_shape(tensors, name, needed)
        _check_own_dtype(tensors, name, allowed_dtypes(name, form))


def _check_own_dtype(tensors: Tensors, name: str, allowed: Sequence[torch.dtype]) -> None:
    stored = tensors.dtype(name)
    if DTYPES.get(stored) not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{tensors.folder}: {name} is stored as {stored}; {names} is needed")


def check_tied_head(source: Checkpoint, group: Group = ALONE) -> None:
    """A head stored beside a tied one must equal the embedding: which one to use would be a guess
    (transformers 4 takes the embedding, 5 the head). Each rank looks at its own rows.
    """
    if not source.config.tied_head or source.is_own:
        return
    [embed] = source.sources["embed.weight"].names
    names = source.tensors.names
    for head in source.family.sources("head.weight"):
        for expected, found in RENAMES:
            name = renamed(head.names[0], expected, found)
            if name not in names or name == embed:
                continue
            [index] = shard_of("embed.weight", source.config, group).indices(2)
            with source.tensors.reader() as read:
                is_same = torch.equal(taken(read, name, index), taken(read, embed, index))
            if not is_same:
                raise ValueError(
                    f"{source.folder}: config.json ties the head to the embedding, but {name} "
                    f"differs from {embed}; set tie_word_embeddings to false to use it, or remove "
                    "it"
                )


def _stored_dtype(
    raw: Mapping[str, Any], tensors: Tensors, sources: dict[str, Source]
) -> torch.dtype:
    raw = language_part(raw)
    named = raw.get("torch_dtype") or raw.get("dtype")
    if named in ("float32", "float16", "bfloat16"):
        return getattr(torch, named)
    # Of the embedding: norms and routers are often kept in more.
    stored = tensors.dtype(sources["embed.weight"].names[0])
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
