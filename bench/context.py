"""Decoding behind ever longer texts: a token's time should grow by what reading the cache takes,
and by no more.

    python bench/context.py --shape tinyllama-1.1b --threads 2 --contexts 512,2048,8192
    python bench/context.py --shape llama-3.1-8b --device cuda --compile

Caches are filled with random numbers instead of a text, which changes no size and no address. All
lengths and cache formats take turns in every round, with a probe of the memory before and after
each; figures are medians. `--profile` also tells where the time of a step goes, by kernel (on a
CPU, by operation). Ends with one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from gptfast.cache import KV_CACHE_DTYPES, KVCache
from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_device, parse_dtype
from gptfast.families import model_config
from gptfast.model import Transformer
from gptfast.quantization import quant_plan
from gptfast.runner import ModelRunner
from gptfast.sampling import SamplingParams
from gptfast.shapes import random_model, shape_config
from gptfast.stats import read_bandwidth

GREEDY = SamplingParams(temperature=0.0)
MOST_KERNELS = 24  # of a profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--quant", help="of the weights: int8, int4, ...")
    parser.add_argument("--caches", default="auto,int8", help=", ".join(KV_CACHE_DTYPES))
    parser.add_argument("--contexts", default="512,2048,8192,32768", help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded at each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of the first and the last length")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        contexts = sorted(int(text) for text in args.contexts.split(","))
        raw = shape_config(args.shape, args.num_layers)
        # What a model was trained for does not matter to its speed.
        [key] = {"max_position_embeddings", "n_positions"} & raw.keys()
        raw[key] = max(raw[key], contexts[-1] + args.steps)
        config, device = model_config(raw), parse_device(args.device)
        dtype = parse_dtype(args.dtype) or torch.bfloat16
        plan = None if args.quant is None else quant_plan(args.quant)
        unknown = set(args.caches.split(",")) - KV_CACHE_DTYPES.keys()
        if unknown or contexts[0] < 1 or min(args.steps, args.rounds) < 1:
            raise ValueError("--caches names formats; contexts, steps and rounds are at least 1")
    except ValueError as error:
        parser.error(str(error))
    model = random_model(config, dtype, device, quant=plan)
    runners = {
        name: filled_runner(model, contexts[-1] + args.steps, args.compile, name)
        for name in args.caches.split(",")
    }
    results = measure(runners, contexts, args.steps, args.rounds)
    profiles = []
    if args.profile:
        first = next(iter(runners.values()))
        profiles = [profiled(first, context, args.steps) for context in (contexts[0], contexts[-1])]
    layers = "" if args.num_layers is None else f", {args.num_layers} layers"
    header = {
        "benchmark": "context",
        "model": args.shape + layers,
        "dtype": str(dtype).removeprefix("torch."),
        "quant": args.quant,
        "compile": args.compile,
        "active_parameters": config.num_active_parameters,
        "weight_bytes": model.bytes_per_step,
        "device_name": device_name(device),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps({**header, "results": results, "profiles": profiles}))


def filled_runner(
    model: Transformer, num_slots: int, compile: bool, kv_cache_dtype: str
) -> ModelRunner:
    """A runner of one row whose cache is full."""
    runner = ModelRunner(model, 1, num_slots, compile, kv_cache_dtype)
    fill(runner.cache)
    runner.start_row(0, [0], GREEDY, 0)
    runner.warm_up([GREEDY])
    return runner


def fill(cache: KVCache) -> None:
    """Random numbers of a size that keeps attention spread."""
    for layer in cache.layers:
        for tensor in layer.tensors:
            if tensor.size(-1) <= 2 and layer.key_scales is not None:  # scales
                tensor.fill_(0.01)
            elif tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            else:
                tensor.copy_(torch.randn(tensor.shape, device=tensor.device))


@torch.no_grad()
def measure(
    runners: dict[str, ModelRunner], contexts: list[int], num_steps: int, num_rounds: int
) -> list[dict[str, Any]]:
    """Figures of every cache and length; the first round is not measured."""
    device = next(iter(runners.values())).device
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {}
    before = read_bandwidth(device)
    for number in range(num_rounds + 1):
        for name, runner in runners.items():
            for context in contexts:
                seconds = seconds_per_token(runner, context, num_steps)
                after = read_bandwidth(device)
                if number:
                    turn = (seconds, (before + after) / 2)
                    turns.setdefault((name, context), []).append(turn)
                before = after
    results = []
    print("cache   context   ms/token     tok/s   cache GB   cache GB/s   of read %")
    for (name, context), times in turns.items():
        size = runners[name].cache.bytes_per_token
        first = turns[name, contexts[0]]
        more = (context - contexts[0]) * size
        speeds = [
            (more / (s - s_first), more / (s - s_first) / probe)
            for (s, probe), (s_first, _) in zip(times, first, strict=True)
            if s > s_first and more
        ]
        seconds = median(s for s, _ in times)
        figures = {
            "kv_cache_dtype": name,
            "context": context,
            "ms_per_token": seconds * 1e3,
            "tok_s": 1 / seconds,
            "cache_bytes": context * size,
            # Of the bytes that are read beyond those of the shortest text.
            "cache_gb_s": median(s for s, _ in speeds) / 1e9 if speeds else None,
            "of_read": median(share for _, share in speeds) if speeds else None,
            "read_bandwidth_gb_s": median(probe for _, probe in times) / 1e9,
        }
        results.append(figures)
        print(row(figures))
    return results


def seconds_per_token(runner: ModelRunner, context: int, num_steps: int) -> float:
    """Of steps behind `context` tokens."""
    runner.positions.fill_(context)
    runner.cache.lengths.fill_(context)
    synchronize(runner.device)
    start = perf_counter()
    for step in range(num_steps):
        runner.decode(context + step + 1)
    synchronize(runner.device)
    return (perf_counter() - start) / num_steps


@torch.no_grad()
def profiled(runner: ModelRunner, context: int, num_steps: int) -> dict[str, Any]:
    """Calls and microseconds a step of what takes longest, printed too."""
    on_cuda = runner.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        seconds_per_token(runner, context, num_steps)
    kernels = [
        {
            "name": event.key,
            "calls": event.count / num_steps,
            "us": (event.self_device_time_total if on_cuda else event.self_cpu_time_total)
            / num_steps,
        }
        for event in found.key_averages()
    ]
    kernels = sorted(kernels, key=lambda kernel: -kernel["us"])[:MOST_KERNELS]
    print(f"\na step behind {context} tokens   calls         us")
    for kernel in kernels:
        print(f"{kernel['name'][:40]:40} {kernel['calls']:9.1f} {kernel['us']:10.1f}")
    return {"context": context, "kernels": kernels}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(figures: dict[str, Any]) -> str:
    cells = [
        f"{figures['kv_cache_dtype']:5} {figures['context']:9}",
        f"{figures['ms_per_token']:10.3f} {figures['tok_s']:9.1f}",
        f"{figures['cache_bytes'] / 1e9:10.3f}",
    ]
    if figures["cache_gb_s"] is not None:
        cells.append(f"{figures['cache_gb_s']:12.1f} {figures['of_read']:11.0%}")
    return " ".join(cells)


if __name__ == "__main__":
    main()
