"""A checkpoint that others quantized, as if it were a plain one: `q_proj.qweight`, `.qzeros` and
`.scales` are one tensor `q_proj.weight`, which can be had as plain numbers or in a format of ours.

Knows names and files; what the layouts mean is in quantize/readers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.tensor_files import Index, Read, TensorFiles, Tensors, read_json, some, taken
from quantize.formats import Format, QuantizedWeight
from quantize.readers import READERS, Header, Reader, Stored

# Integers and small floats mean nothing by themselves; bytes and booleans are masks of old files.
NEEDS_SCALES = ("I32", "I8", "I16", "F8_E4M3", "F8_E5M2", "F4")
# Keys of config.json, and what goes without saying under them.
SETTINGS_KEYS: dict[str, dict[str, str]] = {
    "quantization_config": {},
    "compression_config": {"quant_method": "compressed-tensors"},  # of its older releases
}
# Where tools write the settings that config.json does not have.
SETTINGS_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


@dataclass(frozen=True)
class _Weight:
    stored: Stored
    names: dict[str, str]  # role -> tensor in the files


class QuantizedFiles:
    """Each quantized weight is a tensor [N, K] of dtype F32: plain numbers are computed in float32,
    where they are exact, and rounded once, to what they are copied into. What stands beside them
    (norms, biases) passes through; scales of activations are hidden. `notes` says in words what
    is not done as the checkpoint asks for, or not kept in its format.
    """

    def __init__(self, files: Tensors, reader: Reader) -> None:
        """Checks all headers; ValueError names the tensor that is missing, misshapen, or stored
        in another way than the settings say.
        """
        self.folder = files.folder
        self._files = files
        all_names = files.names
        hidden = {name for name in all_names if reader.hidden.fullmatch(name)}
        modules = _modules(all_names - hidden, reader)
        self._weights = self._look(modules, reader)
        parts = {name for weight in self._weights.values() for name in weight.names.values()}
        plain = all_names - hidden - parts
        _check_plain(files, plain)
        self._names = plain | self._weights.keys()
        self.notes = (*reader.notes, *self._notes())
        if not self._weights:
            self.notes = ("no weight is quantized, though the settings say so",)

    def _look(self, modules: dict[str, dict[str, str]], reader: Reader) -> dict[str, _Weight]:
        weights = {}
        with self._files.reader() as read:
            for module, names in modules.items():
                missing = [
                    module + ending
                    for ending, role in reader.roles.items()
                    if role in reader.required and role not in names
                ]
                if missing:
                    raise ValueError(
                        f"{self.folder}: {some(missing)} is missing beside "
                        f"{some(sorted(names.values()))}"
                    )
                headers = {
                    role: Header(name, self._files.shape(name), self._files.dtype(name))
                    for role, name in names.items()
                }
                try:
                    stored = reader.look(module, headers, _by_role(read, names))
                except ValueError as error:
                    raise ValueError(f"{self.folder}: {error}") from None
                weights[f"{module}.weight"] = _Weight(stored, names)
        return weights

    def _notes(self) -> tuple[str, ...]:
        reasons: dict[str, list[str]] = {}
        for name, weight in self._weights.items():
            if weight.stored.format is None:
                reasons.setdefault(weight.stored.reason, []).append(name)
        return tuple(
            f"{len(names)} weights are dequantized, because no format here has {reason}: "
            f"{some(names)}"
            for reason, names in reasons.items()
        )

    @property
    def names(self) -> set[str]:
        return set(self._names)

    @property
    def formats(self) -> dict[str, Format | None]:
        """Of every weight that is quantized in the files; None: it is dequantized."""
        return {name: weight.stored.format for name, weight in self._weights.items()}

    def format(self, name: str) -> Format | None:
        """Of the weight that `quantized` gives; None: there is a plain tensor only."""
        return self._weights[name].stored.format if name in self._weights else None

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._weights:
            return self._weights[name].stored.shape
        return self._files.shape(name)

    def dtype(self, name: str) -> str:
        return "F32" if name in self._weights else self._files.dtype(name)

    def tensor(self, name: str) -> Tensor:
        with self.reader() as read:
            return read(name)

    def quantized(self, name: str) -> QuantizedWeight:
        """A weight that has a `format`, lossless."""
        with self.quantized_reader() as read:
            return read(name)

    @property
    def bytes_read(self) -> int:
        """As of TensorFiles; 0 where the tensors are in no such files."""
        return self._files.bytes_read if isinstance(self._files, TensorFiles) else 0

    def is_spare_bias(self, name: str) -> bool:
        """Whether it is a bias of zeros beside a quantized weight: some tools write one for every
        module, also where the model has none.
        """
        weight = f"{name.removesuffix('.bias')}.weight"
        return name.endswith(".bias") and weight in self._weights and not self.tensor(name).any()

    @contextmanager
    def reader(self) -> Iterator[Read]:
        """A function from names to tensors, or to parts of them. A weight that is quantized is read
        and dequantized whole, whatever part is asked for.
        """
        with self._files.reader() as read:

            def plain(name: str, index: Index = ()) -> Tensor:
                if name not in self._weights:
                    return taken(read, name, index)
                weight = self._load(name, read)
                weight = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
                return weight[index] if index else weight

            yield plain

    @contextmanager
    def quantized_reader(self) -> Iterator[Callable[[str], QuantizedWeight]]:
        """A function from names to quantized weights, for a few of them."""
        with self._files.reader() as read:

            def quantized(name: str) -> QuantizedWeight:
                weight = self._load(name, read)
                assert isinstance(weight, QuantizedWeight)
                return weight

            yield quantized

    def _load(self, name: str, read: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        weight = self._weights[name]
        try:
            found = weight.stored.load(_by_role(read, weight.names))
            _check_finite(name, found)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        return found


def quantized_files(files: Tensors, settings: Mapping[str, Any]) -> QuantizedFiles:
    """The files of a checkpoint with this `quantization_config`; ValueError for one that is not
    understood, or where files and settings do not fit together.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ValueError(
            f"{files.folder}: the weights are quantized by {method!r}; {', '.join(READERS)} can be "
            "read: use the unquantized model"
        )
    try:
        reader = READERS[method](settings)
    except ValueError as error:
        raise ValueError(f"{files.folder}: {method}: {error}") from None
    return QuantizedFiles(files, reader)


