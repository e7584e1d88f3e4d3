"""A mixture of experts at batch 1: decode follows the bytes of the active experts, prefill the
arithmetic of grouped tokens.

    python bench/experts.py --shape deepseek-v2-lite --num-layers 4 --threads 2

One model, whose routers are told to choose more or fewer experts, takes turns with itself; prefill
of one layer is compared with weights gathered for every token. Ends with one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.commands.bench import commit, device_name
from gptfast.device import parse_device, parse_dtype
from gptfast.engine import Engine
from gptfast.experts import Router
from gptfast.families import model_config
from gptfast.model import Transformer
from gptfast.sampling import SamplingParams
from gptfast.shapes import random_model, shape_config
from gptfast.stats import read_bandwidth
from quantize.grouped import grouped_linear, grouped_linear_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="deepseek-v2-lite")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        device = parse_device(args.device)
        dtype = parse_dtype(args.dtype) or torch.bfloat16
        config = model_config(shape_config(args.shape, args.num_layers))
    except ValueError as error:
        parser.error(str(error))
    if config.experts is None:
        parser.error(f"shape {args.shape} has no experts")
    header = {
        "benchmark": "experts",
        "model": f"{args.shape}, {args.num_layers} layers",
        "experts": config.experts.num_experts,
        "dtype": str(dtype).removeprefix("torch."),
        "device_name": device_name(device),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit(),
    }
    model = random_model(config, dtype, device)
    decode = measure_decode(model, args.new_tokens, args.rounds)
    prefill = measure_prefill(config.dim, config.experts, dtype, device, args)
    print(json.dumps({**header, "decode": decode, "prefill": prefill}))


def choose(model: Transformer, num_active: int) -> None:
    """Lets the routers choose that many experts."""
    assert model.config.experts is not None
    facts = replace(model.config.experts, num_active=num_active)
    model.config = replace(model.config, experts=facts)
    for module in model.modules():
        if isinstance(module, Router):
            module.facts = facts


def measure_decode(model: Transformer, num_new: int, rounds: int) -> list[dict[str, Any]]:
    experts = model.config.experts
    assert experts is not None
    engine = Engine(model, 1, 8 + num_new)
    params = SamplingParams(temperature=0, max_new_tokens=num_new, ignore_eos=True)
    counts = sorted({experts.num_active, experts.num_active * 2, experts.num_experts // 2})
    counts = [count for count in counts if count <= experts.num_experts]
    speeds: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for number in range(rounds + 1):  # the first is not measured
        for count in counts:
            choose(model, count)
            probe = read_bandwidth(engine.device)
            engine.forget()
            engine.counters.reset()
            engine.submit(list(range(8)), params)
            while engine.has_work:
                engine.step()
            if number:
                speed = engine.counters.num_tokens / engine.counters.seconds
                speeds[count].append((speed, probe))
    rows = []
    print("active experts   bytes/token   tok/s    GB/s   of read %")
    for count in counts:
        choose(model, count)
        size = model.bytes_per_step
        speed = median(s for s, _ in speeds[count])
        share = median(s * size / probe for s, probe in speeds[count])
        print(
            f"{count:14} {size / 1e9:10.2f} GB {speed:7.2f} {speed * size / 1e9:7.1f} {share:9.0%}"
        )
        rows.append({"active": count, "bytes": size, "tok_s": speed, "of_read": share})
    return rows


def measure_prefill(
    dim: int, experts: Any, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """One layer's first product over a piece of prompt: grouped, and with gathered weights."""
    num_pairs = args.prefill_tokens * experts.num_active
    weight = torch.randn(experts.num_experts, 2 * experts.hidden_dim, dim, device=device).to(dtype)
    x = torch.randn(num_pairs, dim, device=device).to(dtype)
    groups = torch.randint(experts.num_experts, (num_pairs,), device=device).sort().values
    ends = torch.searchsorted(groups, torch.arange(experts.num_experts, device=device), right=True)
    ways: dict[str, Callable[[], Any]] = {
        "grouped": lambda: grouped_linear(x, weight, None, ends),
        # A few rows, because all of them would not fit into memory.
        "gathered": lambda: grouped_linear_reference(x[:32], weight, None, ends.clamp(max=32)),
    }
    rows = {"grouped": num_pairs, "gathered": 32}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            start = perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append((perf_counter() - start) / rows[name] * 1e6)
    figures = {f"{name}_us_per_row": median(found) for name, found in times.items()}
    print(f"prefill of {num_pairs} rows: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
    return {"rows": num_pairs, **figures}


if __name__ == "__main__":
    main()
