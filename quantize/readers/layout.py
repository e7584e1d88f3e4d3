"""What a reader of other people's layouts is, and what all of them check.

A module that others quantized is several tensors that play roles (`qweight`, `scales`, ...). A
reader knows from their names which belong together, from headers whether they fit and what they
become, and from their numbers the weight itself. Knows tensors and a mapping of settings; knows no
files and no models.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats import SMALLEST_GROUP, Format, QuantizedWeight, quantized_weight
from quantize.readers.words import as_half_bytes, unpack_words

FLOATS = ("F32", "F16", "BF16")
UNEQUAL = "groups of columns that are not equally large"
Read = Callable[[str], Tensor]  # by role


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without its numbers; `dtype` as safetensors spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


Headers = Mapping[str, Header]  # role -> its tensor


@dataclass(frozen=True)
class Stored:
    """A quantized weight before it is read. `format` is what it becomes; None: it is dequantized,
    and `reason` says why. `load` gives that, or a plain weight in float32.
    """

    shape: tuple[int, ...]
    format: Format | None
    load: Callable[[Read], QuantizedWeight | Tensor]
    reason: str = ""


class Reader(ABC):
    """Of one layout, built from `quantization_config`; ValueError for settings it does not know.

    `roles`: how a tensor's name ends -> its role in the module whose name stands before; `required`
    are the roles that none can miss. `hidden`: whole names of what is beside the weights (scales
    of activations) and not used. `notes`: what the settings ask for and is not done, in words.
    """

    roles: Mapping[str, str]
    required: tuple[str, ...] = ()
    hidden: re.Pattern[str] = re.compile(r"(?!)")
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, settings: Mapping[str, Any]) -> None: ...

    def is_quantized(self, found: Set[str]) -> bool:
        """Whether a module whose tensors play these roles is quantized, or is meant to be and has
        lost a part. A `weight` alone is plain.
        """
        return bool(found - {"weight"})

    @abstractmethod
    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        """From headers, and from small tensors that say what the large ones are. ValueError where
        the parts of `module` do not fit together.
        """


# -- settings --


def known(settings: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> Any:
    """settings[key], None where there is none; ValueError where it is none of `values`."""
    found = settings.get(key)
    if found is None or any(type(found) is type(value) and found == value for value in values):
        return found
    raise ValueError(
        f"quantization_config: {key} is {found!r}; {', '.join(map(str, values))} can be read there"
    )


def part(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The settings under `key`, none where there are none."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"quantization_config: {key} is {found!r}; a JSON object is needed")
    return found


def absent(settings: Mapping[str, Any], *keys: str) -> None:
    """ValueError where the settings ask for something that changes numbers and is not done here."""
    for key in keys:
        if settings.get(key):
            raise ValueError(f"quantization_config: {key} ({settings[key]!r}) cannot be read")


def group_size_of(value: Any, key: str = "group_size") -> int | None:
    """-1 is the whole row."""
    if value == -1 and not isinstance(value, bool):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"quantization_config: {key} is {value!r}; -1 or a count is needed")
    return value


# -- headers --


def check_shape(header: Header, *alternatives: tuple[int, ...]) -> None:
    if header.shape not in alternatives:
        needed = " or ".join(str(list(shape)) for shape in alternatives)
        raise ValueError(
            f"{header.name} has shape {list(header.shape)}; the tensors beside it need {needed}: "
            "the file is damaged, or another model's"
        )


def check_dtype(header: Header, *dtypes: str) -> None:
    if header.dtype not in dtypes:
        raise ValueError(
            f"{header.name} is stored as {header.dtype}; {' or '.join(dtypes)} is read there"
        )


def check_matrix(header: Header) -> None:
    if len(header.shape) != 2 or 0 in header.shape:
        raise ValueError(f"{header.name} has shape {list(header.shape)}; a matrix is needed")


# -- formats --


def int_format(bits: int, group_size: int | None, has_zeros: bool) -> tuple[Format | None, str]:
    """The format of integers of 2 to 8 bits, and where there is none why. Those of 5 to 7 are
    stored as 8.
    """
    reason = group_reason(group_size)
    if reason:
        return None, reason
    return Format("int", bits if bits <= 4 else 8, group_size, has_zeros), ""


def group_reason(group_size: int | None) -> str:
    """Why columns in groups of this size have no format; "" where they have."""
    if group_size is not None and (group_size < SMALLEST_GROUP or group_size & (group_size - 1)):
        return f"groups of {group_size} columns"
    return ""


def weight_of(
    form: Format | None,
    numbers: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    group_size: int | None,
) -> QuantizedWeight | Tensor:
    """Integers [N, K], scales and zeros [N, G] -> the weight, dequantized where it has no format.
    `groups` [K]: of each column; None: one after the other.
    """
    if form is None:
        if groups is None:
            groups = torch.arange(numbers.size(1)) // (group_size or numbers.size(1))
        plain = numbers.float()
        if zeros is not None:
            plain -= zeros.float()[:, groups]
        return plain * scales.float()[:, groups]
    kept = None if zeros is None else zeros.to(scales.dtype).contiguous()
    order = None if groups is None else order_of(groups)
    return quantized_weight(
        form, numbers if order is None else numbers[:, order], scales, kept, order
    )


def weight_of_words(
    form: Format | None,
    words: Tensor,
    bits: int,
    num_columns: int,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    group_size: int | None,
) -> QuantizedWeight | Tensor:
    """As `weight_of`, from rows of packed integers that have half their range added."""
    if form is not None and bits == 4 and groups is None:
        kept = None if zeros is None else zeros.to(scales.dtype).contiguous()
        return QuantizedWeight(
            form, num_columns, as_half_bytes(words, num_columns), scales, kept
        ).check()
    numbers = (unpack_words(words, bits, num_columns) - 2 ** (bits - 1)).view(torch.int8)
    return weight_of(form, numbers, scales, zeros, groups, group_size)


def order_of(groups: Tensor) -> Tensor:
    """[K]: the columns of group 0 first, each group's in the order of the input."""
    return groups.argsort(stable=True)


def are_full(groups: Tensor, group_size: int | None) -> bool:
    """Whether groups [K] are 0, 0, .., 1, 1, ..: each but the last as large as can be."""
    size = groups.numel() if group_size is None else group_size
    return torch.equal(groups.long(), torch.arange(groups.numel()) // size)


def check_groups(header: Header, groups: Tensor, num_groups: int) -> None:
    low, high = (int(end) for end in groups.aminmax())
    if low < 0 or high >= num_groups:
        raise ValueError(f"{header.name} names groups {low} to {high}; there are {num_groups}")
