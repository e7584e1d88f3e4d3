"""One quantized linear at a time, its weight read from memory: bytes per second beside what the
memory gives in the same second.

    python bench/kernels.py --threads 2 --rows 1,2,4,8,16

Every case has as many copies of its weight as the caches cannot hold, used in turn; all cases take
turns in every round, with a probe of the memory before and after each. Of the calls of a round the
fast tenth counts, of the probe as well: who else uses the machine only ever adds time. `--prefill`
measures that many rows, in milliseconds. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_dtype
from quantize.formats import Format, QuantizedWeight, quantized_weight
from quantize.kernels.build import LINEAR
from quantize.kernels.cpu import PackedQuantizedLinear
from quantize.packed import PackedLinear

SHAPES = "2560x2048,2048x2048,11264x2048,2048x5632,32000x2048"  # of TinyLlama-1.1B, fused
FORMATS = "int8,int8-g64,int4-g32,int4-g128,int4-g32-asym,mxfp4,int8-dynamic,int4-g32-dynamic,bf16"
CACHE_BYTES = 100 << 20  # more than any cache holds
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="rows x columns of the weights")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--rows", default="1,2,4,8,16", help="of activations")
    parser.add_argument("--dtype", default="bf16", help="of activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, help="measure this many rows of activations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = parse_dtype(args.dtype) or torch.bfloat16
    if LINEAR.load(print) is None:
        parser.error(f"there are no kernels: {LINEAR.why_not()}")
    header = {
        "benchmark": "kernels",
        "dtype": str(dtype).removeprefix("torch."),
        "device_name": device_name(CPU),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit(),
    }
    counts = [args.prefill] if args.prefill else [int(text) for text in args.rows.split(",")]
    results = []
    with torch.inference_mode():
        for text in args.shapes.split(","):
            num_rows, num_columns = (int(size) for size in text.split("x"))
            cases = {
                name: copies(name, num_rows, num_columns, dtype) for name in args.formats.split(",")
            }
            found = measure(cases, counts, num_columns, dtype, args.rounds)
            print(f"\nweight {text}" + " " * 10 + "".join(f"{f'{n} rows':>19}" for n in counts))
            for name in cases:
                show(name, [found[name, count] for count in counts], bool(args.prefill))
                for count in counts:
                    figures = {"shape": text, "format": name, "rows": count, **found[name, count]}
                    results.append(figures)
    print(json.dumps({**header, "results": results}))


def copies(name: str, num_rows: int, num_columns: int, dtype: torch.dtype) -> list[nn.Module]:
    """Enough linears of a format that the caches hold none of them until it is used again."""

    def one() -> nn.Module:
        if weight is not None:
            return PackedQuantizedLinear(weight)
        plain = nn.Linear(num_columns, num_rows, bias=False, dtype=dtype)
        return PackedLinear(plain) if dtype == torch.bfloat16 else plain

    weight = None if name == "bf16" else random_weight(name, num_rows, num_columns)
    first = one()
    return [first, *(one() for _ in range(CACHE_BYTES // weight_bytes(first)))]


def random_weight(name: str, num_rows: int, num_columns: int) -> QuantizedWeight:
    form = Format.parse(name)
    groups = (num_rows, form.num_groups(num_columns))
    if form.kind == "mxfp4":
        codes = torch.randint(16, (num_rows, num_columns))
        return quantized_weight(form, codes, torch.full(groups, 120, dtype=torch.uint8))
    integers = torch.randint(form.qmin, form.qmax + 1, (num_rows, num_columns))
    scales = torch.full(groups, 0.01, dtype=form.scale_dtype)
    return quantized_weight(form, integers, scales, scales * 100 if form.has_zeros else None)


def weight_bytes(linear: nn.Module) -> int:
    if isinstance(linear, nn.Linear):
        return linear.weight.nbytes
    assert isinstance(linear, PackedLinear | PackedQuantizedLinear)
    return linear.weight_bytes


def measure(
    cases: dict[str, list[nn.Module]],
    counts: list[int],
    num_columns: int,
    dtype: torch.dtype,
    rounds: int,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Medians of the rounds; the first is not measured."""
    memory = list(torch.ones(1 << 25, dtype=torch.int64).split(1 << 21))

    def bandwidth() -> float:
        return memory[0].nbytes / fast_tenth([partial(torch.sum, part) for part in memory])

    inputs = {count: torch.randn(count, num_columns).to(dtype) for count in counts}
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {}
    before = bandwidth()
    for number in range(rounds + 1):
        for name, linears in cases.items():
            for count, x in inputs.items():
                seconds = fast_tenth([partial(linear, x) for linear in linears])
                after = bandwidth()
                if number:
                    turns.setdefault((name, count), []).append((seconds, (before + after) / 2))
                before = after
    figures = {}
    for (name, count), times in turns.items():
        size = weight_bytes(cases[name][0])
        figures[name, count] = {
            "us": median(s for s, _ in times) * 1e6,
            "gb_s": median(size / s for s, _ in times) / 1e9,
            "of_read": median(size / s / probe for s, probe in times),
        }
    return figures


def fast_tenth(calls: list[Callable[[], Any]]) -> float:
    """Seconds that the fast tenth of the calls keeps within; at least 20 calls are made."""
    times = []
    for _ in range(max(1, -(-20 // len(calls)))):
        for call in calls:
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
    return sorted(times)[len(times) // 10]


def show(name: str, figures: list[dict[str, Any]], is_prefill: bool) -> None:
    if is_prefill:
        print(f"{name:22}" + "".join(f"{each['us'] / 1e3:16.2f} ms" for each in figures))
        return
    cells = [f"{each['gb_s']:8.1f} GB/s {each['of_read']:5.0%}" for each in figures]
    print(f"{name:22}" + "".join(cells))


if __name__ == "__main__":
    main()
