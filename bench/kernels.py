"""One quantized linear at a time, its weight read from memory: bytes per second beside what the
memory gives in the same second.

    python bench/kernels.py --threads 2 --rows 1,2,4,8,16
    python bench/kernels.py --device cuda --rows 1,2,4,8,16

Every case has as many copies of its weight as the caches cannot hold, used in turn; all cases take
turns in every round, with a probe of the memory before and after each. On a CPU, of the calls of a
round the fast tenth counts, of the probe as well: who else uses the machine only ever adds time.
On a CUDA device the calls of a round are one graph, and their mean counts. Format `torch` is
PyTorch's own linear. `--prefill` measures that many rows, in milliseconds. Prints a JSON line for
each shape.
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
from torch import Tensor, nn

from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_dtype
from quantize.formats import Format, QuantizedWeight, quantized_weight
from quantize.kernels.build import LINEAR
from quantize.kernels.cpu import PackedQuantizedLinear
from quantize.kernels.cuda import CudaLinear, CudaQuantizedLinear, why_no_triton
from quantize.packed import PackedLinear

# Of TinyLlama-1.1B and of Llama-3.1-8B, fused.
SHAPES = {
    "cpu": "2560x2048,2048x2048,11264x2048,2048x5632,32000x2048",
    "cuda": "6144x4096,28672x4096,4096x14336",
}
FORMATS = {
    "cpu": "int8,int8-g64,int4-g32,int4-g128,int4-g32-asym,mxfp4,int8-dynamic,int4-g32-dynamic,"
    "bf16",
    "cuda": "torch,bf16,fp8,int8,int8-g128,int4-g32,int4-g128,int4-g32-asym,mxfp4",
}
CACHE_BYTES = {"cpu": 100 << 20, "cuda": 256 << 20}  # more than any cache holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", help="rows x columns of the weights")
    parser.add_argument("--formats")
    parser.add_argument("--rows", default="1,2,4,8,16", help="of activations")
    parser.add_argument("--dtype", default="bf16", help="of activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, help="measure this many rows of activations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, device = parse_dtype(args.dtype) or torch.bfloat16, torch.device(args.device)
    if device.type == "cpu" and LINEAR.load(print) is None:
        parser.error(f"there are no kernels: {LINEAR.why_not()}")
    if device.type == "cuda" and (why := why_no_triton(device)):
        parser.error(f"there are no kernels: {why}")
    header = {
        "benchmark": "kernels",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": device_name(device),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit(),
    }
    counts = [args.prefill] if args.prefill else [int(text) for text in args.rows.split(",")]
    results = []
    formats = (args.formats or FORMATS[device.type]).split(",")
    with torch.inference_mode():
        for text in (args.shapes or SHAPES[device.type]).split(","):
            size = tuple(int(each) for each in text.split("x"))
            cases = {name: copies(name, size, dtype, device) for name in formats}
            inputs = {n: torch.randn(n, size[1], device=device).to(dtype) for n in counts}
            found = measure(cases, inputs, args.rounds)
            print(f"\nweight {text}" + " " * 10 + "".join(f"{f'{n} rows':>28}" for n in counts))
            for name in cases:
                show(name, [found[name, count] for count in counts], bool(args.prefill))
                for count in counts:
                    figures = {"shape": text, "format": name, "rows": count, **found[name, count]}
                    results.append(figures)
            own = [figures for figures in results if figures["shape"] == text]
            # At once: a run that is cut off keeps what it has.
            print(json.dumps({**header, "results": own}), flush=True)


def copies(
    name: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    on_triton: bool | None = None,
    num_bytes: int | None = None,
) -> list[nn.Module]:
    """Enough linears of a format that the caches hold none of them until it is used again, or of so
    many bytes; of the kind of the device, or by Triton.
    """
    on_triton = device.type == "cuda" if on_triton is None else on_triton
    num_bytes = CACHE_BYTES[device.type] if num_bytes is None else num_bytes

    def one() -> nn.Module:
        if weight is not None:
            if on_triton:
                return CudaQuantizedLinear(weight)
            return PackedQuantizedLinear(weight)
        plain = nn.Linear(size[1], size[0], bias=False, dtype=dtype, device=device)
        if name == "torch":
            return plain
        if on_triton:
            return CudaLinear(plain)
        return PackedLinear(plain) if dtype == torch.bfloat16 else plain

    weight = None if name in ("bf16", "torch") else random_weight(name, size, device)
    first = one()
    return [first, *(one() for _ in range(num_bytes // weight_bytes(first)))]


def random_weight(name: str, size: tuple[int, ...], device: torch.device) -> QuantizedWeight:
    form = Format.parse(name)
    groups = (size[0], form.num_groups(size[1]))
    if form.kind == "mxfp4":
        codes = torch.randint(16, size, device=device)
        scales = torch.full(groups, 120, dtype=torch.uint8, device=device)
        return quantized_weight(form, codes, scales)
    scales = torch.full(groups, 0.01, dtype=form.scale_dtype, device=device)
    if form.kind == "fp8":
        values = torch.randn(size, device=device).to(torch.float8_e4m3fn)
        return QuantizedWeight(form, size[1], values, scales).check()
    integers = torch.randint(form.qmin, form.qmax + 1, size, dtype=torch.int8, device=device)
    return quantized_weight(form, integers, scales, scales * 100 if form.has_zeros else None)


def weight_bytes(linear: nn.Module) -> int:
    if isinstance(linear, nn.Linear):
        return linear.weight.nbytes
    assert isinstance(
        linear, PackedLinear | PackedQuantizedLinear | CudaLinear | CudaQuantizedLinear
    )
    return linear.weight_bytes


def measure(
    cases: dict[str, list[nn.Module]], inputs: dict[int, Tensor], rounds: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """Medians of the rounds, for every case and number of rows; the first is not measured."""
    device = next(iter(inputs.values())).device
    sizes = {"cpu": (1 << 25, 1 << 21), "cuda": (1 << 27, 1 << 24)}[device.type]
    memory = torch.ones(sizes[0], dtype=torch.int64, device=device).split(sizes[1])
    probe = timer([partial(torch.sum, part) for part in memory], device)

    def bandwidth() -> float:
        return memory[0].nbytes / probe()

    timers = {
        (name, count): timer([partial(linear, x) for linear in linears], device)
        for name, linears in cases.items()
        for count, x in inputs.items()
    }
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {}
    before = bandwidth()
    for number in range(rounds + 1):
        for case, seconds_of_call in timers.items():
            seconds = seconds_of_call()
            after = bandwidth()
            if number:
                turns.setdefault(case, []).append((seconds, (before + after) / 2))
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


def timer(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """What measures the seconds that one of the calls takes."""
    if device.type == "cpu":
        return partial(fast_tenth, calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles does so before the graph is captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return partial(mean_of_graph, graph, len(calls))


def mean_of_graph(graph: Any, num_calls: int) -> float:
    """Seconds a call of a captured graph; at least 60 calls are made."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replays = max(2, -(-60 // num_calls))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replays / num_calls


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
        print(f"{name:22}" + "".join(f"{each['us'] / 1e3:25.2f} ms" for each in figures))
        return
    cells = [
        f"{each['us']:8.1f} us{each['gb_s']:7.0f} GB/s{each['of_read']:5.0%}" for each in figures
    ]
    print(f"{name:22}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
