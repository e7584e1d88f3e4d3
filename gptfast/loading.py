"""A checked checkpoint in, a Transformer out. Our parameters pull their tensors; files do not push.

Each parameter is allocated once, in its final dtype and place, and filled from the mapped file, so
the peak is the weights themselves: of what is quantized while it is read, the quantized ones.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptfast.checkpoint import Checkpoint, Progress, check_tied_head, empty_model, inspect
from gptfast.config import ModelConfig
from gptfast.device import check_fits, parse_dtype
from gptfast.model import Transformer, keeps_float32
from gptfast.quantization import PLAIN, QuantPlan, fill, rounded
from gptfast.quantized_files import QuantizedFiles
from gptfast.stored import order_name, read_weight
from gptfast.tensor_files import DTYPES, TensorFiles
from quantize.formats import Format, QuantizedWeight
from quantize.packing import pack_linears, runs_fp8


def load(
    checkpoint: Path | Checkpoint,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = iter,
    quant: QuantPlan | str | None = None,
) -> Transformer:
    """The model of a folder, or of one that has been inspected, in `dtype` ("auto": what
    config.json says, else that of the file).

    With a plan its linears are quantized one after the other while they are read: the plain model
    is never in memory as a whole. What is stored quantized stays so, unless `quant` is "none".
    `progress` may wrap the sequence of parameters (tqdm does). ValueError as `inspect`; MemoryError
    says how much was needed.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else inspect(checkpoint)
    device, chosen = torch.device(device), parse_dtype(dtype) or source.dtype
    model, to_make = _empty(source, quant)
    keep = quant != PLAIN
    formats = to_make or (source.formats if keep else {})
    check_fits(
        weight_bytes(source, chosen, device, quant)
        + _num_packed_at_once(source.config, formats, device, chosen),
        device,
        f"{source.folder.name}: {source.config.num_parameters:,} weights in {chosen}",
        "use a smaller dtype or model",
    )
    check_tied_head(source)
    fill(model, read_weights(source, model, to_make, chosen, device, progress, keep), chosen)
    if "head" not in source.formats:
        model.tie_head()
    pack_linears(model, chosen)
    return model.to(device).eval()


def check_plan(source: Checkpoint, quant: QuantPlan | str | None) -> QuantPlan | None:
    """The plan, if there is one that can be carried out; ValueError where the weights are quantized
    already.
    """
    if quant is None or quant == PLAIN:
        return None
    if not isinstance(quant, QuantPlan):
        raise ValueError(
            f'quant is {quant!r}; a QuantPlan (see quant_plan), "none" or None is needed'
        )
    if source.is_quantized:
        raise ValueError(
            f"{source.folder.name} is quantized already ({source.quantized_as}): use it as it is, "
            "or make it plain first with gptfast convert --to hf"
        )
    return quant


def read_weights(
    source: Checkpoint,
    model: Transformer,
    formats: Mapping[str, Format],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = iter,
    keep: bool = True,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """As `read_parameters`, the plain weights of the modules `formats` rounded to them. A tied head
    among these comes before the embedding.
    """
    weights = read_parameters(source, model, dtype, device, progress, keep)
    return rounded(weights, formats, source.config.tied_head, where=f"{source.folder.name}: ")


def weight_bytes(
    source: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quant: QuantPlan | str | None = None,
) -> int:
    """Bytes of the weights that `load` would make; errors as `load`."""
    model, to_make = _empty(source, quant)
    formats = to_make or (source.formats if quant != PLAIN else {})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if "head" in formats:
        shapes.setdefault("head.weight", model.embed.weight.shape)
    size = 0.0
    for name, shape in shapes.items():
        form = formats.get(name.removesuffix(".weight"))
        # An embedding is looked up, on any device.
        is_linear = name != "embed.weight"
        is_plain = form is None or (form.kind == "fp8" and is_linear and not runs_fp8(device))
        each = dtype.itemsize if form is None or is_plain else form.bytes_per_weight(shape[-1])
        size += shape.numel() * each
    return math.ceil(size)


def _empty(
    source: Checkpoint, quant: QuantPlan | str | None
) -> tuple[Transformer, dict[str, Format]]:
    """The model to fill, and the formats that its modules are to be rounded to."""
    plan = check_plan(source, quant)
    model = empty_model(source.config, source.formats if source.is_own else ())
    return model, {} if plan is None else plan.formats(model)


def _num_packed_at_once(
    config: ModelConfig, formats: Mapping[str, Format], device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes that stand in memory twice while a layer's experts are packed for the CPU."""
    experts = config.experts
    if experts is None or device.type != "cpu":
        return 0
    form = next((f for name, f in formats.items() if name.endswith(".expert_gate_up")), None)
    each = dtype.itemsize if form is None else form.bytes_per_weight(config.dim)
    return math.ceil(experts.num_experts * 2 * experts.hidden_dim * config.dim * each)


def read_parameters(
    source: Checkpoint,
    model: Transformer,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = iter,
    keep: bool = True,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Our parameters by name, each read when it is asked for: plain in `dtype`, or as they are
    stored where `source.formats` says so, unless `keep` is off. `model` may be on the meta device.

    Where files of our own names have a parameter as it is needed, it is the file's own pages: 1.1 B
    float32 weights load in 0.05 s instead of 0.9, and decode as fast. Other files might be
    overwritten in place while they are in use; these are only ever replaced.
    """
    files = source.tensors
    for name, parameter in progress(list(model.named_parameters())):
        shape = tuple(parameter.shape)
        module = name.removesuffix(".weight")
        kept = torch.float32 if keeps_float32(name) else dtype
        if module in source.formats and (keep or source.is_own):
            stored = read_stored(source, module, shape)
            if stored is not None:
                stored = stored.to(device)
                yield name, stored if keep else stored.dequantize(kept)
                continue
        if source.is_own and isinstance(files, TensorFiles) and device.type == "cpu":
            [own] = source.sources[name].names
            if DTYPES.get(files.dtype(own)) == kept:
                yield name, files.mapped(own)
                continue
        tensor = torch.empty(shape, dtype=kept, device=device)
        with source.tensors.reader() as read:
            source.sources[name].read(tensor, source.config, read)
        yield name, tensor


def read_stored(source: Checkpoint, module: str, shape: tuple[int, ...]) -> QuantizedWeight | None:
    """A weight as it is stored; None where its parts turn out to have no form in common."""
    files, place = source.tensors, source.sources[f"{module}.weight"]
    if isinstance(files, QuantizedFiles) and not place.mxfp4:
        with files.quantized_reader() as quantized:
            return place.read_quantized(shape, source.config, quantized)
    with files.reader() as read:
        if place.mxfp4:
            return place.read_mxfp4(source.config, read)
        form, has_order = source.formats[module], order_name(module) in files.names
        try:
            return read_weight(module, form, shape[-1], has_order, read)
        except ValueError as error:
            raise ValueError(f"{source.folder}: {error}") from None
