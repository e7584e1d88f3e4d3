"""A roofline (Williams, Waterman, Patterson 2009) of what benchmarks found: operations a second
over operations per byte, under the two limits of the device.

    python bench/roofline.py --measure --device cuda >out/limits.json
    python bench/roofline.py out/*.json --out out/roofline.png

Reads files of JSON objects, one or one a line, as the benchmarks of this folder print them: decode
and prefill (decode.py), single linears (kernels.py), lengths (context.py), limits (--measure).
Other lines are left out. Needs matplotlib: pip install -e .[bench].
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_device


@dataclass(frozen=True)
class Point:
    """`intensity` is operations (a multiplication and an addition are two) per byte that has to be
    read, `speed` operations a second.
    """

    group: str
    label: str
    intensity: float
    speed: float


@dataclass(frozen=True)
class Limits:
    """Bytes and operations a second; no `speed` was measured where it is None."""

    bandwidth: float
    speed: float | None

    def at(self, intensity: float) -> float:
        """The most operations a second at so many per byte."""
        slope = self.bandwidth * intensity
        return slope if self.speed is None else min(slope, self.speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON objects, one or one a line")
    parser.add_argument("--out", type=Path, default=Path("roofline.png"))
    parser.add_argument("--measure", action="store_true", help="print the limits of a device")
    parser.add_argument("--device", default="cpu", help="to measure")
    args = parser.parse_args()
    try:
        if args.measure:
            print(json.dumps(measure(parse_device(args.device))))
            return
        records = [record for file in args.files for record in read_records(file)]
        limits, found = limits_of(records), list(points(records))
        if not found:
            raise ValueError(
                "no file holds a decode, kernels or context benchmark; nothing to draw"
            )
        draw(found, limits, args.out)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    for point in found:
        share = point.speed / limits.at(point.intensity)
        print(f"{point.group:34} {point.label:12} {share:6.1%} of the roof")
    print(json.dumps({"benchmark": "roofline", "file": str(args.out), "points": len(found)}))


def measure(device: torch.device) -> dict[str, Any]:
    """Medians, on random numbers: a sum of memory far larger than the caches, a copy of it (bytes
    read and written), and a product of large bfloat16 matrices.
    """
    on_cuda = device.type == "cuda"
    memory = torch.randint(1 << 40, (1 << (29 if on_cuda else 26),), device=device)
    target = torch.empty_like(memory)
    size = 8192 if on_cuda else 2048
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return {
        "benchmark": "limits",
        "device_name": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "read_bandwidth_gb_s": memory.nbytes / seconds(memory.sum, device) / 1e9,
        "copy_gb_s": 2 * memory.nbytes / seconds(lambda: target.copy_(memory), device) / 1e9,
        "matmul_tflop_s": 2 * size**3 / seconds(lambda: a @ b, device) / 1e12,
    }


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of 10 calls, after 3 that do not count."""
    times = []
    for _ in range(13):
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return median(times[3:])


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, each on its line or alone, or the `runs` of one; text between them is
    left out. ValueError where there is none.
    """
    text = file.read_text()
    records = []
    for part in (text, *text.splitlines()):
        try:
            records.append(json.loads(part))
        except json.JSONDecodeError:
            continue
        if part is text:
            break
    records = [run for r in records if isinstance(r, dict) for run in r.get("runs", [r])]
    if not records:
        raise ValueError(f"{file} holds no JSON object; give files that the benchmarks wrote")
    return records


def limits_of(records: Iterable[dict[str, Any]]) -> Limits:
    """What the device gave at best; ValueError where no record tells its bandwidth."""
    bandwidths, speeds = [0.0], [0.0]
    for record in records:
        bandwidths.append(record.get("read_bandwidth_gb_s") or 0.0)
        bandwidths += [r.get("read_bandwidth_gb_s") or 0.0 for r in record.get("results", [])]
        speeds.append(record.get("matmul_tflop_s") or 0.0)
    if not max(bandwidths):
        raise ValueError("no record has read_bandwidth_gb_s; add what --measure prints")
    return Limits(max(bandwidths) * 1e9, max(speeds) * 1e12 or None)


def points(records: Iterable[dict[str, Any]]) -> Iterator[Point]:
    """Every figure that has operations, bytes and time."""
    for record in records:
        make = POINTS.get(record.get("benchmark", ""))
        if make is not None:
            yield from make(record)


def _decode_points(record: dict[str, Any]) -> Iterator[Point]:
    """A token is a multiplication and an addition by every active weight. Prefill reads the weights
    once for its tokens.
    """
    operations = 2.0 * (record.get("active_parameters") or record["parameters"])
    group = f"{record['model']} {record.get('quant') or record['dtype']}"
    rows = record["batch_size"]
    if record["decode_tok_s"]:
        yield Point(
            group,
            "decode" if rows == 1 else f"decode x{rows}",
            operations / record["bytes_per_token"],
            operations * record["decode_tok_s"],
        )
    if record["prefill_tok_s"]:
        num_tokens = record["prefill_tokens"]
        yield Point(
            group,
            f"prefill {num_tokens}",
            operations * num_tokens / (record["bytes_per_token"] * rows),
            operations * record["prefill_tok_s"],
        )


def _kernel_points(record: dict[str, Any]) -> Iterator[Point]:
    for each in record["results"]:
        num_rows, num_columns = map(int, each["shape"].split("x"))
        operations = 2.0 * num_rows * num_columns * each["rows"]
        seconds = each["us"] * 1e-6
        num_bytes = each["gb_s"] * 1e9 * seconds
        label = f"{each['shape']} x{each['rows']}"
        yield Point(f"linear {each['format']}", label, operations / num_bytes, operations / seconds)


def _context_points(record: dict[str, Any]) -> Iterator[Point]:
    """Operations are those of the weights; attention's own, few for each byte, are left out."""
    for each in record["results"]:
        num_bytes = record["weight_bytes"] + each["cache_bytes"]
        operations = 2.0 * record["active_parameters"]
        group = f"{record['model']}, cache {each['kv_cache_dtype']}"
        speed = operations * each["tok_s"]
        yield Point(group, f"at {each['context']}", operations / num_bytes, speed)


