"""Formats: what the stored numbers of a weight [N, K] mean.

Integers stand for (q - zero) * scale, where groups of columns of a row share a scale (and a zero);
fp8 and mxfp4 are small floats under a scale. Stored is canonical: the same on every device, rows
and groups can be cut out of it, and nothing is padded but the last half byte of a row. Knows
numbers and no kernels.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.mxfp4 import BLOCK_SIZE, CODES, SCALE_BIAS

DEFAULT_INT4_GROUP = 32
SMALLEST_GROUP, LARGEST_GROUP = 8, 2**30
FP8_MAX = 448.0  # of e4m3 without infinities


@dataclass(frozen=True)
class Format:
    """`kind`: int, fp8 (e4m3) or mxfp4. `group_size`: columns that share a scale (None: the whole
    row); the last group of a row may be short. `has_zeros`: each group has a zero of its own.
    `dynamic`: activations are rounded to 8-bit integers, token by token, as they come.
    """

    kind: str
    bits: int
    group_size: int | None = None
    has_zeros: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("int", "fp8", "mxfp4"):
            raise ValueError(f"kind {self.kind!r} of a format is unknown; use int, fp8 or mxfp4")
        if self.kind == "int" and not 2 <= self.bits <= 4 and self.bits != 8:
            raise ValueError(f"integers of {self.bits} bits are not stored; use 2, 3, 4 or 8")
        if self.kind != "int" and self.bits != (8 if self.kind == "fp8" else 4):
            raise ValueError(f"{self.kind} does not have {self.bits} bits")
        if self.kind != "int" and (self.has_zeros or self.dynamic):
            raise ValueError(f"{self.kind} has no zeros and no integer activations")
        if self.kind == "mxfp4" and self.group_size != BLOCK_SIZE:
            raise ValueError(f"mxfp4 has blocks of {BLOCK_SIZE}")
        size = self.group_size
        if size is not None and (not SMALLEST_GROUP <= size <= LARGEST_GROUP or size & (size - 1)):
            raise ValueError(
                f"group size {size} is not usable; a power of two from {SMALLEST_GROUP} to "
                f"{LARGEST_GROUP} is"
            )

    @staticmethod
    def parse(text: str) -> "Format":
        """The format of a name: int8, int4-g64, int4-g32-asym, int8-dynamic, fp8, ... ValueError
        for others.
        """
        found = re.fullmatch(r"(int[2348]|fp8|mxfp4)(-g\d+|-row)?(-asym)?(-dynamic)?", text)
        if found is None:
            raise ValueError(
                f"quantization {text!r} is unknown; use int8, int4, int3, int2, fp8 or mxfp4, "
                "with -gN (group size), -asym (zeros), -dynamic (8-bit activations): "
                "int4-g64-asym"
            )
        name, group, asym, dynamic = found.groups()
        kind, bits = (name[:3], int(name[3:])) if name.startswith("int") else (name, 8)
        size = int(group[2:]) if group and group != "-row" else None
        if kind == "mxfp4":
            bits, size = 4, BLOCK_SIZE if group is None else size
        elif kind == "int" and bits < 8 and group is None:
            size = DEFAULT_INT4_GROUP
        return Format(kind, bits, size, bool(asym), bool(dynamic))

    @property
    def name(self) -> str:
        """What `parse` reads: int4-g32-asym."""
        base = f"int{self.bits}" if self.kind == "int" else self.kind
        group = "" if self.group_size is None else f"-g{self.group_size}"
        if self.kind == "mxfp4":
            group = ""
        elif self.in_nibbles and self.group_size is None:
            group = "-row"
        return base + group + "-asym" * self.has_zeros + "-dynamic" * self.dynamic

    @property
    def in_nibbles(self) -> bool:
        """Whether two numbers share a byte."""
        return self.bits <= 4

    @property
    def qmin(self) -> int:
        """The least integer."""
        assert self.kind == "int"
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest integer."""
        assert self.kind == "int"
        return 2 ** (self.bits - 1) - 1

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales that are found here; those that others found keep theirs. (A 16-bit scale
        for each 32 4-bit integers makes 4.5 bits a weight.)
        """
        if self.kind == "mxfp4":
            return torch.uint8
        return torch.float32 if self.group_size is None else torch.bfloat16

    def num_groups(self, num_columns: int) -> int:
        return 1 if self.group_size is None else math.ceil(num_columns / self.group_size)

    def values_width(self, num_columns: int) -> int:
        """Stored numbers, or bytes with two of them, in a row."""
        return math.ceil(num_columns / 2) if self.in_nibbles else num_columns

    @property
    def values_dtype(self) -> torch.dtype:
        if self.in_nibbles:
            return torch.uint8
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    def bytes_per_weight(self, num_columns: int) -> float:
        """Scales and zeros, as they are found here, included."""
        each = self.scale_dtype.itemsize * (2 if self.has_zeros else 1)
        groups = self.num_groups(num_columns)
        return (self.values_width(num_columns) + groups * each) / num_columns


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [..., N, K] as it is stored; dimensions in front are experts.

    `values`: int8 or float8_e4m3fn [..., N, K], or uint8 [..., N, ceil(K/2)] with column 2j in the
    low half of byte j; a half byte is q + 8, or a code of mxfp4. `scales` [..., N, groups], any
    float dtype (mxfp4: uint8 exponents). `zeros`, in units of q, like the scales. `order` [K]:
    stored column j belongs to input order[j] (None: j itself); groups are of stored columns.
    """

    format: Format
    num_columns: int
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def check(self) -> "QuantizedWeight":
        """Itself; ValueError where the parts do not fit together."""
        form, columns = self.format, self.num_columns
        rows = self.values.shape[:-1]
        groups = (*rows, form.num_groups(columns))
        expected = [("values", self.values, (*rows, form.values_width(columns)))]
        expected.append(("scales", self.scales, groups))
        if (self.zeros is not None) != form.has_zeros:
            raise ValueError(f"{form.name} {'needs' if form.has_zeros else 'has no'} zeros")
        if self.zeros is not None:
            expected.append(("zeros", self.zeros, groups))
        if self.order is not None:
            expected.append(("order", self.order, (columns,)))
        for name, tensor, shape in expected:
            if tensor.shape != torch.Size(shape):
                raise ValueError(
                    f"{name} of a {form.name} weight with {columns} columns have shape "
                    f"{list(tensor.shape)}; {list(shape)} is needed"
                )
        is_exponent = form.kind == "mxfp4"
        if is_exponent != (self.scales.dtype == torch.uint8) or not (
            is_exponent or self.scales.is_floating_point()
        ):
            raise ValueError(f"scales of {form.name} cannot be {self.scales.dtype}")
        if self.zeros is not None and self.zeros.dtype != self.scales.dtype:
            raise ValueError(f"zeros are {self.zeros.dtype}, and the scales {self.scales.dtype}")
        if self.values.dtype != form.values_dtype:
            raise ValueError(
                f"values of {form.name} are {form.values_dtype}, not {self.values.dtype}"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K] of the plain weight."""
        return (*self.values.shape[:-1], self.num_columns)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts that there are, by name."""
        parts = {"values": self.values, "scales": self.scales, "zeros": self.zeros}
        parts["order"] = self.order
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def integers(self) -> Tensor:
        """q, or codes of mxfp4: int8 [..., N, K] in stored order."""
        assert self.format.kind != "fp8"
        if not self.format.in_nibbles:
            return self.values
        offset = 8 if self.format.kind == "int" else 0
        return unpack_nibbles(self.values, self.num_columns, offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., N, K], columns in the order of the input; computed in float32."""
        if self.format.kind == "mxfp4":
            codes = CODES.to(self.values.device, torch.float32)
            numbers = codes[self.integers().int()]
            exponents = self.scales.to(torch.int32) - SCALE_BIAS
            scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        else:
            is_fp8 = self.format.kind == "fp8"
            numbers = self.values.float() if is_fp8 else self.integers().float()
            scales = self.scales.float()
        if self.zeros is not None:
            numbers -= self._each_column(self.zeros.float())
        numbers = numbers * self._each_column(scales)
        if self.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(-1, self.order, numbers)
        return numbers.to(dtype)

    def _each_column(self, of_groups: Tensor) -> Tensor:
        """[..., N, groups] -> [..., N, K], or [..., N, 1] where rows have one group."""
        size = self.format.group_size
        if size is None:
            return of_groups
        return of_groups.repeat_interleave(size, dim=-1)[..., : self.num_columns]

    def rows(self, index: slice | Tensor) -> "QuantizedWeight":
        """Some of the rows N."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[..., index, :]

        zeros = None if self.zeros is None else cut(self.zeros)
        return replace(self, values=cut(self.values), scales=cut(self.scales), zeros=zeros)

    def columns(self, start: int, stop: int) -> "QuantizedWeight":
        """Stored columns start..stop-1; ValueError where they are no whole groups."""
        size = self.format.group_size
        if self.order is not None:
            raise ValueError("columns that have been put in another order cannot be cut")
        step = size if size is not None else 2 if self.format.in_nibbles else 1
        is_range = 0 <= start < stop <= self.num_columns
        if not is_range or start % step or (stop % step and stop != self.num_columns):
            raise ValueError(
                f"columns {start} to {stop} of a {self.format.name} weight are no whole groups of "
                f"{step}"
            )
        per_value = 2 if self.format.in_nibbles else 1
        groups = slice(None) if size is None else slice(start // size, math.ceil(stop / size))
        zeros = None if self.zeros is None else self.zeros[..., groups]
        values = self.values[..., start // per_value : math.ceil(stop / per_value)]
        return replace(
            self,
            num_columns=stop - start,
            values=values,
            scales=self.scales[..., groups],
            zeros=zeros,
        )

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        moved: dict[str, Any] = {name: part.to(device) for name, part in self.tensors.items()}
        return replace(self, **moved)

    @staticmethod
    def can_join(parts: Sequence["QuantizedWeight"]) -> bool:
        """Whether they have one format and one order of columns."""
        first = parts[0]
        return all(
            part.format == first.format
            and part.num_columns == first.num_columns
            and (part.order is None) == (first.order is None)
            and (part.order is None or first.order is None or part.order.equal(first.order))
            for part in parts
        )

    @staticmethod
    def join(parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Weights that `can_join`, one below the other."""
        return _combined(parts, torch.cat)

    @staticmethod
    def stack(parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Weights that `can_join`, [N, K] each -> [E, N, K]."""
        return _combined(parts, lambda tensors, dim: torch.stack(tensors))


def _combined(parts: Sequence[QuantizedWeight], combine: Callable[..., Tensor]) -> QuantizedWeight:
    assert QuantizedWeight.can_join(parts)
    dtype = parts[0].scales.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.scales.dtype)
    zeros = [part.zeros.to(dtype) for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        values=combine([part.values for part in parts], dim=-2),
        scales=combine([part.scales.to(dtype) for part in parts], dim=-2),
        zeros=combine(zeros, dim=-2) if zeros else None,
    )


def quantized_weight(
    form: Format,
    integers: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """From q (or codes of mxfp4) [..., N, K], one number each."""
    values = integers.to(torch.int8)
    if form.in_nibbles:
        values = pack_nibbles(values, 8 if form.kind == "int" else 0)
    return QuantizedWeight(form, integers.size(-1), values, scales, zeros, order).check()


def pack_nibbles(numbers: Tensor, offset: int = 8) -> Tensor:
    """Integers [..., K] from -offset to 15 - offset -> uint8 [..., ceil(K/2)], the first of two in
    the low half.
    """
    halves = (numbers + offset).to(torch.uint8)
    if halves.size(-1) % 2:
        halves = torch.nn.functional.pad(halves, (0, 1), value=offset)
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, num_columns: int, offset: int = 8) -> Tensor:
    """The inverse: int8 [..., num_columns]."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return halves[..., :num_columns].view(torch.int8) - offset
