"""Checkpoints of other engines: llama2.c's .bin (the legacy layout), nanoGPT's ckpt.pt, model.pth
of gpt-fast and Meta, pytorch_model.bin of Hugging Face. Each becomes a config.json and tensors with
the names that Hugging Face publishes, and is from then on a checkpoint like any other.

Pickles are opened only where the caller allows it, and hold nothing but tensors and plain values.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.foreign.meta import read_llama2c, read_meta
from gptfast.foreign.nanogpt import read_nanogpt
from gptfast.foreign.tensors import ForeignTensors, Raw
from gptfast.tensor_files import read_json, some

HF_INDEX = "pytorch_model.bin.index.json"


def is_foreign(source: Path) -> bool:
    """Whether `source` is a file, or a folder that has pickles and no safetensors."""
    if not source.is_dir():
        return source.is_file()
    return not any(source.glob("*.safetensors*")) and bool(_pickles(source))


def read_foreign(
    source: Path, allow_pickle: bool, facts: Path | None = None
) -> tuple[Raw, ForeignTensors]:
    """config.json and tensors of a foreign file or folder.

    `facts` is a json file for what the format does not say; config.json or params.json beside the
    weights is taken where it is None. ValueError names what is missing.
    """
    paths = _weights(source)
    with paths[0].open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02"):  # a zip archive, and pickles before torch 1.6
        if facts is not None:
            raise ValueError(f"{paths[0]} is no pickle and says all itself; leave out --config")
        return read_llama2c(paths[0])
    if not allow_pickle:
        raise ValueError(
            f"{paths[0]} is a pickle, which is read only with --allow-pickle (only tensors and "
            "plain values are taken from it)"
        )
    found: dict[str, Any] = {}
    for path in paths:
        found |= _unpickle(path)
    arguments, state = found.get("model_args"), found.get("model")
    if not (isinstance(arguments, dict) and isinstance(state, dict)):
        known, tensors = _facts(paths[0], facts), _state_dict(paths[0], found)
    elif "transformer.wte.weight" in (tensors := _state_dict(paths[0], state)):
        return read_nanogpt(paths[0], arguments, tensors)
    else:  # llama2.c's training checkpoints, whose engine fixes these two
        known = {"norm_eps": 1e-5, "rope_theta": 10000.0} | arguments
    if "tok_embeddings.weight" in tensors:
        return read_meta(paths[0], known, tensors)
    if "model_type" not in known:
        raise ValueError(
            f"{paths[0]}: there is no config.json beside it; put it there or name it with --config"
        )
    return known, ForeignTensors(paths[0].parent, tensors)


# -- which files --


def _weights(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index = source / HF_INDEX
    if index.is_file():
        named = read_json(index).get("weight_map")
        named = list(named.values()) if isinstance(named, dict) else []
        if not named or any(not isinstance(s, str) or Path(s).name != s for s in named):
            raise ValueError(f"{index}: weight_map does not name plain files of this folder")
        shards = sorted(set(named))
        if missing := [shard for shard in shards if not (source / shard).is_file()]:
            raise ValueError(
                f"{source}: {HF_INDEX} names files that are not there: {some(missing)}"
            )
        return [source / shard for shard in shards]
    candidates = _pickles(source)
    usual = [path for path in candidates if path.name == "pytorch_model.bin"]
    if len(usual or candidates) > 1:
        raise ValueError(
            f"{source} has several files of weights ({some([p.name for p in candidates])}); of "
            "different models, give one of them in place of the folder; parts of one model "
            "(consolidated.00, .01 ...) are not joined: convert its Hugging Face version"
        )
    return usual or candidates


def _pickles(folder: Path) -> list[Path]:
    kinds = (".bin", ".pt", ".pth")
    beside = ("tokenizer.bin", "training_args.bin")
    return sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name not in beside)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        # torch's own words advise to switch the check off.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it asks for {wanted[1]}" if wanted else "or it is damaged"
        raise ValueError(
            f"{path}: not only tensors and plain values, {found}; nothing of it was run"
        ) from None
    # Damaged files fail in as many ways as the reader has steps, with struct.error among them.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a complete file of torch.save ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a dict of tensors is needed, found a {type(found).__name__}")
    return found


def _state_dict(path: Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, without what torch.compile put before the names."""
    wrong = [str(name) for name, value in found.items() if not _is_plain(value)]
    if wrong or not found:
        raise ValueError(f"{path}: not a state dict of tensors: {some(wrong) or 'empty'}")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in found.items()}


def _is_plain(value: Any) -> bool:
    """A tensor that holds its numbers one after the other, not sparse, nested, quantized or empty
    of storage.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_nested)


def _facts(path: Path, given: Path | None) -> Raw:
    beside = [path.parent / name for name in ("config.json", "params.json")]
    paths = [given] if given is not None else [p for p in beside if p.is_file()]
    return read_json(paths[0]) if paths else {}
