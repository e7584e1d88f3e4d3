"""A calibrated quantization from folder to folder: one block in memory at a time, finished blocks
kept where a later run finds them.

They stand in a hidden folder beside the new one, with a record of what they were made from: a run
with the same settings goes on behind the last of them and ends with the same bits; one with others
begins anew.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from gptfast.calibrated import (
    Method,
    Note,
    Weights,
    of_block,
    put_numbers,
    quantize_ends,
    statistics_bytes,
)
from gptfast.checkpoint import Checkpoint, Progress, check_tied_head, empty_model, inspect
from gptfast.convert import convert, own_config, write_checkpoint
from gptfast.device import check_fits, format_bytes, parse_dtype
from gptfast.loading import check_plan, read_parameters
from gptfast.new_folder import check_places, check_space, companions, new_folder
from gptfast.quantization import QuantPlan, put
from gptfast.shards import Stored
from gptfast.stored import order_name, quantization_config, read_weight, tensors_of
from gptfast.tensor_files import DTYPES, TensorFiles, read_json
from gptfast.walk import Walk
from quantize.formats import Format

VERSION = 1  # of what finished blocks mean
RECORD = "run.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Quantized:
    """What was written. `num_bytes` of its weights, `num_bytes_before` in the same dtype, plain."""

    folder: Path
    num_parameters: int
    num_bytes: int
    num_bytes_before: int
    dtype: torch.dtype


def quantize_checkpoint(
    source: Path,
    out: Path,
    plan: QuantPlan,
    method: Method | None = None,
    ids: Tensor | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    note: Note = lambda line: None,
    progress: Progress = iter,
) -> Quantized:
    """Writes the model of `source`, quantized, into the new folder `out`.

    `method` None rounds each weight by itself, others look at the sequences `ids` [S, T] too.
    `progress` may wrap the sequence of blocks (of parameters, where there is no method). ValueError
    says in one line what is in the way; `out` is then as it was.
    """
    out = Path(os.path.abspath(out))
    check_places(source, out, (), overwrite)
    checkpoint = inspect(source)
    check_plan(checkpoint, plan)
    check_tied_head(checkpoint)
    chosen = parse_dtype(dtype) or checkpoint.dtype
    if method is None:
        num_bytes = convert(
            source, out, dtype=chosen, quant=plan, overwrite=overwrite, progress=progress
        ).num_bytes
    else:
        assert ids is not None
        run = _Run(checkpoint, chosen, plan, method, ids.to(device), note)
        num_bytes = run.quantize(out, overwrite, progress)
    count = checkpoint.config.num_parameters
    return Quantized(out, count, num_bytes, count * chosen.itemsize, chosen)


class _Run:
    """Source and settings of a run."""

    def __init__(
        self,
        source: Checkpoint,
        dtype: torch.dtype,
        plan: QuantPlan,
        method: Method,
        ids: Tensor,
        note: Note,
    ) -> None:
        self.source, self.dtype, self.plan, self.method = source, dtype, plan, method
        self.ids, self.note = ids, note
        self.model = empty_model(source.config)
        self.formats = plan.formats(self.model)
        for form in self.formats.values():
            method.check(form)
        config = source.config
        if ids.size(1) > config.max_seq_len:
            raise ValueError(
                f"samples of {ids.size(1)} tokens do not fit into a context of "
                f"{config.max_seq_len}; give shorter ones"
            )
        if int(ids.max()) >= config.vocab_size:
            raise ValueError(
                f"the calibration text has token {int(ids.max())}, and the model knows "
                f"{config.vocab_size}: tokenizer and model do not belong together"
            )
        statistics = max(
            statistics_bytes(block, of_block(self.formats, layer))
            for layer, block in enumerate(self.model.blocks)
        )
        check_fits(
            ids.numel() * config.dim * dtype.itemsize + statistics,
            ids.device,
            f"{method.name}: hidden states of {ids.numel():,} tokens and, of a block's inputs, "
            f"{format_bytes(statistics)} of sums",
            "use fewer samples, or --method rtn",
        )

    def record(self) -> dict[str, Any]:
        """What finished blocks depend on."""
        folder = self.source.folder
        files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
        config = (folder / "config.json").read_bytes()
        return {
            "version": VERSION,
            "files": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files},
            "config": hashlib.sha256(config).hexdigest(),
            "formats": {name: form.name for name, form in self.formats.items()},
            "method": {"name": self.method.name, **self.method.details},
            "dtype": str(self.dtype),
            "calibration": hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest(),
        }

    def quantize(self, out: Path, overwrite: bool, progress: Progress) -> int:
        """Writes `out` and returns the bytes of its weights."""
        self._check_numbers()
        work = _Work(out, self.record(), len(self.model.blocks), self.note)
        self._fill_work(work, progress)
        files = work.files()
        stored = {
            name: Stored(DTYPES[files.dtype(name)], files.shape(name))
            for name in sorted(files.names)
        }
        num_bytes = sum(entry.num_bytes for entry in stored.values())
        beside = companions(self.source.folder)
        with new_folder(out, overwrite) as folder:
            check_space(out.parent, num_bytes + sum(path.stat().st_size for path in beside))
            tensors = ((name, files.tensor(name)) for name in stored)
            place = self.source.folder
            write_checkpoint(folder, place, beside, self._config(), stored, tensors)
        shutil.rmtree(work.folder)
        return num_bytes

    @torch.no_grad()
    def _fill_work(self, work: "_Work", progress: Progress) -> None:
        """Quantizes all that has not been quantized before."""
        parts = itertools.groupby(self._parameters(), lambda item: _part(item[0]))
        model, layers = self.model, range(len(self.model.blocks))
        self._fill(next(parts)[1])
        model.tie_head()
        model.ropes.to(self.ids.device)
        walk = Walk(model, self.ids)
        for layer in progress(layers):
            part, parameters = next(parts)
            assert part == f"blocks.{layer}"
            block, wanted = model.blocks[layer], of_block(self.formats, layer)
            self._fill(parameters)
            block.to(self.ids.device)
            if work.has(part):
                work.restore(part, block, wanted)
            else:
                found = self.method.quantize(walk, layer, wanted, self.note)
                work.save(part, _tensors(part, block, found))
            walk.advance(layer)
            block.to("meta")
        for _, parameters in parts:
            self._fill(parameters)
        model.tie_head()
        work.save("ends", _tensors("", model, quantize_ends(walk, self.formats, self.method)))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        arguments = (self.source, self.model, self.dtype, self.ids.device)
        for name, tensor in read_parameters(*arguments):
            assert isinstance(tensor, Tensor)
            yield name, tensor

    def _check_numbers(self) -> None:
        """Of all parameters, before hours of work."""
        for name, tensor in self._parameters():
            if not tensor.isfinite().all():
                dtype = str(self.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{self.source.folder.name}: {name} has NaN or infinite numbers, or some that "
                    f"{dtype} cannot hold, so it cannot be quantized"
                )

    def _fill(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in parameters:
            put(self.model, name, nn.Parameter(tensor, requires_grad=False))

    def _config(self) -> dict[str, Any]:
        raw = read_json(self.source.folder / "config.json")
        config = own_config(self.source, raw, self.dtype)
        details = {
            **self.method.details,
            "calibration_samples": self.ids.size(0),
            "calibration_tokens": self.ids.numel(),
        }
        config["quantization_config"] = quantization_config(self.formats, self.method.name, details)
        return config


def _part(name: str) -> str:
    """The block of a parameter, "" for those before and "end" for those behind the blocks."""
    if name.startswith("blocks."):
        return name.rsplit(".", name.count(".") - 1)[0]
    return "end" if name.startswith(("norm.", "head.")) else ""


def _tensors(prefix: str, module: nn.Module, found: Weights) -> dict[str, Tensor]:
    """What is stored of a block, or of what is beside the blocks: the plain parameters (those on
    the meta device belong to others), and the quantized weights in place of theirs.
    """
    start = f"{prefix}." if prefix else ""
    stored = {
        start + name: parameter.detach()
        for name, parameter in module.named_parameters()
        if name.removesuffix(".weight") not in found and not parameter.is_meta
    }
    for name, weight in found.items():
        stored |= tensors_of(start + name, weight)
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


class _Work:
    """The hidden folder of finished blocks."""

    def __init__(self, out: Path, record: Mapping[str, Any], num_blocks: int, note: Note) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.quantizing"
        if self.folder.exists():
            if _recorded(self.folder) == record:
                done = len(list(self.folder.glob("blocks.*.safetensors")))
                note(f"Going on with an earlier run: {done} of {num_blocks} blocks are done")
                return
            note("An earlier run had other settings, or another source: beginning anew")
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be made ({error.strerror})") from None
        (self.folder / RECORD).write_text(json.dumps(record, indent=2))

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def has(self, part: str) -> bool:
        """Whether it is finished; what cannot be read any more is made again."""
        path = self._path(part)
        try:
            return path.exists() and bool(TensorFiles(self.folder, [path]).names)
        except ValueError:
            path.unlink()
            return False

    def save(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Under its name once it is complete."""
        partial = self.folder / "partial"
        try:
            with partial.open("wb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._path(part))
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ValueError(
                f"{error.strerror} in {self.out.parent}; make space and quantize again: finished "
                f"blocks are kept ({self.out} is as it was)"
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def restore(self, part: str, block: nn.Module, formats: Mapping[str, Format]) -> None:
        """Gives a block the numbers that `save` was given."""
        files = TensorFiles(self.folder, [self._path(part)])
        for name, parameter in block.named_parameters():
            module = name.removesuffix(".weight")
            if module in formats:
                own = f"{part}.{module}"
                has_order = order_name(own) in files.names
                columns = parameter.size(-1)
                weight = read_weight(own, formats[module], columns, has_order, files.tensor)
                put_numbers(block.get_submodule(module), weight)
            else:
                parameter.copy_(files.tensor(f"{part}.{name}"))

    def files(self) -> TensorFiles:
        return TensorFiles(self.folder, sorted(self.folder.glob("*.safetensors")))


def _recorded(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
