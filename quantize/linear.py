"""Linears over a stored quantized weight: modules that take the place of nn.Linear and
GroupedLinear, in plain PyTorch on any device.

They are what kernels are held against: y = F.linear(x, dequantize(), bias). Their parameters are
the canonical tensors, so a checkpoint holds exactly them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats import Format, QuantizedWeight
from quantize.grouped import product_by_group

ACTIVATION_MAX = 127


class _Quantized(nn.Module):
    """What both kinds share: the tensors of a QuantizedWeight as frozen parameters `weight`,
    `scales`, `zeros`, `order`.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.format, self.in_features = weight.format, weight.num_columns
        self.out_features = weight.shape[-2]
        self.weight, self.scales = _frozen(weight.values), _frozen(weight.scales)
        self.zeros = None if weight.zeros is None else _frozen(weight.zeros)
        self.order = None if weight.order is None else _frozen(weight.order)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The stored weight, sharing memory."""
        parts = (self.weight, self.scales, self.zeros, self.order)
        return QuantizedWeight(self.format, self.in_features, *parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weight, scales and zeros included."""
        return self.quantized.num_bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain weight [.., N, K]."""
        return self.quantized.dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {list(self.quantized.shape)}"


class QuantizedLinear(_Quantized):
    """y = x W^T + b with a stored W [N, K]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        x = round_activations(x) if self.format.dynamic else x
        return F.linear(x, self.dequantize(x.dtype), self.bias)


class QuantizedGroupedLinear(_Quantized):
    """One linear for each group of rows, stored weights [E, N, K]."""

    @property
    def num_groups(self) -> int:
        return self.weight.size(0)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [P, K] sorted by group, of which group e ends before row ends[e] -> [P, N]."""
        x = round_activations(x) if self.format.dynamic else x
        return torch.ops.quantize.quantized_grouped_linear.default(
            x, self.weight, self.scales, self.zeros, self.order, self.bias, ends, self.format.name
        )


class QuantizedEmbedding(_Quantized):
    """Rows of a stored table [V, K], looked up and dequantized to `dtype`."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., K]."""
        return self.quantized.rows(tokens).dequantize(self.dtype)


def round_activations(x: Tensor) -> Tensor:
    """x [..., K] with every token rounded to 127 steps on either side of zero (as LLM.int8's
    vector-wise activations, 2208.07339).
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / ACTIVATION_MAX
    return ((wide / scale).round() * scale).to(x.dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


torch.library.define(
    "quantize::quantized_grouped_linear",
    "(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, "
    "Tensor ends, str format) -> Tensor",
)


def _quantized_grouped_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
    format: str,
) -> Tensor:
    form, columns = Format.parse(format), x.size(-1)

    def weight(group: int | Tensor) -> Tensor:
        zeros_here = None if zeros is None else zeros[group]
        stored = QuantizedWeight(form, columns, values[group], scales[group], zeros_here, order)
        return stored.dequantize(x.dtype)

    return product_by_group(x, weight, values.size(1), bias, ends)


torch.library.impl("quantize::quantized_grouped_linear", "default", _quantized_grouped_linear)


@torch.library.register_fake("quantize::quantized_grouped_linear")
def _(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.size(0), values.size(1))
