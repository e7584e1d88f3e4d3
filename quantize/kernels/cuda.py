"""Linears for CUDA: weights in the order in which the kernels of triton_linear.py read them, and
`fused_linear`, one linear with the norm before it and the activation or residual after it.

Up to 16 rows run on the kernels, more on a matrix product with the plain weight. What an op means
is the plain PyTorch function beside it, which is what runs where Triton has no device (the
interpreter, TRITON_INTERPRET=1, counts as one for the CPU).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats import Format, QuantizedWeight
from quantize.kernels.build import kernels_wanted
from quantize.kernels.call import Call
from quantize.kernels.words import LEAST_GROUP, PackedWords, pack_words, unpack_words
from quantize.linear import round_activations

MAX_ROWS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "gelu_quick": lambda y: y * torch.sigmoid(1.702 * y),
    "relu": F.relu,
}


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm, or LayerNorm where `is_layer`, over the columns of x; with `offset` the weight is
    stored less one.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    is_layer: bool
    offset: bool


def why_no_triton(device: torch.device) -> str | None:
    """None where the kernels run on a device, else why they do not."""
    if not kernels_wanted():
        return "GPTFAST_NO_KERNELS is set"
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability {capability} is below 8.0"
        return _why_no_launch(device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"none for {device.type}"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _why_no_launch(device: torch.device) -> str | None:
    """Triton needs a C compiler and Python's headers where it runs, and a driver that it knows."""
    try:
        from quantize.kernels.triton_launch import try_launch

        with torch.cuda.device(device):
            try_launch(device)
    except Exception as error:
        return f"Triton fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


class CudaLinear(nn.Module):
    """y = x W^T + b with the parameters of an nn.Linear, shared."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    @staticmethod
    def supports(linear: nn.Linear) -> bool:
        """Whether there are kernels for this weight."""
        weight = linear.weight
        if weight.dtype not in DTYPES or 0 in weight.shape:
            return False
        return why_no_triton(weight.device) is None

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K]."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. A row has the same bits however many there are, up to 16."""
        return fused_linear(x, self)


class CudaQuantizedLinear(nn.Module):
    """y = x W^T + b with a quantized W [N, K] in words (see quantize/kernels/words.py), and no
    second copy of it.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.format, self.in_features = weight.format, weight.num_columns
        self.out_features = weight.shape[-2]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale_dtype = weight.scales.dtype
        packed = pack_words(weight)
        self.register_buffer("values", packed.values, persistent=False)
        self.register_buffer("scales", packed.scales, persistent=False)
        self.register_buffer("zeros", packed.zeros, persistent=False)
        self.register_buffer("order", weight.order, persistent=False)

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    @staticmethod
    def supports(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this weight and activations of this dtype."""
        form = weight.format
        if len(weight.shape) != 2 or 0 in weight.shape or dtype not in DTYPES:
            return False
        if form.group_size is not None and form.group_size < LEAST_GROUP:
            return False
        if form.kind == "fp8" and bool((weight.values.view(torch.uint8) & 127 == 127).any()):
            return False  # NaN, which the kernels do not know
        return why_no_triton(weight.values.device) is None

    @property
    def weight_bytes(self) -> int:
        """Bytes that one multiplication reads."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def canonical(self) -> QuantizedWeight:
        """The stored weight, bit for bit."""
        packed = PackedWords(self.values, self.scales, self.zeros)
        size = (self.out_features, self.in_features)
        return unpack_words(self.format, packed, *size, self.order, self.scale_dtype)

    @property
    def quantized(self) -> QuantizedWeight:
        """As `canonical`."""
        return self.canonical()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain weight [N, K]."""
        return self.canonical().dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {[self.out_features, self.in_features]} packed"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. A row has the same bits however many there are, up to 16."""
        return fused_linear(x, self)


