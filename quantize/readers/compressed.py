"""compressed-tensors, as LLM Compressor and vLLM write it.

`config_groups` says how the modules that match their targets are stored: packed ("pack-quantized":
weight_packed int32 [N, K * bits / 32], weight_scale, weight_zero_point packed along the rows,
weight_shape, weight_g_idx) or one number each ("int-", "float-" and "naive-quantized": weight int8
or fp8 and weight_scale). Packed integers have 2^(bits-1) added; a weight is (q - zero) * scale:
compressed_tensors/compressors and quantization/lifecycle/forward.py.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.readers.fp8 import (
    ACTIVATIONS,
    HIDDEN,
    KV_CACHE,
    Block,
    block_of,
    look_fp8,
    row_scales,
)
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
    weight_of,
    weight_of_words,
)
from quantize.readers.words import num_words, unpack_words

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """What `weights` of a group says. `block`: rows and columns that share a scale ((1, n): the
    columns of a row); None: all of a row, or without `per_row` all of the tensor.
    """

    kind: str
    bits: int
    symmetric: bool
    per_row: bool
    block: Block | None

    @property
    def group_size(self) -> int | None:
        return None if self.block is None else self.block[1]

    def scale_shapes(self, num_rows: int, num_columns: int) -> list[tuple[int, ...]]:
        if self.block is not None:
            return [(-(-num_rows // self.block[0]), -(-num_columns // self.block[1]))]
        return [(num_rows, 1), (num_rows,)] if self.per_row else [(1,), (), (1, 1)]


class CompressedReader(Reader):
    """The names of tensors decide what is quantized; `ignore` only repeats it."""

    roles: Mapping[str, str] = {
        ".weight": "weight",
        ".weight_packed": "packed",
        ".weight_scale": "scale",
        ".weight_zero_point": "zeros",
        ".weight_shape": "shape",
        ".weight_g_idx": "g_idx",
    }
    required = ("scale",)
    hidden = re.compile(rf"{HIDDEN.pattern}|(.*\.)?(input|output|q|k|v)_zero_point")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        known(part(settings, "sparsity_config"), "format", ("dense",))
        absent(part(settings, "transform_config"), "config_groups")
        known(settings, "format", (*LAYOUTS, "mixed-precision"))
        groups = part(settings, "config_groups")
        self.schemes = _Schemes(groups)
        if any(group.get("input_activations") for group in groups.values()):
            self.notes += (ACTIVATIONS,)
        if settings.get("kv_cache_scheme"):
            self.notes += (KV_CACHE,)

    def look(self, module: str, headers: Headers, read: Read) -> Stored:
        scheme = self.schemes.of(module)
        role, other = ("packed", "weight") if "packed" in headers else ("weight", "packed")
        if role not in headers or other in headers:
            raise ValueError(
                f"{module}.weight or {module}.weight_packed is needed, and one of them"
            )
        if scheme.kind == "float":
            check_dtype(headers[role], "F8_E4M3")
            return _without_zeros(look_fp8(headers[role], headers["scale"], scheme.block), headers)
        shape = _packed_shape(scheme, headers, read) if role == "packed" else _plain_shape(headers)
        check_dtype(headers["scale"], *FLOATS)
        check_shape(headers["scale"], *scheme.scale_shapes(*shape))
        _check_zeros(module, scheme, headers, *shape)
        form, reason = int_format(scheme.bits, scheme.group_size, not scheme.symmetric)
        groups = _groups(headers, scheme, shape[1], read)
        in_order = groups is None or are_full(groups, scheme.group_size)
        if groups is not None and not are_full(groups[order_of(groups)], scheme.group_size):
            form, reason = None, UNEQUAL
        load = partial(_load, module, shape, scheme, form, in_order, set(headers))
        return Stored(shape, form, load, reason)


# -- settings --


class _Schemes:
    """Which scheme a module has: names first, then patterns in their alphabetical order, then
    classes of modules (as compressed_tensors/utils/match.py), of which only linear ones are stored.
    """

    def __init__(self, groups: Mapping[str, Any]) -> None:
        self.by_name: dict[str, Scheme] = {}
        self.by_pattern: list[tuple[re.Pattern[str], Scheme]] = []
        self.by_class: list[Scheme] = []
        schemes = []
        for name in groups:
            group = part(groups, name)
            if (scheme := _scheme(name, group)) is not None:
                schemes.append(scheme)
                self._add(name, group.get("targets"), scheme)
        if not schemes:
            raise ValueError("quantization_config: no config_groups say how weights are stored")
        # One for all, whatever class it names.
        self.by_class += schemes if len(schemes) == 1 else []
        self.by_pattern.sort(key=lambda entry: entry[0].pattern)

    def _add(self, name: str, targets: Any, scheme: Scheme) -> None:
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"quantization_config: targets of {name} are {targets!r}")
        for target in targets:
            if not target.startswith("re:"):
                self.by_name[target] = scheme
                if target in ("Linear", "FusedMoE"):
                    self.by_class.append(scheme)
                continue
            try:
                self.by_pattern.append((re.compile(target[3:]), scheme))
            except re.error as error:
                raise ValueError(f"quantization_config: target {target!r} ({error})") from None

    def of(self, module: str) -> Scheme:
        if module in self.by_name:
            return self.by_name[module]
        for pattern, scheme in self.by_pattern:
            if pattern.match(module):
                return scheme
        if not self.by_class:
            raise ValueError(f"{module} is quantized, and no target of config_groups is its own")
        return self.by_class[0]


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme | None:
    """None where a group says nothing of weights (one of KV caches)."""
    weights = part(group, "weights")
    known(group, "format", LAYOUTS)
    if not weights:
        return None
    kind = known(weights, "type", ("int", "float")) or "int"
    bits = known(weights, "num_bits", (2, 3, 4, 5, 6, 7, 8) if kind == "int" else (8,)) or 8
    known(weights, "dynamic", (False,))
    symmetric = known(weights, "symmetric", (True, False)) is not False
    strategy = known(weights, "strategy", STRATEGIES)
    size = weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if kind == "float" and not symmetric:
        raise ValueError(f"quantization_config: {name} has floats with zeros; they cannot be read")
    scheme = Scheme(kind, bits, symmetric, strategy != "tensor", None)
    if strategy == "block":
        return replace(scheme, block=block_of(weights.get("block_structure"), "block_structure"))
    if strategy == "group":
        size = group_size_of(size)
        if size is None:
            raise ValueError(f"quantization_config: {name} has groups and no group_size")
        return replace(scheme, block=(1, size))
    return scheme


# -- headers --


def _plain_shape(headers: Headers) -> tuple[int, int]:
    check_matrix(headers["weight"])
    check_dtype(headers["weight"], "I8")
    num_rows, num_columns = headers["weight"].shape
    return num_rows, num_columns


def _packed_shape(scheme: Scheme, headers: Headers, read: Read) -> tuple[int, int]:
    """[N, K]; groups say how many columns there are, else weight_shape does."""
    packed, scale = headers["packed"], headers["scale"]
    check_matrix(packed)
    check_dtype(packed, "I32")
    if "shape" in headers:
        check_shape(headers["shape"], (2,))
    num_rows = packed.shape[0]
    if scheme.group_size is not None and len(scale.shape) == 2:
        num_columns = scale.shape[1] * scheme.group_size  # theirs are full
    elif "shape" in headers:
        num_columns = int(read("shape")[1])
    else:
        num_columns = packed.shape[1] * 32 // scheme.bits
    check_shape(packed, (num_rows, num_words(num_columns, scheme.bits)))
    return num_rows, num_columns


def _check_zeros(
    module: str, scheme: Scheme, headers: Headers, num_rows: int, num_columns: int
) -> None:
    if "zeros" not in headers:
        if not scheme.symmetric:
            raise ValueError(f"{module}.weight_zero_point is missing, and symmetric is false")
        return
    zeros = headers["zeros"]
    shapes = scheme.scale_shapes(num_rows, num_columns)
    if zeros.dtype == "I32" and scheme.per_row:
        check_shape(zeros, (num_words(num_rows, scheme.bits), *shapes[0][1:]))
    else:
        check_dtype(zeros, "I8")
        check_shape(zeros, *shapes)


def _groups(headers: Headers, scheme: Scheme, num_columns: int, read: Read) -> Tensor | None:
    """g_idx [K]; None where there is none, or -1 in all of it: it is not used."""
    if "g_idx" not in headers:
        return None
    check_dtype(headers["g_idx"], "I32", "I64")
    check_shape(headers["g_idx"], (num_columns,))
    groups = read("g_idx")
    if (groups == -1).all():
        return None
    check_groups(headers["g_idx"], groups, -(-num_columns // (scheme.group_size or num_columns)))
    return groups


def _without_zeros(stored: Stored, headers: Headers) -> Stored:
    """Some files have zeros of 0 beside fp8 weights."""

    def load(read: Read) -> QuantizedWeight | Tensor:
        if "zeros" in headers and read("zeros").float().any():
            raise ValueError(f"{headers['zeros'].name} is not 0: fp8 weights have no zeros")
        return stored.load(read)

    return replace(stored, load=load)


# -- numbers --


def _load(
    module: str,
    shape: tuple[int, int],
    scheme: Scheme,
    form: Format | None,
    in_order: bool,
    roles: Set[str],
    read: Read,
) -> QuantizedWeight | Tensor:
    num_rows, num_columns = shape
    if "shape" in roles and read("shape").tolist() != [*shape]:
        raise ValueError(f"{module}.weight_shape is {read('shape').tolist()}, not {[*shape]}")
    rows = scheme.block if scheme.block is not None and scheme.block[0] > 1 else None
    scales = _by_row(read("scale"), num_rows, rows)
    zeros = None
    if "zeros" in roles:
        zeros = _by_row(_signed_zeros(read("zeros"), scheme.bits, num_rows), num_rows, rows)
        if scheme.symmetric and zeros.any():
            raise ValueError(
                f"{module}.weight_zero_point is not 0, though quantization_config says "
                "symmetric: true"
            )
    groups = None if in_order else read("g_idx").long()
    kept = None if scheme.symmetric else zeros
    size = scheme.group_size
    if "packed" in roles:
        words = read("packed")
        return weight_of_words(form, words, scheme.bits, num_columns, scales, kept, groups, size)
    numbers = read("weight")
    _check_range(module, numbers, 2 ** (scheme.bits - 1))
    return weight_of(form, numbers, scales, kept, groups, size)


def _by_row(numbers: Tensor, num_rows: int, block: Block | None) -> Tensor:
    """Scales or zeros [N, groups], whatever they belong to."""
    if block is None and numbers.dim() == 2 and numbers.size(0) == num_rows:
        return numbers
    return row_scales(numbers, num_rows, block)


def _signed_zeros(zeros: Tensor, bits: int, num_rows: int) -> Tensor:
    """Packed along the rows [N * bits / 32, G], or as they are."""
    if zeros.dtype != torch.int32:
        return zeros
    words = zeros.t().contiguous()
    return (unpack_words(words, bits, num_rows).short() - 2 ** (bits - 1)).t()


def _check_range(module: str, numbers: Tensor, middle: int) -> None:
    low, high = (int(end) for end in numbers.aminmax())
    if low < -middle or high >= middle:
        raise ValueError(
            f"{module}.weight has integers from {low} to {high}; quantization_config says "
            f"{-middle} to {middle - 1}"
        )
