"""Which linears of a model the CPU reads faster packed, and their exchange."""

import torch
from torch import nn

from quantize.formats import PackedLinear
from quantize.grouped import GroupedLinear, PackedGroupedLinear


def pack_linears(model: nn.Module) -> None:
    """Packs, one after the other and in place, the linears whose own weight the CPU reads faster
    packed.

    A weight that another module shares (a tied head) stays as it is: packing would keep it twice.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    # Names, not modules: holding on to the plain weights would keep all of them twice.
    packable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | GroupedLinear)
        and owners[id(module.weight)] == 1
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    ]
    for name in packable:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        linear = owner.get_submodule(leaf)
        if isinstance(linear, GroupedLinear):
            setattr(owner, leaf, PackedGroupedLinear(linear))
        else:
            assert isinstance(linear, nn.Linear)
            setattr(owner, leaf, PackedLinear(linear))
