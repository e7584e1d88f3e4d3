"""MXFP4 as gpt-oss stores it: `*_blocks` uint8 [E, N, B, 16] and `*_scales` uint8 [E, N, B], two
codes a byte with the low half first, which is how it is kept here.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.mxfp4 import BLOCK_SIZE
from quantize.readers.layout import Headers, Read, Reader, Stored


def mxfp4_weight(blocks: Tensor, scales: Tensor) -> QuantizedWeight:
    """The same bytes, [..., N, B * 32]."""
    values = blocks.flatten(-2)
    form = Format("mxfp4", 4, BLOCK_SIZE)
    return QuantizedWeight(form, 2 * values.size(-1), values, scales).check()


class MXFP4Reader(Reader):
    """Hides and presents nothing: models name the blocks and scales of their experts themselves."""

    roles: Mapping[str, str] = {}

    def __init__(self, settings: Mapping[str, Any]) -> None:
        pass

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        raise AssertionError(f"{module} has a role, and none is known")
