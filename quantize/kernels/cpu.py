"""Linears over quantized weights packed for the CPU: the same numbers in the order in which the
kernels of linear.cpp read them.

The ops mean the plain PyTorch functions here, which are what runs where nothing could be built or
the processor has no AVX2. Packing is exact: `canonical` gives the stored weight back bit for bit,
and a module keeps no second copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats import Format, QuantizedWeight
from quantize.grouped import product_by_group
from quantize.kernels.build import LINEAR
from quantize.kernels.pages import huge_empty
from quantize.linear import round_activations
from quantize.mxfp4 import SCALE_BIAS

TILE_ROWS = 16  # rows of a weight that are read together
STRIPE_TILES = 4  # tiles that lie side by side: memory is read fastest as one stream
STRIPE_ROWS = STRIPE_TILES * TILE_ROWS
LANE_BYTES = 4  # of a row, read together
ACTIVATIONS = (torch.bfloat16, torch.float32)
SCALES = (torch.bfloat16, torch.float16, torch.float32)


class _Packed(nn.Module):
    """`values` uint8 [..., stripes, chunks, 4, 64]: of each stripe of 64 rows, four bytes of each
    row in turn; `scales` and `zeros` [..., stripes, groups, 4, 16].
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        LINEAR.load()
        self.format, self.in_features = weight.format, weight.num_columns
        self.out_features = weight.shape[-2]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale_dtype = weight.scales.dtype
        self.register_buffer("values", pack_values(weight), persistent=False)
        scales = _float_scales(weight.scales)
        self.register_buffer("scales", _pack_rows(scales), persistent=False)
        zeros = None if weight.zeros is None else _pack_rows(weight.zeros.to(scales.dtype))
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("order", weight.order, persistent=False)

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    @staticmethod
    def supports(form: Format, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether there is a kernel for weights of this shape and activations of this dtype."""
        if form.kind not in ("int", "mxfp4") or dtype not in ACTIVATIONS:
            return False
        return 0 not in shape and LINEAR.load() is not None

    def _ordered(self, x: Tensor) -> Tensor:
        """x with its columns as the weight has them."""
        if x.size(-1) != self.in_features:  # the packed weight is padded and would not notice
            raise ValueError(f"x has {x.size(-1)} columns; the weight has {self.in_features}")
        return x if self.order is None else x.index_select(-1, self.order)

    @property
    def weight_bytes(self) -> int:
        """Bytes that one multiplication reads (of all groups, where there are several)."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def canonical(self) -> QuantizedWeight:
        """The stored weight, bit for bit."""
        return unpack(
            self.format,
            self.values,
            self.scales,
            self.zeros,
            self.out_features,
            self.in_features,
            self.order,
            self.scale_dtype,
        )

    @property
    def quantized(self) -> QuantizedWeight:
        """As `canonical`."""
        return self.canonical()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain weight [.., N, K]."""
        return self.canonical().dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {[*self.values.shape[:-3], self.out_features]} packed"


class PackedQuantizedLinear(_Packed):
    """y = x W^T + b with a packed W [N, K]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. A row has the same bits however many there are: up to 64, or any
        number where sums are of whole rows or of integers.
        """
        return torch.ops.quantize.packed_quantized_linear.default(
            self._ordered(x),
            self.values,
            self.scales,
            self.zeros,
            self.bias,
            self.out_features,
            self.format.name,
        )


class PackedQuantizedGroupedLinear(_Packed):
    """One linear for each group of rows, packed weights [E, N, K]."""

    @property
    def num_groups(self) -> int:
        return self.values.size(0)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [P, K] sorted by group, of which group e ends before row ends[e] -> [P, N]."""
        return torch.ops.quantize.packed_quantized_grouped_linear.default(
            self._ordered(x),
            self.values,
            self.scales,
            self.zeros,
            self.bias,
            ends,
            self.out_features,
            self.format.name,
        )


def pack_values(weight: QuantizedWeight) -> Tensor:
    """[..., N, K] -> [..., stripes, chunks, 4, 64]."""
    stored = weight.values.view(torch.uint8)
    *front, num_rows, width = stored.shape
    stripes, chunks = -(-num_rows // STRIPE_ROWS), -(-width // LANE_BYTES)
    shape = (*front, stripes, chunks, STRIPE_TILES, TILE_ROWS * LANE_BYTES)
    packed = huge_empty(shape, torch.uint8)
    if (num_rows, width) != (stripes * STRIPE_ROWS, chunks * LANE_BYTES):
        pad = (0, chunks * LANE_BYTES - width, 0, stripes * STRIPE_ROWS - num_rows)
        stored = F.pad(stored, pad)
    words = stored.contiguous().view(torch.int32)
    words = words.view(*front, stripes, STRIPE_ROWS, chunks).transpose(-1, -2)
    packed.view(torch.int32).view(*words.shape).copy_(words)
    if not weight.format.in_nibbles:
        _exchange(packed, weight.format)
    return packed


def _exchange(packed: Tensor, form: Format) -> None:
    """8-bit integers from two's complement to what the kernels read, or back, in place: as unsigned
    numbers, or (see avx512.h) the lower bits of negative ones inverted.
    """
    if form.dynamic:
        packed.bitwise_xor_(128)
    else:
        signed = packed.view(torch.int8)
        for part in signed.flatten(0, -4):  # a stripe: what is made on the way stays small
            part.bitwise_xor_((part >> 7) & 127)


def unpack(
    form: Format,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    num_rows: int,
    num_columns: int,
    order: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """What was packed."""
    *front, stripes, chunks, _, _ = values.shape
    words = values.view(torch.int32).view(*front, stripes, chunks, STRIPE_ROWS).transpose(-1, -2)
    stored = values.new_empty(*front, stripes * STRIPE_ROWS, chunks * LANE_BYTES)
    stored.view(torch.int32).view(*front, stripes, STRIPE_ROWS, chunks).copy_(words)
    stored = stored[..., :num_rows, : form.values_width(num_columns)].contiguous()
    if not form.in_nibbles:
        _exchange(stored[None, None, None], form)
    if form.kind == "mxfp4":
        scales = scales.view(torch.int16)
    own = _unpack_rows(scales, num_rows)
    if form.kind == "mxfp4":
        own = ((own & 0x7FFF) >> 7).to(torch.uint8)
    elif scale_dtype is not None:
        own = own.to(scale_dtype)
    return QuantizedWeight(
        form,
        num_columns,
        stored.view(form.values_dtype),
        own,
        None if zeros is None else _unpack_rows(zeros, num_rows),
        order,
    )


def _float_scales(scales: Tensor) -> Tensor:
    """Scales as floats; mxfp4's exponents as the bfloat16 that they mean, which all have."""
    if scales.dtype != torch.uint8:
        return scales if scales.dtype in SCALES else scales.float()
    ones = torch.ones_like(scales, dtype=torch.float32)
    return torch.ldexp(ones, scales.to(torch.int32) - SCALE_BIAS).to(torch.bfloat16)


def _pack_rows(of_groups: Tensor) -> Tensor:
    """[..., N, groups] -> [..., stripes, groups, 4, 16]."""
    *front, num_rows, groups = of_groups.shape
    stripes = -(-num_rows // STRIPE_ROWS)
    padded = F.pad(of_groups, (0, 0, 0, stripes * STRIPE_ROWS - num_rows))
    rows = padded.view(*front, stripes, STRIPE_ROWS, groups).transpose(-1, -2)
    shape = (*front, stripes, groups, STRIPE_TILES, TILE_ROWS)
    return huge_empty(shape, rows.dtype).copy_(rows.unflatten(-1, (STRIPE_TILES, TILE_ROWS)))


def _unpack_rows(packed: Tensor, num_rows: int) -> Tensor:
    """The inverse."""
    *front, stripes, groups, _, _ = packed.shape
    rows = packed.flatten(-2).transpose(-1, -2).reshape(*front, stripes * STRIPE_ROWS, groups)
    return rows[..., :num_rows, :].contiguous()


# The packed weight is inputs of the graph, so that one graph serves all layers; what says how to
# read it is the same in all of them.
torch.library.define(
    "quantize::packed_quantized_linear",
    "(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, SymInt out_features, "
    "str format) -> Tensor",
)
torch.library.define(
    "quantize::packed_quantized_grouped_linear",
    "(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, Tensor ends, "
    "SymInt out_features, str format) -> Tensor",
)


def packed_quantized_linear_reference(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str,
) -> Tensor:
    """The meaning of `packed_quantized_linear`: x [..., K] times the packed weight [N, K]."""
    form = Format.parse(format)
    x = round_activations(x) if form.dynamic else x
    weight = unpack(form, values, scales, zeros, out_features, x.size(-1))
    return F.linear(x, weight.dequantize(x.dtype), bias)


def packed_quantized_grouped_linear_reference(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    out_features: int,
    format: str,
) -> Tensor:
    """The meaning of `packed_quantized_grouped_linear`: see `quantize.grouped.grouped_linear`."""
    form = Format.parse(format)
    x = round_activations(x) if form.dynamic else x

    def weight(group: int | Tensor) -> Tensor:
        own = None if zeros is None else zeros[group]
        stored = unpack(form, values[group], scales[group], own, out_features, x.size(-1))
        return stored.dequantize(x.dtype)

    return product_by_group(x, weight, out_features, bias, ends)


torch.library.impl(
    "quantize::packed_quantized_linear", "default", packed_quantized_linear_reference
)
torch.library.impl(
    "quantize::packed_quantized_grouped_linear",
    "default",
    packed_quantized_grouped_linear_reference,
)


@torch.library.register_fake("quantize::packed_quantized_linear")
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("quantize::packed_quantized_grouped_linear")
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    out_features: int,
    format: str,
) -> Tensor:
    return x.new_empty(x.size(0), out_features)
