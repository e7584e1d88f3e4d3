"""GPTQ as AutoGPTQ and GPTQModel write it.

qweight int32 [K * bits / 32, N] holds the integers of a column of words one after the other,
qzeros int32 [G, N * bits / 32] the zeros, scales [G, N]; g_idx [K] says which group a column
belongs to. A weight is (q - zero) * scale. The older format ("gptq") stores zero - 1, the newer
("gptq_v2") the zero: auto_gptq/nn_modules/qlinear/qlinear_cuda.py and
gptqmodel/nn_modules/qlinear/__init__.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.readers.layout import (
    FLOATS,
    UNEQUAL,
    Headers,
    Read,
    Reader,
    Stored,
    absent,
    are_full,
    check_dtype,
    check_groups,
    check_matrix,
    check_shape,
    group_size_of,
    int_format,
    known,
    order_of,
    part,
    weight_of_words,
)
from quantize.readers.words import num_words, unpack_words

BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Scheme:
    """Of one module. `symmetric`: every zero is the middle of the range."""

    bits: int
    group_size: int | None
    symmetric: bool


class GPTQReader(Reader):
    """Settings under the names of both tools."""

    roles: Mapping[str, str] = {
        ".qweight": "qweight",
        ".qzeros": "qzeros",
        ".scales": "scales",
        ".g_idx": "g_idx",
    }
    required = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        # Rotations and adapters change the numbers; a planar layout has others.
        absent(settings, "is_marlin_format", "rotation", "adapter")
        formats = {known(settings, k, CHECKPOINT_FORMATS) for k in ("checkpoint_format", "format")}
        formats -= {None}
        if len(formats) > 1:
            raise ValueError(f"quantization_config: format is both {' and '.join(sorted(formats))}")
        known(settings, "pack_dtype", ("int32",))
        self.scheme = _scheme(settings)
        self.adds_one = formats != {"gptq_v2"}
        self.carries = self.adds_one and _by_gptqmodel(settings)
        self.overrides = _overrides(settings)

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        scheme = self._scheme_of(module)
        weight, zeros, scales = (headers[role] for role in self.required)
        for header in (weight, zeros, scales):
            check_matrix(header)
        check_dtype(weight, "I32")
        check_dtype(zeros, "I32")
        check_dtype(scales, *FLOATS)
        num_rows = weight.shape[1]
        num_columns = weight.shape[0] * 32 // scheme.bits
        groups = None
        if "g_idx" in headers:
            check_dtype(headers["g_idx"], "I32", "I64")
            [num_columns] = headers["g_idx"].shape if len(headers["g_idx"].shape) == 1 else [0]
            check_shape(weight, (num_words(num_columns, scheme.bits), num_rows))
            groups = read("g_idx")
        size = scheme.group_size
        num_groups = 1 if size is None else -(-num_columns // size)
        check_shape(scales, (num_groups, num_rows))
        check_shape(zeros, (num_groups, num_words(num_rows, scheme.bits)))
        form, reason = int_format(scheme.bits, size, not scheme.symmetric)
        in_order = True
        if groups is not None:
            check_groups(headers["g_idx"], groups, num_groups)
            in_order = are_full(groups, size)
            if not are_full(groups[order_of(groups)], size):
                form, reason = None, UNEQUAL
        load = partial(self._load, module, (num_rows, num_columns), scheme, form, in_order)
        return Stored((num_rows, num_columns), form, load, reason)

    def _load(
        self,
        module: str,
        shape: tuple[int, int],
        scheme: Scheme,
        form: Format | None,
        in_order: bool,
        read: Read,
    ) -> QuantizedWeight | Tensor:
        num_rows, num_columns = shape
        middle = 2 ** (scheme.bits - 1)
        words = read("qweight").t().contiguous()
        scales = read("scales").t().contiguous()
        zeros = self.zeros(read("qzeros"), scheme.bits)[:, :num_rows].t() - middle
        if scheme.symmetric and zeros.any():
            raise ValueError(
                f"{module}.qzeros are not all {middle}, though quantization_config says sym: true; "
                "set it to false in config.json if they are meant"
            )
        groups = None if in_order else read("g_idx").long()
        kept = None if scheme.symmetric else zeros
        return weight_of_words(
            form, words, scheme.bits, num_columns, scales, kept, groups, scheme.group_size
        )

    def zeros(self, words: Tensor, bits: int) -> Tensor:
        """qzeros -> the zeros, int16 [G, N and padding].

        The older format keeps zero - 1. AutoGPTQ adds the one to each number by itself; GPTQModel
        has subtracted it from whole words, so that a zero of 0 has borrowed from its neighbour, and
        adds it to whole words again (3 bits: to each number). They differ beside zeros of 0 alone.
        """
        count = words.size(-1) * 32 // bits
        if self.carries and bits != 3:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            words = (words.long() + ones).to(torch.int32)  # wraps around
            return unpack_words(words, bits, count).short()
        numbers = unpack_words(words, bits, count).short()
        return (numbers + 1) & (2**bits - 1) if self.adds_one else numbers

    def _scheme_of(self, module: str) -> Scheme:
        for pattern, scheme in self.overrides:
            if pattern.match(module):
                if scheme is None:
                    raise ValueError(
                        f"{module} is quantized, though `dynamic` in quantization_config leaves it "
                        "out"
                    )
                return scheme
        return self.scheme


def _scheme(settings: Mapping[str, Any]) -> Scheme:
    bits = known(settings, "bits", BITS)
    if bits is None:
        raise ValueError("quantization_config: there is no bits")
    known(settings, "sym", (True, False))
    # Where nothing is said, zeros are kept: right in both cases.
    return Scheme(bits, group_size_of(settings.get("group_size")), settings.get("sym") is True)


def _by_gptqmodel(settings: Mapping[str, Any]) -> bool:
    tools = part(settings, "meta").get("quantizer")
    tools = tools if isinstance(tools, list) else [tools]
    return any(isinstance(tool, str) and tool.startswith("gptqmodel") for tool in tools)


def _overrides(settings: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Scheme | None]]:
    """GPTQModel's settings of single modules: "-:pattern" are left out, others have their own."""
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    dynamic = part(settings, "dynamic")
    for text in dynamic:
        try:
            pattern = re.compile(re.sub(r"^[-+]:", "", text))
        except re.error as error:
            raise ValueError(f"quantization_config: dynamic has {text!r} ({error})") from None
        is_out = text.startswith("-:")
        found.append((pattern, None if is_out else _scheme({**settings, **part(dynamic, text)})))
    return found
