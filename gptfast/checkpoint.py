"""A Hugging Face folder in, a Transformer out. Our parameters pull their tensors; files do not
push.

Names and shapes are checked against the facts before anything large is allocated. Each parameter is
allocated once, in its final dtype and place, and filled from the mapped file, so the peak is the
weights themselves.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptfast.config import ModelConfig
from gptfast.device import check_fits, parse_dtype
from gptfast.families import Family, find_family, model_config
from gptfast.model import Transformer, fused_rows
from quantize.formats import pack_linears

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; ValueError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, found a {type(value).__name__}")
    return value


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The facts of a folder, and the parsed config.json they come from."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no config.json; a Hugging Face checkpoint has one")
    raw = read_json(path)
    generation = folder / "generation_config.json"
    return model_config(raw, read_json(generation) if generation.is_file() else None), raw


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been checked: its facts, and for each of our parameters the tensors it
    comes from.
    """

    folder: Path
    config: ModelConfig
    family: Family
    dtype: torch.dtype
    tensors: "TensorFiles"
    sources: dict[str, tuple[str, ...]]


def inspect(folder: Path) -> Checkpoint:
    """Reads the facts, names, shapes and dtypes of a folder, and no weights.

    ValueError names what is missing, extra, misshapen or truncated.
    """
    config, raw = read_config(folder)
    family, tensors = find_family(raw), TensorFiles(folder)
    _check_size(config, tensors)
    with torch.device("meta"):
        model = Transformer(config)
    sources = _match(model, family, tensors)
    dtype = _stored_dtype(raw, tensors, sources)
    return Checkpoint(folder, config, family, dtype, tensors, sources)


def load(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = iter,
) -> Transformer:
    """The model of a folder, in `dtype` ("auto": what config.json says, else that of the file).

    `progress` may wrap the sequence of parameters (tqdm does). ValueError as `inspect`; MemoryError
    says how much was needed.
    """
    source, device = inspect(folder), torch.device(device)
    chosen = parse_dtype(dtype) or source.dtype
    check_fits(
        source.config.num_parameters * chosen.itemsize,
        device,
        f"{folder.name}: {source.config.num_parameters:,} weights in {chosen}",
        "use a smaller dtype or model",
    )
    _check_tied_head(source)
    with torch.device("meta"):
        model = Transformer(source.config)
    for name, parameter in progress(list(model.named_parameters())):
        tensor = torch.empty(parameter.shape, dtype=chosen, device=device)
        transposed = source.family.is_transposed(name)
        source.tensors.read_into(tensor, source.sources[name], transposed)
        _replace_parameter(model, name, tensor)
    model.tie_head()
    pack_linears(model)
    return model.to(device).eval()


class TensorFiles:
    """The safetensors of a folder: names, shapes and dtypes at once, numbers on demand from mapped
    pages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path: _open(path) for path in _weight_files(folder)}
        self._file_of: dict[str, Path] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118
                if name in self._file_of:
                    both = f"{self._file_of[name].name} and {path.name}"
                    raise ValueError(f"{folder}: tensor {name} is in both {both}; keep one of them")
                self._file_of[name] = path
        _check_index(folder, self._file_of)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, I8 ..."""
        return self._slice(name).get_dtype()

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """The numbers of one tensor, as stored."""
        # Opened anew, because the pages that were read through a file stay resident until it is
        # closed: loading 1.1 B bf16 weights peaked at 4.7 GB instead of 2.5, and no faster.
        return _open(self._file_of[name]).get_tensor(name)

    def read_into(self, target: Tensor, names: tuple[str, ...], transposed: bool = False) -> None:
        """Fills `target` with the tensors `names`, one below the other, converting as it copies."""
        offset = 0
        for name in names:
            tensor = self.tensor(name)
            tensor = tensor.t() if transposed else tensor
            target[offset : offset + tensor.size(0)].copy_(tensor)
            offset += tensor.size(0)


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
        raise ValueError(
            f"{folder}: {index.name} names shards that are not there: {_some(missing)}"
        )
    if not paths:
        others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt")]
        hint = f" (found {_some(others)}: pickles are not read)" if others else ""
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
                f"{index}: tensors are not in the shards it names for them: {_some(wrong)}"
            )


