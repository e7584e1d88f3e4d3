"""From weights as they are stored to weights as a device multiplies by them fastest, module by
module. Which module that is stands in one place, `_packed`.
"""

import torch
from torch import nn

from quantize.grouped import GroupedLinear, PackedGroupedLinear
from quantize.kernels.build import LINEAR, kernels_wanted
from quantize.kernels.cpu import PackedQuantizedGroupedLinear, PackedQuantizedLinear
from quantize.kernels.cuda import CudaLinear, CudaQuantizedLinear, why_no_triton
from quantize.linear import QuantizedGroupedLinear, QuantizedLinear
from quantize.packed import PackedLinear


def pack_linears(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Exchanges, one after the other and in place, the linears that have a faster form. `dtype` is
    that of activations.

    A weight that another module shares (a tied head) stays as it is: packing would keep it twice.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    # Names, not modules: holding on to the plain weights would keep all of them twice.
    kinds = (nn.Linear, GroupedLinear, QuantizedLinear, QuantizedGroupedLinear)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and owners[id(module.weight)] == 1
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        packed = _packed(owner.get_submodule(leaf), dtype)
        if packed is not None:
            setattr(owner, leaf, packed)


def _packed(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """The faster form of a linear on its device; None where it stays."""
    on_cuda = module.weight.device.type == "cuda" and kernels_wanted()
    if on_cuda and (found := _packed_for_cuda(module, dtype)):
        return found
    if isinstance(module, QuantizedLinear | QuantizedGroupedLinear):
        if module.format.kind == "fp8" and not runs_fp8(module.weight.device):
            plain = _dequantized(module, dtype)
            return _packed(plain, dtype) or plain
        return _packed_quantized(module, dtype)
    assert isinstance(module, nn.Linear | GroupedLinear)
    if module.weight.device.type != "cpu" or module.weight.dtype != torch.bfloat16 or not _packs():
        return None
    return PackedLinear(module) if isinstance(module, nn.Linear) else PackedGroupedLinear(module)


def _packed_for_cuda(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    if isinstance(module, QuantizedLinear):
        weight = module.quantized
        supports = CudaQuantizedLinear.supports(weight, dtype)
        return CudaQuantizedLinear(weight, module.bias) if supports else None
    if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32:
        return CudaLinear(module) if CudaLinear.supports(module) else None
    return None


def _packed_quantized(
    module: QuantizedLinear | QuantizedGroupedLinear, dtype: torch.dtype
) -> nn.Module | None:
    weight = module.quantized
    kind: type[PackedQuantizedLinear] | type[PackedQuantizedGroupedLinear]
    is_single = isinstance(module, QuantizedLinear)
    kind = PackedQuantizedLinear if is_single else PackedQuantizedGroupedLinear
    on_cpu = module.weight.device.type == "cpu"
    if not on_cpu or not kind.supports(weight.format, weight.shape, dtype):
        return None
    return kind(weight, module.bias)


def _packs() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def runs_fp8(device: torch.device) -> bool:
    """Whether a device multiplies by 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _dequantized(module: QuantizedLinear | QuantizedGroupedLinear, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        *experts, rows, columns = module.quantized.shape
        has_bias = module.bias is not None
        plain: nn.Linear | GroupedLinear
        if experts:
            plain = GroupedLinear(experts[0], columns, rows, has_bias)
        else:
            plain = nn.Linear(columns, rows, bias=has_bias)
    plain.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    plain.bias = None if module.bias is None else nn.Parameter(module.bias, requires_grad=False)
    return plain


def why_no_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why a quantized linear is left as it is stored."""
    if device.type != "cpu":
        return why_no_triton(device) or "none for such a layer"
    return LINEAR.why_not() or f"none for activations in {str(dtype).removeprefix('torch.')}"
