"""AWQ in its "gemm" layout, as AutoAWQ writes it.

qweight int32 [K, N / 8], qzeros int32 [G, N / 8] and scales [G, N]; four-bit integers of eight rows
of the weight share a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits
(awq/modules/linear/gemm.py). A weight is (q - zero) * scale.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.readers.layout import (
    FLOATS,
    Headers,
    Read,
    Reader,
    Stored,
    absent,
    check_dtype,
    check_matrix,
    check_shape,
    group_size_of,
    int_format,
    known,
    weight_of,
)

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 8


class AWQReader(Reader):
    """Settings under the names of transformers and of AutoAWQ's own file."""

    roles: Mapping[str, str] = {".qweight": "qweight", ".qzeros": "qzeros", ".scales": "scales"}
    required = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        absent(settings, "is_marlin_format")
        lowered = {k: v.lower() if isinstance(v, str) else v for k, v in settings.items()}
        for key in ("version", "format", "checkpoint_format"):
            known(lowered, key, ("gemm",))
        if lowered.get("backend") == "llm-awq":  # others name kernels for the same layout
            raise ValueError(
                "quantization_config: backend llm-awq has a layout that cannot be read"
            )
        for key in ("bits", "w_bit"):
            known(settings, key, (BITS,))
        known(settings, "zero_point", (True,))
        size = settings.get("group_size", settings.get("q_group_size"))
        self.group_size = group_size_of(size)

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        weight, zeros, scales = (headers[role] for role in self.required)
        for header in (weight, zeros, scales):
            check_matrix(header)
        check_dtype(weight, "I32")
        check_dtype(zeros, "I32")
        check_dtype(scales, *FLOATS)
        num_columns, num_words = weight.shape
        num_rows = num_words * len(ORDER)
        num_groups = 1 if self.group_size is None else -(-num_columns // self.group_size)
        check_shape(scales, (num_groups, num_rows))
        check_shape(zeros, (num_groups, num_words))
        form, reason = int_format(BITS, self.group_size, has_zeros=True)
        return Stored((num_rows, num_columns), form, partial(self._load, form), reason)

    def _load(self, form: Format | None, read: Read) -> QuantizedWeight | Tensor:
        zeros = _unpack(read("qzeros"))
        scales = read("scales").t().contiguous()
        words = read("qweight")
        if form is None or words.size(0) % 2:
            return weight_of(form, _unpack(words), scales, zeros, None, self.group_size)
        kept = zeros.to(scales.dtype)
        return QuantizedWeight(form, words.size(0), _half_bytes(words), scales, kept).check()


def _unpack(words: Tensor) -> Tensor:
    """int32 [L, N / 8] -> int8 [N, L], less the middle of the range."""
    words = words.t()
    found = torch.empty(words.size(0), len(ORDER), words.size(1), dtype=torch.int8)
    for place, row in enumerate(ORDER):
        found[:, row] = (words >> (BITS * place) & 15) - MIDDLE
    return found.flatten(0, 1)


def _half_bytes(words: Tensor) -> Tensor:
    """int32 [K, N / 8], K even -> uint8 [N, K / 2], without each number in between."""
    even, odd = words[::2].t().contiguous(), words[1::2].t().contiguous()
    found = torch.empty(even.size(0), len(ORDER), even.size(1), dtype=torch.uint8)
    for place, row in enumerate(ORDER):
        shift = BITS * place
        found[:, row] = (even >> shift & 15) | (odd >> shift & 15) << BITS
    return found.flatten(0, 1)
