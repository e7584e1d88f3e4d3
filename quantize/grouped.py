"""Rows that go through different weights: y[p] = weight[group of p] x[p], rows sorted by group.

This is what experts are made of. The ops are opaque to the compiler: which groups have rows is
known only when they run, and only their weights are read. Their meaning is
`grouped_linear_reference`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.packed import keep_packed, packed_weight

# Where there is no grouped product, weights are gathered for up to so many rows, so many bytes of
# them at a time.
MAX_GATHERED_ROWS, MAX_GATHERED_BYTES = 64, 1 << 30


class GroupedLinear(nn.Module):
    """One linear for each group of rows, weights [E, N, K]."""

    def __init__(self, num_groups: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_groups, out_features)) if bias else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all groups."""
        return self.weight.nbytes

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [P, K] sorted by group, of which group e ends before row ends[e] -> [P, N]."""
        return grouped_linear(x, self.weight, self.bias, ends)


class PackedGroupedLinear(nn.Module):
    """`GroupedLinear` in bfloat16 for the CPU, each group's weight in oneDNN's blocked layout."""

    def __init__(self, linear: GroupedLinear) -> None:
        super().__init__()
        self.num_groups, self.out_features, _ = linear.weight.shape
        self.weight_bytes = linear.weight_bytes
        self.bias = linear.bias
        handles = [keep_packed(self, weight.detach()) for weight in linear.weight]
        self.register_buffer("handles", torch.tensor(handles), persistent=False)

    handles: Tensor

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """As `GroupedLinear`."""
        return torch.ops.quantize.packed_grouped_linear.default(
            x, self.handles, self.bias, ends, self.out_features
        )

    def dequantize(self) -> Tensor:
        """The weights [E, N, K]."""
        return torch.stack([packed_weight(handle).to_dense() for handle in self.handles.tolist()])


torch.library.define(
    "quantize::grouped_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor ends) -> Tensor",
)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """x [P, K], weight [E, N, K], bias [E, N] or None, ends [E] -> [P, N].

    Rows are sorted by group: those of group e end before row `ends[e]`, where the next begin. Rows
    behind the last group belong to none: what comes out for them means nothing.
    """
    return torch.ops.quantize.grouped_linear.default(x, weight, bias, ends)


@torch.library.register_fake("quantize::grouped_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(1))


def grouped_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor
) -> Tensor:
    """The meaning of `grouped_linear`, a weight gathered for every row. Rows behind the last group
    have some result.
    """
    return _gathered(x, weight.__getitem__, bias, ends)


def grouped_linear_on_host(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """One product for each group that has rows; the host must know the ends."""
    return _on_host(x, weight.__getitem__, weight.size(1), bias, ends)


def grouped_linear_on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Without waiting for the device, except for many rows where there is no grouped product."""
    if _has_grouped_product(x, weight):
        y = F.grouped_mm(x, weight.transpose(-1, -2), offs=ends.to(torch.int32))
        if bias is None:
            return y
        groups = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
        return y + bias[groups.clamp(max=weight.size(0) - 1)]
    return product_by_group(x, weight.__getitem__, weight.size(1), bias, ends)


def product_by_group(
    x: Tensor,
    weight: Callable[[int | Tensor], Tensor],
    out_features: int,
    bias: Tensor | None,
    ends: Tensor,
) -> Tensor:
    """`grouped_linear` with weights that are asked for: [N, K] of a group, or [P, N, K] of the
    groups [P].
    """
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not x.is_cuda or (x.size(0) > MAX_GATHERED_ROWS and not capturing):
        return _on_host(x, weight, out_features, bias, ends)
    size = max(1, MAX_GATHERED_BYTES // (out_features * x.size(1) * x.element_size()))
    parts = [
        _gathered(part, weight, bias, (ends - number * size).clamp(0, len(part)))
        for number, part in enumerate(x.split(size))
    ]
    return torch.cat(parts)


def _on_host(
    x: Tensor,
    weight: Callable[[int | Tensor], Tensor],
    out_features: int,
    bias: Tensor | None,
    ends: Tensor,
) -> Tensor:
    y = x.new_empty(x.size(0), out_features)
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            group_bias = None if bias is None else bias[group]
            y[start:end] = F.linear(x[start:end], weight(group), group_bias)
        start = end
    return y


def _gathered(
    x: Tensor, weight: Callable[[int | Tensor], Tensor], bias: Tensor | None, ends: Tensor
) -> Tensor:
    """A weight for every row. Rows behind the last group have some result."""
    groups = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    groups = groups.clamp(max=len(ends) - 1)
    y = torch.bmm(weight(groups), x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias[groups]


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """PyTorch's runs on the device alone from Hopper on (9.x and 10.x), in bfloat16, where rows
    are aligned; elsewhere it asks the host.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return False
    return x.dtype == torch.bfloat16 and weight.size(1) % 8 == 0 and weight.size(2) % 8 == 0


torch.library.impl("quantize::grouped_linear", "default", grouped_linear_reference)
torch.library.impl("quantize::grouped_linear", "cpu", grouped_linear_on_host)
torch.library.impl("quantize::grouped_linear", "cuda", grouped_linear_on_cuda)

torch.library.define(
    "quantize::packed_grouped_linear",
    "(Tensor x, Tensor handles, Tensor? bias, Tensor ends, SymInt out_features) -> Tensor",
)


@torch.library.impl("quantize::packed_grouped_linear", "cpu")
def _packed_grouped_linear_cpu(
    x: Tensor, handles: Tensor, bias: Tensor | None, ends: Tensor, out_features: int
) -> Tensor:
    y = x.new_empty(x.size(0), out_features)
    start = 0
    for group, (handle, end) in enumerate(zip(handles.tolist(), ends.tolist(), strict=True)):
        if end > start:
            group_bias = None if bias is None else bias[group]
            y[start:end] = torch.ops.mkldnn._linear_pointwise(
                x[start:end], packed_weight(handle), group_bias, "none", [], ""
            )
        start = end
    return y


@torch.library.register_fake("quantize::packed_grouped_linear")
def _(x: Tensor, handles: Tensor, bias: Tensor | None, ends: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.size(0), out_features)
