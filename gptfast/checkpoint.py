"""A folder in, a Transformer out. Our parameters pull their tensors; files do not push.

Names and shapes are checked against the facts before anything large is allocated. Each parameter is
allocated once, in its final dtype and place, and filled from the mapped file, so the peak is the
weights themselves.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import ModelConfig
from gptfast.device import check_fits, parse_dtype
from gptfast.families import Family, find_family, language_part, model_config
from gptfast.model import Transformer, fused_rows, keeps_float32
from gptfast.sources import Source
from gptfast.tensor_files import DTYPES, TensorFiles, Tensors, read_json, some
from quantize.packing import pack_linears

Progress = Callable[[Iterable[Any]], Iterable[Any]]

# In config.json of a checkpoint that has our own names (`gptfast convert`).
FORMAT_KEY, FORMAT = "gptfast_format", 1
# The same model is published under several beginnings of its names: (ours to expect, theirs).
RENAMES = (
    ("", ""),
    ("transformer.", ""),
    ("model.", ""),
    ("", "model."),
    ("", "language_model."),
    ("model.", "model.language_model."),
    ("model.", "language_model."),
    ("gpt_neox.", ""),
)
# Buffers that old files carry along: they follow from config.json.
BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|causal_mask))"


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
    `is_own` that the files have our own names.
    """

    folder: Path
    config: ModelConfig
    family: Family
    dtype: torch.dtype
    tensors: Tensors
    sources: dict[str, Source]
    left_out: str = ""
    is_own: bool = False


def inspect(folder: Path) -> Checkpoint:
    """Reads the facts, names, shapes and dtypes of a folder, and no weights.

    ValueError names what is missing, extra, misshapen or truncated.
    """
    config, raw = read_config(folder)
    _check_quantization(folder, raw)
    return match(config, raw, TensorFiles(folder))


def match(config: ModelConfig, raw: Mapping[str, Any], tensors: Tensors) -> Checkpoint:
    """A checkpoint of these facts and tensors; ValueError where they do not fit together."""
    family = find_family(raw)
    _check_size(config, tensors)
    with torch.device("meta"):
        model = Transformer(config)
    matching = _Matching(model, raw, family, tensors)
    sources, left_out = matching.match()
    _check_shapes(model, sources, tensors)
    dtype = _stored_dtype(raw, tensors, sources)
    is_own = matching.is_own
    return Checkpoint(tensors.folder, config, family, dtype, tensors, sources, left_out, is_own)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of these facts, in its order."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load(
    checkpoint: Path | Checkpoint,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = iter,
) -> Transformer:
    """The model of a folder, or of one that has been inspected, in `dtype` ("auto": what
    config.json says, else that of the file).

    `progress` may wrap the sequence of parameters (tqdm does). ValueError as `inspect`; MemoryError
    says how much was needed.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else inspect(checkpoint)
    device = torch.device(device)
    chosen = parse_dtype(dtype) or source.dtype
    check_fits(
        (source.config.num_parameters + _num_packed_at_once(source.config, device))
        * chosen.itemsize,
        device,
        f"{source.folder.name}: {source.config.num_parameters:,} weights in {chosen}",
        "use a smaller dtype or model",
    )
    check_tied_head(source)
    with torch.device("meta"):
        model = Transformer(source.config)
    for name, tensor in read_parameters(source, model, chosen, device, progress):
        _replace_parameter(model, name, tensor)
    model.tie_head()
    pack_linears(model)
    return model.to(device).eval()


def _num_packed_at_once(config: ModelConfig, device: torch.device) -> int:
    """Weights that stand in memory twice while a layer's experts are packed for the CPU."""
    experts = config.experts
    if experts is None or device.type != "cpu":
        return 0
    return experts.num_experts * 2 * experts.hidden_dim * config.dim


