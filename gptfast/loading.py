"""A checked checkpoint in, a Transformer out. Our parameters pull their tensors; files do not push.

Each parameter is read from the mapped file, brought into its final dtype, place and layout, and let
go, some at the same time. So the peak is the weights themselves (of what is quantized while it is
read, the quantized ones) and one tensor for each thread.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptfast.checkpoint import Checkpoint, Progress, check_tied_head, empty_model, inspect
from gptfast.device import check_fits, free_memory, parse_dtype
from gptfast.model import Transformer, keeps_float32
from gptfast.parallel import ALONE, Group
from gptfast.quantization import PLAIN, QuantPlan, fill, put, rounded
from gptfast.quantized_files import QuantizedFiles
from gptfast.sharding import WHOLE, Shard, check_groups, possible_sizes, shard_of
from gptfast.stored import order_name, parts_reader, read_weight
from gptfast.tensor_files import DTYPES, TensorFiles, read_ahead
from quantize.formats import Format, QuantizedWeight
from quantize.grouped import GroupedLinear
from quantize.linear import QuantizedGroupedLinear, QuantizedLinear
from quantize.packing import pack_linears, runs_fp8

MAX_WORKERS = 4
WORKERS_BYTES = 256 << 20  # of tensors that are under way at the same time


def load(
    checkpoint: Path | Checkpoint,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = iter,
    quant: QuantPlan | str | None = None,
    group: Group = ALONE,
) -> Transformer:
    """The model of a folder, or of one that has been inspected, in `dtype` ("auto": what
    config.json says, else that of the file).

    In a group of several ranks, this rank's share of it (see sharding.py): no more than that is
    read, and what is to be quantized is cut first. So a format with one scale for a row has one for
    a row and rank, where columns are shared; groups that no cut parts are those of one process.

    With a plan its linears are quantized one after the other while they are read: the plain model
    is never in memory as a whole. What is stored quantized stays so, unless `quant` is "none".
    `progress` may wrap the sequence of parameters' names (tqdm does). ValueError as `inspect`;
    MemoryError says how much was needed; several ranks `check_memory` beforehand, all at once.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else inspect(checkpoint)
    device, chosen = torch.device(device), parse_dtype(dtype) or source.dtype
    model, to_make = _empty(source, quant, group)
    keep = quant != PLAIN
    if not group.is_alone:
        _check_shares(source, group, keep)
    else:
        check_memory(source, chosen, device, quant)
    check_tied_head(source, group)
    if isinstance(source.tensors, TensorFiles | QuantizedFiles) and _reads_ahead(group):
        read_ahead(source.folder)
    _fill(_Reading(source, model, to_make, chosen, device, keep, group), progress)
    if "head" not in source.formats:
        model.tie_head()
    pack_linears(model, chosen)  # what reading has left
    return model.to(device).eval()


def check_memory(
    source: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quant: QuantPlan | str | None = None,
    group: Group = ALONE,
) -> None:
    """MemoryError where the weights do not fit, which says how much was needed, and to a group of
    several ranks how many it would take. On a CPU the ranks of a host share its memory: none of
    them may have taken its part yet.
    """
    sharers = group.local_size if device.type == "cpu" else 1

    def needed(group: Group) -> int:
        model, formats = _to_fill(source, quant, group)
        at_once = _num_packed_at_once(model, formats, device, dtype)
        return sharers * (_bytes(model, formats, dtype, device) + at_once)

    num_bytes = needed(group)
    what = f"{source.folder.name}: {source.config.num_parameters:,} weights in {dtype}"
    remedy, free = "use a smaller dtype or model", free_memory(device)
    if not group.is_alone and free is not None and num_bytes > free:
        formats = source.formats if quant != PLAIN else {}
        sizes = possible_sizes(source.config, by_expert=group.by_expert, formats=formats)
        groups = [replace(group, rank=0, size=size) for size in sizes if size > group.size]
        enough = next((each.size for each in groups if needed(each) <= free), None)
        where = f", {sharers} on each host," if sharers > 1 else ""
        what += f" on {group.size} ranks{where}"
        who = f"{enough} ranks{where} would do, or" if enough else "no number of ranks would do;"
        remedy = f"{who} {remedy}"
    check_fits(num_bytes, device, what, remedy)


def _reads_ahead(group: Group) -> bool:
    """Whether this rank asks for all files: once on a host, if all of them are needed there."""
    return group.local_rank == 0 and (group.is_alone or group.local_size == group.size)


def _check_shares(source: Checkpoint, group: Group, keep: bool) -> None:
    """ValueError where ranks cannot read their shares."""
    files = source.tensors
    if not isinstance(files, TensorFiles | QuantizedFiles):
        raise ValueError(
            f"{source.folder}: several ranks read their shares of safetensors only; gptfast "
            "convert writes them"
        )
    if keep:
        ordered = {module for module in source.formats if order_name(module) in files.names}
        try:
            check_groups(source.config, source.formats, group, ordered)
        except ValueError as error:
            raise ValueError(f"{source.folder.name}: {error}") from None


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