def fused_linear(
    x: Tensor,
    linear: nn.Module,
    *,
    norm: NormSpec | None = None,
    residual: Tensor | None = None,
    multiplier: float = 1.0,
    gate: str | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + multiplier * f(W norm(x) + b) for x [..., K] and W [N, K] of a CudaLinear,
    CudaQuantizedLinear or nn.Linear.

    f is `activation`; or with `gate`, gate(first half of the N) * second half, and the result has
    N / 2 columns. Sums, activation and residual are in float32 and rounded once. `out`: where the
    result goes (it may be `residual`, and not x). ValueError where parts do not fit together.
    """
    if gate is not None and activation is not None:
        raise ValueError("gate and activation exclude each other; give one of them")
    kind = "" if norm is None else _kind_of(norm)
    scales = zeros = None
    format = ""
    if isinstance(linear, CudaQuantizedLinear):
        weight, scales, zeros, form = linear.values, linear.scales, linear.zeros, linear.format
        format = form.name
        if form.dynamic or linear.order is not None:
            if norm is not None:
                x, norm = normed(x, kind, norm.weight, norm.bias, norm.eps), None
            x = x if linear.order is None else x.index_select(-1, linear.order)
            x = round_activations(x) if form.dynamic else x
    elif isinstance(linear, CudaLinear | nn.Linear):
        weight = linear.weight
    else:
        raise ValueError(
            f"{type(linear).__name__} has no kernel for CUDA; pack_linears makes modules that do"
        )
    arguments = Call(
        x=x,
        weight=weight,
        scales=scales,
        zeros=zeros,
        bias=linear.bias,
        norm=kind,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        eps=0.0 if norm is None else norm.eps,
        residual=residual,
        multiplier=multiplier,
        activation=gate or activation or "",
        gated=gate is not None,
        out_features=linear.out_features,
        format=format,
    )
    _check(arguments, linear.in_features, out)
    if out is None:
        return torch.ops.quantize.triton_linear.default(*arguments)
    torch.ops.quantize.triton_linear_out.default(*arguments, out)
    return out


def _kind_of(norm: NormSpec) -> str:
    return "layer" if norm.is_layer else "rms_offset" if norm.offset else "rms"


def _check(call: Call, num_columns: int, out: Tensor | None) -> None:
    x = call.x
    if call.activation not in ACTIVATIONS:
        known = ", ".join(filter(None, ACTIVATIONS))
        raise ValueError(f"activation {call.activation!r} is unknown; use one of: {known}")
    if x.size(-1) != num_columns:  # packed words are padded and would not notice
        raise ValueError(f"x has {x.size(-1)} columns; the weight has {num_columns}")
    if not call.format and call.weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {call.weight.dtype}; one dtype is needed")
    if call.gated and call.out_features % 2:
        raise ValueError(f"gates and ups are halves of {call.out_features} rows; make them even")
    for name, tensor in (("residual", call.residual), ("out", out)):
        if tensor is not None and tensor.shape != call.out_shape:
            found, needed = list(tensor.shape), list(call.out_shape)
            raise ValueError(f"{name} has shape {found}; {needed} is needed")


ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, str norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? residual, float multiplier, "
    "str activation, bool gated, SymInt out_features, str format"
)
torch.library.define("quantize::triton_linear", f"({ARGUMENTS}) -> Tensor")
torch.library.define("quantize::triton_linear_out", f"({ARGUMENTS}, Tensor(a!) out) -> ()")


def triton_linear_reference(call: Call) -> Tensor:
    """The meaning of `triton_linear`."""
    x = call.x
    if call.norm_weight is not None:
        x = normed(x, call.norm, call.norm_weight, call.norm_bias, call.eps)
    y = F.linear(x, plain_weight(call), call.bias)
    if call.gated:
        first, second = y.chunk(2, dim=-1)
        y = ACTIVATIONS[call.activation](first) * second
    else:
        y = ACTIVATIONS[call.activation](y)
    return y if call.residual is None else call.residual + call.multiplier * y


def plain_weight(call: Call) -> Tensor:
    """The weight [N, K] in the dtype of x."""
    if call.scales is None:
        return call.weight
    form, packed = Format.parse(call.format), PackedWords(call.weight, call.scales, call.zeros)
    size, dtype = (call.out_features, call.x.size(-1)), call.x.dtype
    if why_no_triton(call.x.device) is not None:
        return unpack_words(form, packed, *size).dequantize(dtype)
    from quantize.kernels.triton_launch import dequantized  # only where triton is installed

    with torch.cuda.device_of(call.x):
        return dequantized(form, packed, *size, dtype)


def normed(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., K] under a norm: `kind` is layer, rms or rms_offset."""
    if kind == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind == "rms_offset":
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * weight


def _by_kernel(call: Call, out: Tensor) -> bool:
    """Whether kernels have computed `out`."""
    num_rows = call.x.numel() // call.x.size(-1)
    if not 0 < num_rows <= MAX_ROWS or why_no_triton(call.x.device) is not None:
        return False
    if not out.is_contiguous() or not call.weight.is_contiguous():
        return False
    from quantize.kernels.triton_launch import launch  # only where triton is installed

    with torch.cuda.device_of(out):  # Triton launches on the current device
        launch(call, out)
    return True


def _triton_linear(*arguments: Any) -> Tensor:
    call = Call(*arguments)
    out = call.result()
    return out if _by_kernel(call, out) else triton_linear_reference(call)


def _triton_linear_out(*arguments: Any) -> None:
    *rest, out = arguments
    call = Call(*rest)
    if not _by_kernel(call, out):
        out.copy_(triton_linear_reference(call))


torch.library.impl("quantize::triton_linear", "default", _triton_linear)
torch.library.impl("quantize::triton_linear_out", "default", _triton_linear_out)


@torch.library.register_fake("quantize::triton_linear")
def _(*arguments: Any) -> Tensor:
    return Call(*arguments).result()


@torch.library.register_fake("quantize::triton_linear_out")
def _(*arguments: Any) -> None:
    return None