def _check_size(config: ModelConfig, tensors: TensorFiles) -> None:
    """Stops at facts far beyond the files, before a model of that size is laid out."""
    stored = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    if config.num_parameters > 100 * stored:
        raise ValueError(
            f"{tensors.folder}: config.json describes a model of {config.num_parameters:,} "
            f"weights; the files hold {stored:,}"
        )


def _match(model: Transformer, family: Family, tensors: TensorFiles) -> dict[str, tuple[str, ...]]:
    """Our parameter -> names of its tensors in the files; ValueError for anything missing, extra or
    misshapen.
    """
    ours = dict(model.named_parameters())
    sources = {name: family.source(name) for name in ours}
    wanted = {source for names in sources.values() for source in names}

    def found_with(prefix: str) -> int:
        return sum(prefix + name in tensors.names for name in wanted)

    prefix = max(family.prefixes, key=found_with)

    def stored(name: str) -> str:
        """`name` as the files spell it: the head may stand outside the prefix."""
        return prefix + name if prefix + name in tensors.names else name

    missing = sorted(name for name in wanted if stored(name) not in tensors.names)
    if missing:
        raise ValueError(f"{tensors.folder}: missing tensors: {_some(missing)}")
    tied = family.source("head.weight") if model.config.tied_head else ()
    extra = sorted(
        name
        for name in tensors.names - {stored(name) for name in wanted}
        if name.removeprefix(prefix) not in tied
        and not re.fullmatch(family.ignored, name.removeprefix(prefix))
    )
    if extra:
        raise ValueError(
            f"{tensors.folder}: tensors that a {model.config.model_type!r} model with this "
            f"config.json has no place for: {_some(extra)}"
        )
    found = {name: tuple(stored(source) for source in names) for name, names in sources.items()}
    for name, parameter in ours.items():
        _check_shapes(model.config, name, tuple(parameter.shape), found[name], family, tensors)
    return found


def _check_shapes(
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    sources: tuple[str, ...],
    family: Family,
    tensors: TensorFiles,
) -> None:
    parts = fused_rows(config, name) if len(sources) > 1 else (shape[0],)
    assert parts is not None and len(parts) == len(sources)
    for rows, source in zip(parts, sources, strict=True):
        needed = (rows, *shape[1:])
        if family.is_transposed(name):
            needed = needed[::-1]
        found = tensors.shape(source)
        if found != needed:
            raise ValueError(
                f"{tensors.folder}: {source} has shape {list(found)}; "
                f"config.json needs {list(needed)}"
            )
        if tensors.dtype(source) not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{tensors.folder}: {source} is stored as {tensors.dtype(source)}; "
                "only float weights (F32, F16, BF16) are read"
            )


def _check_tied_head(source: Checkpoint) -> None:
    """A head stored beside a tied one must equal the embedding: which one to use would be a guess
    (transformers 4 takes the embedding, 5 the head).
    """
    [embed] = source.sources["embed.weight"]
    heads = source.family.source("head.weight") if source.config.tied_head else ()
    for name in (prefix + head for prefix in source.family.prefixes for head in heads):
        if name in source.tensors.names and not torch.equal(
            source.tensors.tensor(name), source.tensors.tensor(embed)
        ):
            raise ValueError(
                f"{source.folder}: config.json ties the head to the embedding, but {name} differs "
                f"from {embed}; set tie_word_embeddings to false to use it, or remove it"
            )


def _stored_dtype(
    raw: dict[str, Any], tensors: TensorFiles, sources: dict[str, tuple[str, ...]]
) -> torch.dtype:
    named = raw.get("torch_dtype") or raw.get("dtype")
    if named in ("float32", "float16", "bfloat16"):
        return getattr(torch, named)
    stored = {tensors.dtype(name) for names in sources.values() for name in names}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(min(stored), torch.float32)


def _replace_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
