"""What the model of scaling (scaling.py) says of machines that are not here: nothing of it is
measured by us.

    python bench/parallel_forecast.py

First it is put beside what gpt-fast published: fitted to two of its measurements, it predicts the
others. Then it predicts gptfast on one and two hosts of eight H200. Prints tables, then one JSON
line.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from parallel_costs import exchanges_of, share_of
from scaling import Exchange, Link, Machine, Share, exchange_seconds, fitted, step_seconds

from gptfast.config import ModelConfig
from gptfast.families import model_config
from gptfast.parallel import ALONE, Group
from gptfast.quantization import quant_plan
from gptfast.shapes import shape_config

BF16 = torch.bfloat16
MICROSECOND = 1e-6

# -- what gpt-fast published --

# A100-80G limited to 330 W, 8 of them in a cube mesh. Datasheet: 2.04 TB/s, NVLink 600 GB/s both
# ways together. Its own one-shot all-reduce over peers' memory (pytorch#114001) took the place of
# NCCL. Its latency was not published; 7.5 us is what symmetric memory takes on later machines.
A100 = Machine(2.04e12, 1.0, Link(7.5 * MICROSECOND, 300e9))
ONE_SHOT, NCCL = "one-shot", "NCCL"


@dataclass(frozen=True)
class Published:
    """Tokens a second at batch 1 behind 5 tokens, of gpt-fast's README. `weight_bytes` of one
    number: bf16, int8, int4 in groups of 32 with a scale and a zero in bf16.
    """

    shape: str
    weight_bytes: float
    num_ranks: int
    tok_s: float
    collective: str = ONE_SHOT


PUBLISHED = [
    Published("llama-2-7b", 2, 1, 104.9),
    Published("llama-2-7b", 2, 2, 168.84),
    Published("llama-2-7b", 2, 4, 254.02),
    Published("llama-2-7b", 2, 8, 328.43),
    Published("llama-3.1-8b", 2, 1, 93.83),
    Published("llama-3.1-8b", 2, 2, 149.10),
    Published("llama-3.1-8b", 2, 4, 217.21),
    Published("llama-3.1-8b", 2, 8, 276.01),
    Published("llama-2-70b", 2, 2, 21.32),
    Published("llama-2-70b", 2, 4, 38.01),
    Published("llama-2-70b", 2, 8, 62.50),
    Published("llama-3.1-70b", 2, 2, 16.03),
    Published("llama-3.1-70b", 2, 4, 37.45),
    Published("llama-3.1-70b", 2, 8, 58.78),
    Published("llama-2-7b", 1, 1, 155.58),
    Published("llama-2-7b", 0.625, 1, 196.80),
    Published("llama-2-70b", 1, 1, 19.13),
    Published("llama-2-70b", 0.625, 1, 25.25),
    Published("llama-2-70b", 1, 8, 80.44),
    Published("llama-2-70b", 0.625, 8, 90.77),
    Published("mixtral-8x7b", 2, 2, 96.67),
    Published("mixtral-8x7b", 2, 4, 155.35),
    Published("mixtral-8x7b", 2, 8, 227.82),
    # Before December 2023.
    Published("llama-2-7b", 2, 2, 136.27, NCCL),
    Published("llama-2-7b", 2, 4, 168.78, NCCL),
    Published("llama-2-7b", 2, 8, 179.27, NCCL),
    Published("llama-2-70b", 2, 2, 20.53, NCCL),
    Published("llama-2-70b", 2, 4, 34.15, NCCL),
    Published("llama-2-70b", 2, 8, 47.25, NCCL),
]
FITTED = PUBLISHED[0], PUBLISHED[3]


def shape(name: str) -> ModelConfig:
    return model_config(shape_config(name))


def gpt_fast_share(config: ModelConfig, num_ranks: int, weight_bytes: float) -> Share:
    """It cuts the layers and holds the head whole on every rank."""
    alone = share_of(config, ALONE, BF16)
    head = config.dim * config.vocab_size * weight_bytes
    layers = alone.weight_bytes / BF16.itemsize * weight_bytes - head
    return Share(layers / num_ranks + head, head, alone.cache_bytes_per_token / num_ranks)


def gpt_fast_exchanges(config: ModelConfig, num_ranks: int) -> list[Exchange]:
    """Two sums a layer; nothing else, as every rank knows all tokens."""
    if num_ranks == 1:
        return []
    return [Exchange("layers", "all_reduce", 2 * config.num_layers, config.dim * BF16.itemsize)]


def a100() -> Machine:
    """As fitted to one and eight ranks of Llama-2-7B."""
    one, eight = FITTED
    config = shape(one.shape)
    return fitted(
        A100,
        config.num_layers,
        (gpt_fast_share(config, 1, one.weight_bytes), 1 / one.tok_s),
        (
            gpt_fast_share(config, eight.num_ranks, eight.weight_bytes),
            gpt_fast_exchanges(config, eight.num_ranks),
            eight.num_ranks,
            1 / eight.tok_s,
        ),
    )


def beside_published() -> list[dict[str, Any]]:
    """Each published figure beside the formula's. Of NCCL's figures, what an all-reduce must have
    taken for the formula to be right: its latency is not among what was fitted.
    """
    machine, found = a100(), []
    for each in PUBLISHED:
        config = shape(each.shape)
        exchanges = gpt_fast_exchanges(config, each.num_ranks)
        share = gpt_fast_share(config, each.num_ranks, each.weight_bytes)
        said = step_seconds(share, exchanges, config.num_layers, each.num_ranks, machine)
        record = {**asdict(each), "is_fitted": each in FITTED}
        if each.collective == NCCL:
            more = (1 / each.tok_s - said) / (2 * config.num_layers)
            record["all_reduce_us"] = (machine.link.latency_s + more) / MICROSECOND
        else:
            record |= {"formula_tok_s": 1 / said, "error": 1 / said / each.tok_s - 1}
        found.append(record)
    return found


# -- what gptfast should do on H200 --

# Datasheet 4.8 TB/s. `reached` and the kernels' boundaries (about 7 kernels a layer of 1.3 us, and
# the host's part of a step) are assumptions: no step of gptfast has been measured there yet.
KERNELS_A_LAYER, BOUNDARY_S = 7, 1.3 * MICROSECOND
H200 = Machine(
    4.8e12,
    0.8,
    Link(7.5 * MICROSECOND, 450e9),  # one-shot, over NVLink
    KERNELS_A_LAYER * BOUNDARY_S,
    20 * MICROSECOND,
)
NCCL_LATENCY = 26.5 * MICROSECOND
NETWORK_BANDWIDTH = 50e9  # 400 Gbit/s a GPU
NETWORK_LATENCIES = [20 * MICROSECOND, 40 * MICROSECOND, 80 * MICROSECOND]
FORECAST_SHAPES = ["llama-3.1-8b", "llama-2-7b", "llama-3.1-70b"]
FORMATS = ["bf16", "fp8", "int4"]


def forecast(name: str, form: str, num_ranks: int, machine: Machine) -> dict[str, Any]:
    """A greedy step behind a short prompt."""
    config = shape(name)
    plan = None if form == "bf16" else quant_plan(form)
    share = share_of(config, Group(0, num_ranks), BF16, plan)
    exchanges = exchanges_of(config, num_ranks)
    seconds = step_seconds(share, exchanges, config.num_layers, num_ranks, machine)
    return {
        "shape": name,
        "format": form,
        "num_ranks": num_ranks,
        "weight_bytes": share.weight_bytes,
        "exchange_us": exchange_seconds(exchanges, num_ranks, machine) / MICROSECOND,
        "tok_s": 1 / seconds,
    }


def machines() -> dict[str, tuple[int, Machine]]:
    """By name, how many ranks on which machine."""
    nccl = replace(H200, link=replace(H200.link, latency_s=NCCL_LATENCY))
    # Were gptfast to lose as much a layer there as gpt-fast did on A100.
    slow = replace(H200, layer_s=a100().layer_s)
    found = {
        "1 GPU": (1, H200),
        "8, one-shot": (8, H200),
        "8, NCCL": (8, nccl),
        "8, slow layers": (8, slow),
    }
    for latency in NETWORK_LATENCIES:
        hosts = replace(H200, network=Link(latency, NETWORK_BANDWIDTH))
        found[f"2 x 8, +{latency / MICROSECOND:.0f} us"] = (16, hosts)
    return found


# -- what is printed --


def main() -> None:
    machine, published = a100(), beside_published()
    print("\n".join(published_table(published, machine)))
    rows = {
        (name, form): {title: forecast(name, form, *entry) for title, entry in machines().items()}
        for name in FORECAST_SHAPES
        for form in FORMATS
    }
    print("\n".join(forecast_table(rows)), flush=True)
    forecasts = [{"machine": title, **row} for each in rows.values() for title, row in each.items()]
    record = {
        "benchmark": "parallel-forecast",
        "measured": False,
        "a100": asdict(machine),
        "published": published,
        "machines": {title: asdict(each) for title, (_, each) in machines().items()},
        "forecasts": forecasts,
    }
    print(json.dumps(record))


def published_table(records: Sequence[dict[str, Any]], machine: Machine) -> list[str]:
    rows = [
        "gpt-fast on A100: published, and the formula with "
        f"{machine.bandwidth * machine.reached / 1e12:.2f} TB/s, "
        f"{machine.layer_s / MICROSECOND:.0f} us a layer, "
        f"{machine.link.latency_s / MICROSECOND:.1f} us an all-reduce (* fitted)",
        f"{'':14} bytes a weight  ranks  published  formula   error",
    ]
    for each in records:
        cells = f"{each['shape']:14} {each['weight_bytes']:14.3g} {each['num_ranks']:6}"
        cells += f" {each['tok_s']:10.2f}"
        if "all_reduce_us" in each:
            cells += f"  NCCL: right if its all-reduce took {each['all_reduce_us']:.1f} us"
        else:
            mark = " *" if each["is_fitted"] else ""
            cells += f" {each['formula_tok_s']:8.1f} {each['error']:+7.1%}{mark}"
        rows.append(cells)
    return rows


def forecast_table(rows: dict[tuple[str, str], dict[str, dict[str, Any]]]) -> list[str]:
    titles = list(machines())
    head = " ".join(f"{title:>15}" for title in titles)
    lines = ["", "gptfast on H200, tok/s, predicted, not measured", f"{'':21} {head}"]
    for (name, form), each in rows.items():
        cells = " ".join(f"{each[title]['tok_s']:15.0f}" for title in titles)
        lines.append(f"{name:14} {form:6} {cells}")
    return lines


if __name__ == "__main__":
    main()
