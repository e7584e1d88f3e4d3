"""How a quantized weight is stored under our own names: `quantization_config` in config.json says
which modules are quantized and in which format, and a module's tensors stand beside each other as
`weight` (the integers), `scales`, and where there are any `zeros` and `order`.

Knows names and formats; knows no files and no model.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptfast.sharding import WHOLE, Shard
from gptfast.shards import Stored
from gptfast.tensor_files import Read, taken
from quantize.formats import Format, QuantizedWeight

QUANT_METHOD = "gptfast"
PARTS = {"values": "weight", "scales": "scales", "zeros": "zeros", "order": "order"}


def quantization_config(
    formats: Mapping[str, Format], method: str, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What config.json says of a model whose modules have these formats. `method` is how the
    numbers were found; `details` are for people.
    """
    modules: dict[str, list[str]] = {}
    for module, form in formats.items():
        modules.setdefault(form.name, []).append(module)
    body = max(modules, key=lambda name: len(modules[name]))
    return {
        "quant_method": QUANT_METHOD,
        "method": method,
        "bits": Format.parse(body).bits,
        "group_size": Format.parse(body).group_size,
        **(details or {}),
        "modules": modules,
    }


def read_formats(settings: Mapping[str, Any]) -> dict[str, Format]:
    """Module -> format, of a `quantization_config` of ours; ValueError where it is damaged."""
    modules = settings.get("modules")
    if not isinstance(modules, Mapping) or not modules:
        raise ValueError("config.json: quantization_config has no modules; quantize again")
    formats: dict[str, Format] = {}
    for name, members in modules.items():
        if not isinstance(members, list) or not all(isinstance(m, str) for m in members):
            raise ValueError(
                f"config.json: quantization_config has {members!r} where modules in {name} are "
                "named"
            )
        if twice := sorted(formats.keys() & set(members)):
            raise ValueError(f"config.json: quantization_config names {twice[0]} twice")
        formats |= dict.fromkeys(members, Format.parse(name))
    return formats


def part_names(module: str, form: Format) -> list[str]:
    """The tensors that a module of this format has in any case."""
    parts = ["values", "scales"] + ["zeros"] * form.has_zeros
    return [f"{module}.{PARTS[part]}" for part in parts]


def order_name(module: str) -> str:
    """The tensor that a module may have."""
    return f"{module}.{PARTS['order']}"


def part_shapes(
    module: str, form: Format, shape: tuple[int, ...], has_order: bool
) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, for a plain weight of `shape`."""
    *rows, columns = shape
    groups = (*rows, form.num_groups(columns))
    shapes = dict.fromkeys(part_names(module, form), groups)
    shapes[f"{module}.weight"] = (*rows, form.values_width(columns))
    return shapes | ({order_name(module): (columns,)} if has_order else {})


def allowed_dtypes(name: str, form: Format) -> tuple[torch.dtype, ...]:
    """Of a tensor that belongs to a module of this format."""
    part = name.rpartition(".")[2]
    if part == "weight":
        return (form.values_dtype,)
    if part == "order":
        return (torch.int64,)
    if form.kind == "mxfp4":
        return (torch.uint8,)
    return (torch.bfloat16, torch.float16, torch.float32)


def stored_parts(module: str, form: Format, shape: tuple[int, ...]) -> dict[str, Stored]:
    """The tensors that quantizing a plain weight of `shape` makes."""
    shapes = part_shapes(module, form, shape, has_order=False)
    dtypes = {f"{module}.weight": form.values_dtype}
    return {n: Stored(dtypes.get(n, form.scale_dtype), shape) for n, shape in shapes.items()}


def read_weight(
    module: str, form: Format, num_columns: int, has_order: bool, tensor: Callable[[str], Tensor]
) -> QuantizedWeight:
    """The weight of a module; ValueError for numbers that no quantizer writes."""
    values, scales, *zeros = (tensor(name) for name in part_names(module, form))
    order = tensor(order_name(module)) if has_order else None
    for part, numbers in (("scales", scales), ("zeros", zeros[0] if zeros else None)):
        if numbers is not None and numbers.is_floating_point() and not numbers.isfinite().all():
            raise ValueError(f"{module}.{part} has numbers that are not finite: it is damaged")
    if order is not None and not torch.equal(order.sort().values, torch.arange(num_columns)):
        raise ValueError(f"{module}.order is no order of {num_columns} columns: it is damaged")
    return QuantizedWeight(
        form, num_columns, values, scales, zeros[0] if zeros else None, order
    ).check()


def parts_reader(read: Read, form: Format, num_dims: int, shard: Shard) -> Callable[[str], Tensor]:
    """For `read_weight`: the shard of the tensors of a weight of that many dimensions, whose
    columns are whole groups.
    """

    def tensor(name: str) -> Tensor:
        part = name.rpartition(".")[2]
        held = shard
        if part == PARTS["order"]:
            held = WHOLE
        elif part == PARTS["values"]:
            held = shard.in_groups(2 if form.in_nibbles else 1)
        elif form.group_size is not None:
            held = shard.in_groups(form.group_size)
        else:
            held = replace(shard, columns=None)
        pieces = [taken(read, name, index) for index in held.indices(num_dims)]
        return (torch.cat(pieces, dim=-2) if len(pieces) > 1 else pieces[0]).contiguous()

    return tensor


def tensors_of(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What `read_weight` reads."""
    return {f"{module}.{PARTS[part]}": tensor for part, tensor in weight.tensors.items()}