def quantization_settings(folder: Path, raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json (`raw`) says of quantization, or the file of its own in which older tools
    wrote it; None where nothing does.
    """
    for key, known in SETTINGS_KEYS.items():
        if settings := raw.get(key):
            return {**known, **_object(settings, f"{folder}: {key}")}
    for file, method in SETTINGS_FILES.items():
        path = folder / file
        if path.is_file():
            settings = read_json(path)
            settings = _object(settings.get("quantization", settings), f"{path}: quantization")
            return {"quant_method": method, **settings}
    return None


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}; a JSON object is needed")
    return value


def _modules(names: set[str], reader: Reader) -> dict[str, dict[str, str]]:
    """Module -> role -> tensor, of those that are quantized."""
    if not reader.roles:
        return {}
    endings = re.compile("|".join(re.escape(ending) + "$" for ending in reader.roles))
    modules: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        if found := endings.search(name):
            modules.setdefault(name[: found.start()], {})[reader.roles[found[0]]] = name
    return {module: parts for module, parts in modules.items() if reader.is_quantized(parts.keys())}


def _by_role(read: Callable[[str], Tensor], names: Mapping[str, str]) -> Callable[[str], Tensor]:
    return lambda role: read(names[role])


def _check_plain(files: Tensors, plain: set[str]) -> None:
    for name in sorted(plain):
        if files.dtype(name) in NEEDS_SCALES:
            raise ValueError(
                f"{files.folder}: {name} is stored as {files.dtype(name)}, and nothing beside it "
                "says what its numbers mean"
            )


def _check_finite(name: str, weight: QuantizedWeight | Tensor) -> None:
    parts = {"": weight} if isinstance(weight, Tensor) else weight.tensors
    for part, numbers in parts.items():
        if numbers.dtype == torch.float8_e4m3fn:
            is_finite = bool((numbers.view(torch.uint8) & 127 != 127).all())
        else:
            is_finite = not numbers.is_floating_point() or bool(numbers.isfinite().all())
        if not is_finite:
            of = f" among its {part}" if part else ""
            raise ValueError(f"{name} has numbers that are not finite{of}: it is damaged")