def read_parameters(
    source: Checkpoint,
    model: Transformer,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = iter,
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by name, each read when it is asked for. `model` may be on the meta device.

    Where files of our own names have a parameter as it is needed, it is the file's own pages: 1.1 B
    float32 weights load in 0.05 s instead of 0.9, and decode as fast. Other files might be
    overwritten in place while they are in use; these are only ever replaced.
    """
    files = source.tensors
    for name, parameter in progress(list(model.named_parameters())):
        kept = torch.float32 if keeps_float32(name) else dtype
        if source.is_own and isinstance(files, TensorFiles) and device.type == "cpu":
            [stored] = source.sources[name].names
            if DTYPES.get(files.dtype(stored)) == kept:
                yield name, files.mapped(stored)
                continue
        tensor = torch.empty(parameter.shape, dtype=kept, device=device)
        with source.tensors.reader() as read:
            source.sources[name].read(tensor, source.config, read)
        yield name, tensor


def _check_quantization(folder: Path, raw: Mapping[str, Any]) -> None:
    settings = language_part(raw).get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"{folder}: the weights are quantized ({method!r}); this version reads float weights "
            "and mxfp4: use the unquantized model"
        )


def _check_size(config: ModelConfig, tensors: Tensors) -> None:
    """Stops at facts far beyond the files, before a model of that size is laid out."""
    stored = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    if config.num_parameters > 100 * stored:
        raise ValueError(
            f"{tensors.folder}: config.json describes a model of {config.num_parameters:,} "
            f"weights; the files hold {stored:,}"
        )


class _Matching:
    """Finds for each of our parameters the tensors in the files that it comes from."""

    def __init__(
        self, model: Transformer, raw: Mapping[str, Any], family: Family, tensors: Tensors
    ) -> None:
        self.model, self.raw, self.folder = model, raw, tensors.folder
        self.names = tensors.names  # once: a mixture of experts has 100,000
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.is_own = raw.get(FORMAT_KEY) is not None
        self.head: tuple[Source, ...] = ()
        self.wanted: dict[str, tuple[Source, ...]]
        if self.is_own:
            _check_format(tensors.folder, raw)
            self.wanted = {name: (Source((name,)),) for name in self.shapes}
        else:
            self.wanted = {name: family.sources(name) for name in self.shapes}
            self.head = family.sources("head.weight")
        self.expected, self.found = max(RENAMES, key=self._num_found)

    def match(self) -> tuple[dict[str, Source], str]:
        """Our parameter -> its source under the names of the files, and what is left out in words;
        ValueError for anything missing or extra.
        """
        sources, missing = {}, []
        for name, alternatives in self.wanted.items():
            for source in (source.renamed(self.stored) for source in alternatives):
                if all(n in self.names for n in source.all_names(self.shapes[name])):
                    sources[name] = source
                    break
            else:
                names = alternatives[0].renamed(self.stored).all_names(self.shapes[name])
                missing += [n for n in names if n not in self.names]
        if missing:
            raise ValueError(f"{self.folder}: missing tensors: {some(sorted(missing))}")
        used = {n for name, source in sources.items() for n in source.all_names(self.shapes[name])}
        return sources, self._left_out(self.names - used)

    def stored(self, name: str) -> str:
        """`name` as the files spell it: the head may stand outside of the beginning that all others
        share.
        """
        changed = _renamed(name, self.expected, self.found)
        probe = changed.replace("{e}", "0")
        return changed if probe in self.names else name

    def _num_found(self, rename: tuple[str, str]) -> int:
        names = (sources[0].names[0].replace("{e}", "0") for sources in self.wanted.values())
        return sum(_renamed(name, *rename) in self.names for name in names)

    def _left_out(self, unused: set[str]) -> str:
        tied = {self.stored(head.names[0]) for head in self.head if self.model.config.tied_head}
        unused = {n for n in unused - tied if not re.fullmatch(BUFFERS, n)}
        beside = {name for name in unused if self._is_beside(name)}
        if extra := sorted(unused - beside):
            raise ValueError(
                f"{self.folder}: tensors that a {self.model.config.model_type!r} model "
                f"with this config.json has no place for: {some(extra)}"
            )
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in beside})
        return f"{len(beside)} tensors of {some(parts)}" if beside else ""

    def _is_beside(self, name: str) -> bool:
        """Parts of a multimodal model, and layers that predict tokens further ahead."""
        if language_part(self.raw) is not self.raw:
            return not name.startswith((self.found or "model.", "lm_head."))
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        ahead = self.raw.get("num_nextn_predict_layers") or 0
        return bool(ahead and layer and int(layer[1]) >= self.model.config.num_layers)


def _renamed(name: str, expected: str, found: str) -> str:
    """`name` with another beginning, by an entry of RENAMES."""
    return found + name.removeprefix(expected) if name.startswith(expected) else name


def _check_format(folder: Path, raw: Mapping[str, Any]) -> None:
    if raw[FORMAT_KEY] != FORMAT:
        raise ValueError(
            f"{folder}: {FORMAT_KEY} is {raw[FORMAT_KEY]!r}; this version reads {FORMAT}: convert "
            "the original checkpoint again, or update gptfast"
        )


def _check_shapes(model: Transformer, sources: dict[str, Source], tensors: Tensors) -> None:
    for name, parameter in model.named_parameters():
        source = sources[name]
        parts = fused_rows(model.config, name)
        for theirs, needed in source.shapes(tuple(parameter.shape), parts).items():
            found = tensors.shape(theirs)
            if found != needed:
                raise ValueError(
                    f"{tensors.folder}: {theirs} has shape {list(found)}; "
                    f"config.json needs {list(needed)}"
                )
            supported = ("U8",) if source.mxfp4 else ("F32", "F16", "BF16", "F64")
            if tensors.dtype(theirs) not in supported:
                kind = "bytes (U8)" if source.mxfp4 else "float weights (F32, F16, BF16)"
                raise ValueError(
                    f"{tensors.folder}: {theirs} is stored as {tensors.dtype(theirs)}; "
                    f"only {kind} are read there"
                )


def check_tied_head(source: Checkpoint) -> None:
    """A head stored beside a tied one must equal the embedding: which one to use would be a guess
    (transformers 4 takes the embedding, 5 the head).
    """
    if not source.config.tied_head:
        return
    [embed] = source.sources["embed.weight"].names
    names = source.tensors.names
    for head in source.family.sources("head.weight"):
        for expected, found in RENAMES:
            name = _renamed(head.names[0], expected, found)
            if name not in names or name == embed:
                continue
            if not torch.equal(source.tensors.tensor(name), source.tensors.tensor(embed)):
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


def _replace_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
