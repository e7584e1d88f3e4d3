"""The layouts in which others store quantized weights, written down once more from their
documentation, a number at a time: what writes shares nothing with the readers.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.quantized_files import QuantizedFiles, quantized_files
from quantize.formats import QuantizedWeight

# Settings as config.json has them.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def compressed(weights: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | settings


def words(numbers: Sequence[int], bits: int) -> list[int]:
    """Unsigned integers -> signed 32-bit words, filled from their lowest bits on."""
    stream = sum(number << bits * place for place, number in enumerate(numbers))
    count = math.ceil(len(numbers) * bits / 32)
    found = [stream >> 32 * place & 0xFFFFFFFF for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def packed_rows(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] unsigned -> int32 [R, C * bits / 32]."""
    return torch.tensor([words(row, bits) for row in numbers.tolist()], dtype=torch.int32)


def packed_columns(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] unsigned -> int32 [R * bits / 32, C]."""
    return packed_rows(numbers.t(), bits).t().contiguous()


def plain(numbers: Tensor, scales: Tensor, zeros: Tensor | None, groups: Sequence[int]) -> Tensor:
    """(q - zero) * scale, in double precision: exact, then rounded once."""
    rows = []
    for n, row in enumerate(numbers.tolist()):
        zero = [0] * scales.size(1) if zeros is None else zeros[n].tolist()
        scale = scales[n].double().tolist()
        rows.append([(q - zero[g]) * scale[g] for q, g in zip(row, groups, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).float()


def some_numbers(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns))


def some_scales(rows: int, groups: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(rows, groups) * 0.1 + 0.01).to(dtype)


def in_groups(columns: int, size: int | None) -> list[int]:
    return [0 if size is None else column // size for column in range(columns)]


def gptq_parts(
    numbers: Tensor, scales: Tensor, zeros: Tensor, bits: int, is_v2: bool = False
) -> dict[str, Tensor]:
    """AutoGPTQ's layout of unsigned [N, K], [N, G], [N, G]; the older one keeps zero - 1."""
    kept = zeros if is_v2 else (zeros - 1) % 2**bits
    return {
        "qweight": packed_columns(numbers.t(), bits),
        "qzeros": packed_rows(kept.t(), bits),
        "scales": scales.t().contiguous(),
    }


def awq_parts(numbers: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    def packed(numbers: Tensor) -> Tensor:  # [N, L] -> [L, N / 8]
        order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(len(numbers))]
        return packed_rows(numbers[order].t(), 4)

    return {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales.t().contiguous()}


def state(**values: Any) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def named(parts: Mapping[str, Tensor], module: str = "m") -> dict[str, Tensor]:
    return {f"{module}.{name}": part for name, part in parts.items()}


def nf4_parts(nested: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    """[3, 5] with blocks of 8; and their largest magnitudes."""
    parts = {
        "weight": torch.randint(0, 256, (8, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(2),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": state(
            quant_type="nf4", blocksize=8, dtype="float16", shape=[3, 5]
        ),
    }
    if not nested:
        return parts, parts["weight.absmax"].tolist()
    table = torch.linspace(-1, 1, 256)
    parts |= {
        "weight.absmax": torch.tensor([3, 250], dtype=torch.uint8),
        "weight.nested_absmax": torch.tensor([0.5, 0.25]),
        "weight.nested_quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": state(
            quant_type="nf4",
            blocksize=8,
            dtype="float16",
            shape=[3, 5],
            nested_blocksize=1,
            nested_offset=0.125,
        ),
    }
    peaks = [torch.tensor(0.5) * table[3] + 0.125, torch.tensor(0.25) * table[250] + 0.125]
    return parts, [float(peak) for peak in peaks]


# -- files that are none --

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Memory:
    """Tensors that are in no file."""

    folder = Path("somewhere")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return DTYPES[self.tensors[name].dtype]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        yield self.tensor


def opened(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedFiles:
    return quantized_files(Memory(tensors), settings)


def read(settings: Mapping[str, Any], parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of a module `m` with these parts."""
    return opened(settings, {f"m.{name}": part for name, part in parts.items()}).quantized(
        "m.weight"
    )
