"""How the kernels of triton_linear.py are launched: from triton_configs.json where somebody has
timed the candidates on that device (bench/tune.py), else from a few rules.

A configuration decides the order of sums, so it depends on the device and the weight alone: a row
has the same bits whatever number of rows stands beside it.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

PLAIN = ("bfloat16", "float16", "float32")
MULTIPROCESSORS = 128  # about as many as H100 and H200 have; a power of two, as rows are
RESERVED_BYTES = 8 << 10  # of shared memory, for what is neither weights nor x
FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class LinearConfig:
    """`rows` of a weight and `slices` (warps, which split the columns) make a program; `splits`
    programs share the columns of the same rows. `block` columns (of a plain weight) a warp reads
    at once, `stages` such reads are under way. `norm_inside`: a norm is a part of the linear's
    kernel, not one of its own before it. `pad`: rows of x that are multiplied at least (a tensor
    core's product has 8). `pdl`: its programs are set up while the kernel in front still runs
    (Hopper and newer).
    """

    rows: int
    slices: int
    splits: int
    block: int
    stages: int
    norm_inside: bool = True
    pad: int = 8
    pdl: bool = False

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """What configurations depend on: shared memory for one program at most, in bytes."""

    name: str
    multiprocessors: int
    shared_bytes: int


def linear_config(device: str, form: str, num_rows: int, num_columns: int) -> LinearConfig:
    """For a weight [num_rows, num_columns] of a format ("bfloat16", "int4-g32") on a device of
    this name.
    """
    found = _tuned().get(device, {}).get(config_key(form, num_rows, num_columns))
    return LinearConfig(**found) if found else default_config(form, num_rows, num_columns)


def config_key(form: str, num_rows: int, num_columns: int) -> str:
    """Of a weight, among the configurations of a device."""
    return f"{form} {num_rows}x{num_columns}"


def default_config(form: str, num_rows: int, num_columns: int) -> LinearConfig:
    """Without a measurement: as many programs as a large device has multiprocessors or more, and 16
    warps for each of those, where rows and columns are enough. Numbers of 4 bits take rows in
    pairs of tiles, which spares a quarter of the instructions a number.
    """
    is_plain, in_nibbles = form in PLAIN, form.startswith(("int2", "int3", "int4", "mxfp4"))
    block = 32 if form == "float32" else 64
    columns = block if is_plain else 128  # of a warp's turn, roughly
    rows = 32 if num_rows >= 4096 * (1 if in_nibbles else 4) and form != "float32" else 16
    programs, slices = max(1, num_rows // rows), 4
    while slices < 16 and programs * slices < 16 * MULTIPROCESSORS:
        slices *= 2
    while slices > 1 and slices * columns > num_columns:
        slices //= 2
    splits = 1
    while (
        splits < 8
        and 2 * splits * programs <= MULTIPROCESSORS
        and 4 * splits * slices * columns <= num_columns
    ):
        splits *= 2
    return LinearConfig(rows, slices, splits, block, 4, norm_inside=is_plain)


def stages_that_fit(
    config: LinearConfig, stage_bytes: int, bytes_once: int, programs: int, device: Device
) -> int:
    """Reads under way, at most `config.stages`, whose buffers (one less) have room in a
    multiprocessor's shared memory, twice where there are more programs than multiprocessors.
    Stages do not change any sum.
    """
    room = device.shared_bytes // (2 if programs > device.multiprocessors else 1)
    return max(1, min(config.stages, (room - RESERVED_BYTES - bytes_once) // stage_bytes + 1))


@cache
def _tuned() -> dict[str, dict[str, dict[str, Any]]]:
    """Device -> `config_key` -> what `LinearConfig` takes."""
    return json.loads(FILE.read_text())["configs"]