class _Scratch(threading.local):
    """Memory of a thread that its weights pass through on their way to another form. New pages for
    each of them would cost more than reading does: 2.0 instead of 1.2 s for 1.1 B bf16 weights.
    """

    def __init__(self) -> None:
        self._memory = torch.tensor([], dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Good until the thread's next call."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(dtype).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Reading:
    """One parameter after the other, from files into the model, by any thread."""

    source: Checkpoint
    model: Transformer
    formats: Mapping[str, Format]
    dtype: torch.dtype
    device: torch.device
    keep: bool
    group: Group = ALONE
    scratch: _Scratch = field(default_factory=_Scratch)

    def num_workers(self) -> int:
        """Threads that this can use. One where rounding needs memory of its own, and where files
        are not known to bear several.
        """
        if self.formats or not isinstance(self.source.tensors, TensorFiles | QuantizedFiles):
            return 1
        through = [w.nbytes for n, w in self.model.named_parameters() if self._passes_through(n)]
        room = WORKERS_BYTES // max(through) if through else MAX_WORKERS
        return max(1, min(MAX_WORKERS, torch.get_num_threads(), room))

    def read(self, name: str) -> None:
        """Reads a parameter, rounds it where asked, and puts it in its place, on a CPU in the form
        that its module has there. A head waits, because it may turn out to be shared.
        """
        shape = tuple(self.model.get_parameter(name).shape)
        scratch = self.scratch if self._passes_through(name) else None
        rest = (self.dtype, self.device, self.keep, scratch, self.group)
        arguments = (self.source, name, shape, *rest)
        weights, tied = [(name, read_parameter(*arguments))], self.source.config.tied_head
        where = f"{self.source.folder.name}: "
        for each, weight in rounded(weights, self.formats, tied, where=where):
            fill(self.model, [(each, weight)], self.dtype)
            is_weight = each.startswith("blocks.") and each.endswith(".weight")
            if is_weight and self.device.type == "cpu":
                self._pack(each.removesuffix(".weight"))
            if scratch is not None and isinstance(weight, Tensor):
                self._keep(each)

    def read_all(self, names: list[str]) -> None:
        for name in names:
            self.read(name)

    def _passes_through(self, name: str) -> bool:
        """Whether a weight will be rounded or packed, as far as one can tell before."""
        if self.device.type != "cpu" or not name.startswith("blocks."):
            return False
        is_packed = bool(self.formats) or self.dtype == torch.bfloat16
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return is_packed and isinstance(owner, nn.Linear | GroupedLinear)

    def _pack(self, name: str) -> None:
        module = self.model.get_submodule(name)
        kinds = (nn.Linear, GroupedLinear, QuantizedLinear, QuantizedGroupedLinear)
        if isinstance(module, kinds):
            alone = nn.ModuleList([module])
            pack_linears(alone, self.dtype)
            put(self.model, name, alone[0])

    def _keep(self, name: str) -> None:
        """Gives a parameter that has stayed as it was memory of its own."""
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(self.model.get_submodule(owner), leaf, None)
        if isinstance(parameter, nn.Parameter) and self.scratch.holds(parameter):
            put(self.model, name, nn.Parameter(parameter.clone(), requires_grad=False))


def _fill(reading: _Reading, progress: Progress) -> None:
    """Reads all parameters, several at a time. Each thread computes alone: together they wait for
    nobody, also where other work (the compiler being imported) takes a core.
    """
    model = reading.model
    names = [name for name, _ in model.named_parameters()]
    num_threads, num_workers = torch.get_num_threads(), reading.num_workers()
    if num_workers == 1:
        for name in progress(names):
            reading.read(name)
        return
    share = num_threads // num_workers
    with ThreadPoolExecutor(num_workers, "load", torch.set_num_threads, (share,)) as pool:
        try:
            # A module's parameters by one thread: packing its weight takes its bias along.
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(name.rpartition(".")[0], []).append(name)
            results = {owner: pool.submit(reading.read_all, each) for owner, each in groups.items()}
            for name in progress(names):
                results[name.rpartition(".")[0]].result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(num_threads)  # new threads of the process would have their share
    places = {name: place for place, name in enumerate(names)}
    model.formats = dict(
        sorted(model.formats.items(), key=lambda entry: places.get(f"{entry[0]}.weight", -1))
    )


def weight_bytes(
    source: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quant: QuantPlan | str | None = None,
    group: Group = ALONE,
) -> int:
    """Bytes of the weights that `load` would make, on this rank; errors as `load`."""
    return _bytes(*_to_fill(source, quant, group), dtype, device)


def _bytes(
    model: Transformer, formats: Mapping[str, Format], dtype: torch.dtype, device: torch.device
) -> int:
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
    source: Checkpoint, quant: QuantPlan | str | None, group: Group
) -> tuple[Transformer, dict[str, Format]]:
    """The model to fill, and the formats that its modules are to be rounded to."""
    plan = check_plan(source, quant)
    try:
        model = empty_model(source.config, source.formats if source.is_own else (), group)
    except ValueError as error:
        raise ValueError(f"{source.folder.name}: {error}") from None
    return model, {} if plan is None else plan.formats(model)


