"""Models that every rank of a group loads or makes, each its share, when rank 0 does."""

from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast.checkpoint import Checkpoint, Progress, inspect
from gptfast.device import DTYPES, parse_dtype
from gptfast.families import model_config
from gptfast.kernels.symmetric import choose_all_reduce
from gptfast.loading import check_memory, load
from gptfast.model import Transformer
from gptfast.parallel import Group
from gptfast.quantization import QuantPlan
from gptfast.shapes import random_model, shape_config
from gptfast.together import together

# What JSON holds of a QuantPlan.
Written = str | Sequence[str | None] | None


def load_model(
    group: Group,
    source: Checkpoint,
    dtype: str | torch.dtype,
    device: torch.device,
    progress: Progress = iter,
    quant: QuantPlan | str | None = None,
) -> Transformer:
    """As `loading.load`; of several ranks each holds its share. ValueError where the model cannot
    be cut into so many. All hosts need the folder at the same place.
    """
    what = (str(source.folder), _name(dtype), str(device), _written(quant))
    if not group.is_alone:
        _check(group, *what, source=source)
    return _load(group, *what, torch.get_num_threads(), source=source, progress=progress)


def random_shape(
    group: Group,
    shape: str,
    num_layers: int | None,
    dtype: torch.dtype,
    device: torch.device,
    quant: QuantPlan | str | None = None,
) -> Transformer:
    """As `shapes.random_model` of a named shape; of several ranks each makes a share."""
    how = (_name(dtype), str(device), _written(quant), torch.get_num_threads())
    return _make_random(group, shape, num_layers, *how)


@together
def _check(
    group: Group,
    folder: str,
    dtype: str,
    device: str,
    quant: Written,
    source: Checkpoint | None = None,
) -> None:
    """Before any rank takes memory, which those of a host share on a CPU."""
    own = group.device(torch.device(device))
    source = _inspected(folder) if source is None else source
    check_memory(source, parse_dtype(dtype) or source.dtype, own, _read(quant), group)


@together
def _load(
    group: Group,
    folder: str,
    dtype: str,
    device: str,
    quant: Written,
    num_threads: int,
    source: Checkpoint | None = None,
    progress: Progress = iter,
) -> Transformer:
    own = group.device(torch.device(device))
    torch.set_num_threads(num_threads)
    source = _inspected(folder) if source is None else source
    return load(source, dtype, own, progress, _read(quant), group)


@together
def _make_random(
    group: Group,
    shape: str,
    num_layers: int | None,
    dtype: str,
    device: str,
    quant: Written,
    num_threads: int,
) -> Transformer:
    own, plan = group.device(torch.device(device)), _read(quant)
    torch.set_num_threads(num_threads)
    config = model_config(shape_config(shape, num_layers))
    plan = plan if isinstance(plan, QuantPlan) else None
    return random_model(config, DTYPES[dtype], own, quant=plan, group=group)


@together
def choose_sums(group: Group, model: Transformer) -> str:
    """Lets GPUs measure how they add up fastest (kernels/symmetric.py). Returns what they have
    found, for people, "" where there is no choice.
    """
    if group.is_alone or group.staged or model.device.type != "cuda":
        return ""
    return choose_all_reduce(group, model.config.dim, model.dtype, model.device)


def _inspected(folder: str) -> Checkpoint:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not there; every host needs the model at the same place")
    return inspect(Path(folder))


def _name(dtype: str | torch.dtype) -> str:
    return dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")


def _written(quant: QuantPlan | str | None) -> Written:
    return quant.names if isinstance(quant, QuantPlan) else quant


def _read(quant: Written) -> QuantPlan | str | None:
    return quant if quant is None or isinstance(quant, str) else QuantPlan.of_names(quant)
