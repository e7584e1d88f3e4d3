"""Reading what others quantized: a reader for each `quant_method` of config.json.

What is read is lossless: in one of our formats every number dequantizes, in float32, to what the
layout's own definition says; where no format has the same numbers the weight is dequantized, and
the reader says why.
"""

from collections.abc import Callable, Mapping
from typing import Any

from quantize.readers.awq import AWQReader
from quantize.readers.bitsandbytes import BitsAndBytesReader
from quantize.readers.compressed import CompressedReader
from quantize.readers.fp8 import FP8Reader
from quantize.readers.gptq import GPTQReader
from quantize.readers.layout import Header, Headers, Read, Reader, Stored
from quantize.readers.mxfp4 import MXFP4Reader, mxfp4_weight

__all__ = ["READERS", "Header", "Headers", "Read", "Reader", "Stored", "mxfp4_weight"]

# By what config.json calls `quant_method`; ValueError for settings that are not understood.
READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "gptq": GPTQReader,
    "awq": AWQReader,
    "compressed-tensors": CompressedReader,
    "fp8": FP8Reader,
    "fbgemm_fp8": FP8Reader,
    "modelopt": FP8Reader,
    "mxfp4": MXFP4Reader,
    "bitsandbytes": BitsAndBytesReader,
}