def _to_fill(
    source: Checkpoint, quant: QuantPlan | str | None, group: Group
) -> tuple[Transformer, Mapping[str, Format]]:
    """The model to fill, and the formats that its modules will have."""
    model, to_make = _empty(source, quant, group)
    return model, to_make or (source.formats if quant != PLAIN else {})


def _num_packed_at_once(
    model: Transformer, formats: Mapping[str, Format], device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes that stand in memory twice while a layer's experts are packed for the CPU."""
    if device.type != "cpu":
        return 0
    for name, weight in model.named_parameters():
        if name.endswith(".expert_gate_up.weight"):
            form = formats.get(name.removesuffix(".weight"))
            each = dtype.itemsize if form is None else form.bytes_per_weight(weight.size(-1))
            return math.ceil(weight.numel() * each)
    return 0


def read_parameters(
    source: Checkpoint,
    model: Transformer,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = iter,
    keep: bool = True,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Our parameters by name, each read when it is asked for: see `read_parameter`. `model` may be
    on the meta device.
    """
    for name, parameter in progress(list(model.named_parameters())):
        yield name, read_parameter(source, name, tuple(parameter.shape), dtype, device, keep)


def read_parameter(
    source: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    keep: bool = True,
    scratch: _Scratch | None = None,
    group: Group = ALONE,
) -> Tensor | QuantizedWeight:
    """One of our parameters, or this rank's share of it, of `shape`: plain in `dtype`, or as it is
    stored where `source.formats` says so, unless `keep` is off. What has to be copied lies in
    `scratch`, if that is given.

    Where files of our own names have a parameter as it is needed, it is the file's own pages: 1.1 B
    float32 weights load in 0.05 s instead of 0.9, and decode as fast. Other files might be
    overwritten in place while they are in use; these are only ever replaced.
    """
    files, module = source.tensors, name.removesuffix(".weight")
    kept = torch.float32 if keeps_float32(name) else dtype
    shard = shard_of(name, source.config, group)
    if shard.is_elsewhere:
        return torch.zeros(shape, dtype=kept, device=device)
    if module in source.formats and keep:
        stored = read_stored(source, module, shape, shard)
        if stored is not None:
            return stored.to(device)
    elif module in source.formats and source.is_own:
        return _stored_as_plain(source, module, shape, kept, device, group)
    if source.is_own and isinstance(files, TensorFiles) and device.type == "cpu":
        [own] = source.sources[name].names
        block = shard.block(len(shape))
        if DTYPES.get(files.dtype(own)) == kept and (shard == WHOLE or block is not None):
            return files.mapped(own, block)
    if scratch is None:
        tensor = torch.empty(shape, dtype=kept, device=device)
    else:
        tensor = scratch.empty(shape, kept)
    with files.reader() as read:
        source.sources[name].read(tensor, source.config, read, shard)
    return tensor


def read_stored(
    source: Checkpoint, module: str, shape: tuple[int, ...], shard: Shard = WHOLE
) -> QuantizedWeight | None:
    """A weight, or the shard of `shape` of one, as it is stored; None where its parts turn out to
    have no form in common.
    """
    files, place = source.tensors, source.sources[f"{module}.weight"]
    if isinstance(files, QuantizedFiles) and not place.mxfp4:
        with files.quantized_reader() as quantized:
            return place.read_quantized(shape, source.config, quantized, shard)
    with files.reader() as read:
        if place.mxfp4:
            return place.read_mxfp4(source.config, read, shard)
        form, has_order = source.formats[module], order_name(module) in files.names
        tensor = parts_reader(read, form, len(shape), shard)
        try:
            return read_weight(module, form, shape[-1], has_order, tensor)
        except ValueError as error:
            raise ValueError(f"{source.folder}: {error}") from None


def _stored_as_plain(
    source: Checkpoint,
    module: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
) -> Tensor:
    """The numbers of a weight that is stored under our names, or of this rank's share of it, of
    `shape`. Columns are cut when they are plain: then they can be cut anywhere.
    """
    shard = shard_of(f"{module}.weight", source.config, group)
    columns = shard.columns
    if columns is not None:
        shape = (*shape[:-1], shape[-1] * group.size)
    stored = read_stored(source, module, shape, replace(shard, columns=None))
    assert stored is not None
    plain = stored.to(device).dequantize(dtype)
    return plain if columns is None else plain[..., columns.start : columns.stop].contiguous()
