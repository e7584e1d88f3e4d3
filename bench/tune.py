"""Finds how the Triton kernels of linears are launched fastest on this device, and writes it to
quantize/kernels/triton_configs.json, where the kernels look for it.

    python bench/tune.py --shapes 6144x4096,4096x4096 --formats bf16,int8,int4-g32

For each weight, from the configuration that is in use: one field after the other takes its other
values, and the fastest stays. What counts is the sum of the times for each number of `--rows`: one
configuration serves all of them, so that a row's bits depend on none. Candidates take turns in
`--rounds` rounds over copies of the weight that no cache holds; medians count, and a new one must
be 1% faster. A candidate that fails, or does not compute what the first one does, is left out.
`--device cpu` runs the same under TRITON_INTERPRET=1, and means nothing. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kernels import FORMATS, SHAPES, copies, timer
from torch import Tensor, nn

from gptfast.device import parse_dtype
from quantize.kernels import triton_configs
from quantize.kernels.call import Call
from quantize.kernels.cuda import CudaQuantizedLinear, why_no_triton
from quantize.kernels.triton_configs import LinearConfig, config_key, linear_config
from quantize.kernels.triton_launch import device_of, launch

FIELDS: dict[str, tuple[Any, ...]] = {
    "rows": (16, 32, 64),
    "slices": (2, 4, 8, 16),
    "splits": (1, 2, 4, 8),
    "block": (32, 64, 128, 256),  # of a plain weight
    "stages": (2, 3, 4, 5, 6),
    "pad": (1, 8, 16),
    "pdl": (False, True),
    "norm_inside": (True, False),  # timed with a norm
}
CLOSE = 0.02  # relative: sums in another order, rounded to 16 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default=SHAPES["cuda"], help="rows x columns of the weights")
    parser.add_argument("--formats", default=FORMATS["cuda"].removeprefix("torch,"))
    parser.add_argument("--rows", default="1,8,16", help="of activations")
    parser.add_argument("--dtype", default="bf16", help="of activations")
    parser.add_argument("--fields", default=",".join(FIELDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=triton_configs.FILE)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), parse_dtype(args.dtype) or torch.bfloat16
    if why := why_no_triton(device):
        parser.error(f"there are no kernels: {why}")
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    unknown = set(args.fields.split(",")) - set(FIELDS)
    if unknown:
        parser.error(f"{sorted(unknown)} are no fields; use {', '.join(FIELDS)}")
    counts = [int(text) for text in args.rows.split(",")]
    name, found = device_of(device).name, {}
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            for form in args.formats.split(","):
                size = tuple(int(each) for each in shape.split("x"))
                kind = str(dtype).removeprefix("torch.") if form == "bf16" else form
                key, first = config_key(kind, *size), linear_config(name, kind, *size)
                num_bytes = None if device.type == "cuda" else 0  # one will do
                linears = copies(form, size, dtype, device, True, num_bytes)
                inputs = [some_rows(count, size[1], dtype, device) for count in counts]
                best, seconds, before = tune(linears, first, inputs, args)
                found[key] = best.as_json
                print(
                    f"{key:28} {before * 1e6:9.1f} -> {seconds * 1e6:9.1f} us  {best}", flush=True
                )
                write(args.out, name, {key: best.as_json})
    print(json.dumps({"benchmark": "tune", "device_name": name, "configs": found}))


def tune(
    linears: list[nn.Module], first: LinearConfig, inputs: list[Tensor], args: argparse.Namespace
) -> tuple[LinearConfig, float, float]:
    """The best configuration, the seconds that it takes without a norm, and those of the first."""
    best, start, seconds = first, 0.0, 0.0
    for field in args.fields.split(","):
        has_norm = field == "norm_inside"
        timers = dict(candidates(linears, best, field, inputs, has_norm))
        if best not in timers:
            raise ValueError(f"{best} does not run here; start from another one")
        times: dict[LinearConfig, list[float]] = {config: [] for config in timers}
        for _ in range(args.rounds):
            for config, of_counts in timers.items():
                times[config].append(sum(seconds_of_call() for seconds_of_call in of_counts))
        medians = {config: median(each) for config, each in times.items()}
        fastest = min(medians, key=medians.__getitem__)
        if medians[fastest] >= 0.99 * medians[best]:
            fastest = best
        if not has_norm:
            start, seconds = start or medians[best], medians[fastest]
        best = fastest
    return best, seconds, start


def candidates(
    linears: list[nn.Module],
    best: LinearConfig,
    field: str,
    inputs: list[Tensor],
    has_norm: bool,
) -> Iterator[tuple[LinearConfig, list[Any]]]:
    """What differs from the best in one field and computes the same, with a timer for each input;
    the best comes first.
    """
    expected: list[Tensor] = []
    for value in sorted(FIELDS[field], key=lambda value: value != getattr(best, field)):
        config, of_inputs = replace(best, **{field: value}), []
        try:
            for number, x in enumerate(inputs):
                calls = [call_of(linear, x, has_norm) for linear in linears]
                out = calls[0].result().fill_(torch.nan)
                launch(calls[0], out, config)
                wide = out.double()
                if len(expected) == number:
                    expected.append(wide)
                if not (wide - expected[number]).norm() <= CLOSE * expected[number].norm():
                    raise ValueError(f"computes something else with {len(x)} rows")
                each = [partial(launch, call, out, config) for call in calls]
                of_inputs.append(timer(each, x.device))
        except Exception as error:  # too much shared memory, too many registers, ...
            print(f"  without {config}: {str(error).splitlines()[0][:120]}")
            continue
        yield config, of_inputs


def some_rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(count)
    return torch.randn(count, width, generator=generator, device=device).to(dtype)


def call_of(linear: Any, x: Tensor, has_norm: bool) -> Call:
    """The product of a linear with x."""
    if isinstance(linear, CudaQuantizedLinear):
        weight: tuple[Any, ...] = (linear.values, linear.scales, linear.zeros)
    else:
        weight = (linear.weight, None, None)
    norm = ("rms", torch.ones_like(x[0]), None, 1e-5) if has_norm else ("", None, None, 0.0)
    form = linear.format.name if isinstance(linear, CudaQuantizedLinear) else ""
    return Call(x, *weight, None, *norm, None, 1.0, "", False, linear.out_features, form)


def write(file: Path, device: str, configs: dict[str, Any]) -> None:
    """Adds configurations of a device to a file."""
    known = json.loads((file if file.exists() else triton_configs.FILE).read_text())
    entries = known["configs"].setdefault(device, {})
    entries.update(configs)
    known["configs"][device] = dict(sorted(entries.items()))
    file.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