POINTS = {"decode": _decode_points, "kernels": _kernel_points, "context": _context_points}


def draw(found: Sequence[Point], limits: Limits, out: Path) -> None:
    """Writes a PNG: a line for each limit, a colour for each group of points."""
    try:
        import matplotlib  # optional: the extra "bench"
    except ImportError:
        raise ImportError("a plot needs matplotlib; pip install -e .[bench]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 7))
    low = min(point.intensity for point in found) / 2
    high = max(point.intensity for point in found) * 2
    if limits.speed is not None:
        high = max(high, 2 * limits.speed / limits.bandwidth)
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    roof = [limits.at(step) / 1e12 for step in steps]
    speeds = [point.speed / 1e12 for point in found]
    axes.plot(steps, roof, color="black", label=f"{limits.bandwidth / 1e9:,.0f} GB/s")
    colours = pyplot.get_cmap("tab20")
    groups = list(dict.fromkeys(point.group for point in found))
    for number, group in enumerate(groups):
        inside = [point for point in found if point.group == group]
        axes.scatter(
            [point.intensity for point in inside],
            [point.speed / 1e12 for point in inside],
            color=colours(number % 20),
            marker="osD^v"[number // 20 % 5],
            label=group,
            s=22,
        )
    if len(found) <= 40:  # more labels hide each other
        for point in found:
            at = (point.intensity, point.speed / 1e12)
            axes.annotate(point.label, at, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte read",
        ylabel="Tera-operations per second",
        ylim=(min(speeds) / 3, max(*speeds, *roof) * 2),
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=6, ncols=max(1, math.ceil(len(groups) / 24)), loc="lower right")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
