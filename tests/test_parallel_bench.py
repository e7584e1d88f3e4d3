"""The arithmetic beside tensor parallel (bench/scaling.py and its neighbours): values worked out by
hand, counts of what a step really says, published figures. That it is fast is measured elsewhere.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.families import model_config
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.parallel import ALONE, Group
from gptfast.quantization import quant_plan
from gptfast.runner import ModelRunner
from gptfast.sampling import SamplingParams
from gptfast.shapes import SHAPES, random_model, write_random_checkpoint
from gptfast.sharding import local_config
from gptfast.together import known

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # a folder of scripts, no package
scaling, costs, forecast, bench, races = map(
    import_module, "scaling parallel_costs parallel_forecast parallel parallel_race".split()
)

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131}
TINY = {
    **SHAPES["tinyllama-1.1b"],
    **SIZES,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
}
EXPERTS = {
    **SHAPES["mixtral-8x7b"],
    **SIZES,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
TIED = {**TINY, "tie_word_embeddings": True}
NORMED = {**TINY, "model_type": "olmo2"}

# 100 GB/s, of which half is reached; 10 us and 1 GB/s between ranks; 20 us a layer, 100 a step.
MACHINE = scaling.Machine(100e9, 0.5, scaling.Link(10e-6, 1e9), 20e-6, 100e-6)
SUM = scaling.Exchange("", "all_reduce", 4, 2000)


# -- the formula --


@pytest.mark.parametrize(
    ("kind", "num_ranks", "expected"),
    [
        ("all_reduce", 1, 0),
        ("all_reduce", 2, 1000),  # half out, half of the sums back
        ("all_reduce", 4, 1500),
        ("all_gather", 4, 3000),
        ("broadcast", 4, 1000),
    ],
)
def test_bytes_that_move(kind: str, num_ranks: int, expected: float) -> None:
    assert scaling.moved_bytes(kind, 1000, num_ranks) == expected


def test_a_step_by_hand() -> None:
    share = scaling.Share(5e6, 1e6, 1000)
    assert scaling.read_seconds(share, 0, MACHINE) == pytest.approx(100e-6)  # 5 MB at 50 GB/s
    assert scaling.read_seconds(share, 5000, MACHINE) == pytest.approx(200e-6)
    # Of 2 ranks each moves 2000 bytes, 2 us: four times 12 us.
    assert scaling.exchange_seconds([SUM], 2, MACHINE) == pytest.approx(48e-6)
    assert scaling.step_seconds(share, [SUM], 3, 2, MACHINE) == pytest.approx(308e-6)
    assert scaling.step_seconds(share, [SUM], 3, 1, MACHINE) == pytest.approx(260e-6)
    assert scaling.efficiency(30.0, 4, 10.0) == 0.75


def test_hosts_add_a_round() -> None:
    network = scaling.Link(50e-6, 1e8)
    hosts = scaling.Machine(1.0, 1.0, MACHINE.link, network=network, ranks_per_host=2)
    # 2 on a host: 12 us. 2 hosts: 50 us, and 2000 bytes at 100 MB/s.
    assert scaling.collective_seconds("all_reduce", 2000, 4, hosts) == pytest.approx(82e-6)
    # Gathered: 2000 from the neighbour, then 4000 from the other host.
    assert scaling.collective_seconds("all_gather", 2000, 4, hosts) == pytest.approx(102e-6)
    # A host for every rank: nothing within.
    each = scaling.Machine(1.0, 1.0, MACHINE.link, network=network, ranks_per_host=1)
    assert scaling.collective_seconds("broadcast", 1000, 2, each) == pytest.approx(60e-6)
    with pytest.raises(ValueError, match="9 ranks need 2 hosts, and there is no network"):
        scaling.collective_seconds("all_reduce", 8, 9, MACHINE)


def test_a_fit_gives_back_the_machine() -> None:
    many, few = scaling.Share(8e6), scaling.Share(2e6)
    alone = scaling.step_seconds(many, [], 5, 1, MACHINE)
    shared = scaling.step_seconds(few, [SUM], 5, 4, MACHINE)
    blank = scaling.Machine(100e9, 1.0, MACHINE.link, 0.0, MACHINE.step_s)
    found = scaling.fitted(blank, 5, (many, alone), (few, [SUM], 4, shared))
    assert (found.reached, found.layer_s) == (pytest.approx(0.5), pytest.approx(20e-6))
    with pytest.raises(ValueError, match="fewer bytes must take less time"):
        scaling.fitted(blank, 5, (few, shared), (many, [SUM], 4, alone))
    with pytest.raises(ValueError, match="less than no time"):
        scaling.fitted(blank, 5, (many, alone), (few, [SUM], 4, shared - 200e-6))


# -- what a model costs --


@pytest.mark.parametrize("raw", [TINY, TIED, EXPERTS], ids=["llama", "tied", "experts"])
@pytest.mark.parametrize("rank", [0, 1])
def test_shares_are_what_ranks_read(raw: dict[str, Any], rank: int, tmp_path: Path) -> None:
    write_random_checkpoint(raw, tmp_path, torch.bfloat16)
    config = model_config(raw)
    for group in (ALONE, Group(rank, 2)):
        share = costs.share_of(config, group, torch.bfloat16)
        model = load(tmp_path, torch.bfloat16, group=group)
        assert share.weight_bytes == model.bytes_per_step
        assert share.cache_bytes_per_token == local_config(config, group).cache_bytes_per_token(2)


def test_quantized_shares() -> None:
    """int8: a byte a weight and a scale of four a row. Where columns are cut, both ranks have the
    scales of all rows."""
    share = costs.share_of(model_config(TINY), Group(0, 2), torch.bfloat16, quant_plan("int8"))
    rows = {"qkv": 64, "out": 64, "gate_up": 96, "down": 64}
    columns = {"qkv": 64, "out": 32, "gate_up": 64, "down": 48}
    layer = sum(rows[part] * (columns[part] + 4) for part in rows)
    norms = 2 * 64 * 2 * 3 + 64 * 2  # bf16, two a layer and the last
    assert share.weight_bytes == 3 * layer + 66 * (64 + 4) + norms  # 66 of 131 rows of the head
    assert share.whole_bytes == norms


@dataclass(frozen=True)
class Talk(Group):
    """Rank 0 of two that hears itself, and what was said."""

    said: list[tuple[str, int]] = field(default_factory=list, compare=False)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.said.append(("all_reduce", x.nbytes))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self.said.append(("all_gather", x.nbytes))
        return torch.stack([x, x])

    def broadcast(self, x: Tensor) -> Tensor:
        self.said.append(("broadcast", x.nbytes))
        return x


@pytest.mark.parametrize("needs_logits", [False, True])
@pytest.mark.parametrize("raw", [TINY, EXPERTS, NORMED], ids=["llama", "experts", "olmo2"])
def test_exchanges_are_what_a_step_says(raw: dict[str, Any], needs_logits: bool) -> None:
    group, config = Talk(0, 2), model_config(raw)
    model = Transformer(local_config(config, group), group).bfloat16()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    known(group, model)
    runner = ModelRunner(model, num_rows=2, max_seq_len=16)
    runner.main.step = None  # the blocks say the same where it can be heard
    runner.shows_logits = needs_logits
    for row in (0, 1):
        runner.start_row(row, [1, 2], SamplingParams(temperature=0.0), 0)
    group.said.clear()
    runner.decode(2)
    expected = Counter[tuple[str, int]]()
    for each in costs.exchanges_of(config, 2, 2, num_rows=2, needs_logits=needs_logits):
        expected[each.kind, each.num_bytes] += each.count
    assert Counter(group.said) == expected
    assert costs.exchanges_of(config, 1) == []


# -- published figures --


def test_llama_2_7b_by_hand() -> None:
    """6,476,267,520 weights of layers and the last norm, and a head of 131,072,000."""
    config: ModelConfig = forecast.shape("llama-2-7b")
    assert forecast.gpt_fast_share(config, 1, 2).weight_bytes == 2 * 6_607_343_616
    share = forecast.gpt_fast_share(config, 8, 2)
    assert share.weight_bytes == 2 * (6_476_271_616 / 8 + 131_072_000)
    assert share.whole_bytes == 2 * 131_072_000


def test_two_figures_predict_the_others() -> None:
    """Of dense bf16 models through the one-shot all-reduce; but for one figure, 16.03,
    whose GPUs would read 1.13 TB/s where those of Llama 2 of the same size read 1.48."""
    records = forecast.beside_published()
    plain = [r for r in records if "error" in r and r["weight_bytes"] == 2]
    dense = [r for r in plain if r["shape"] != "mixtral-8x7b" and r["tok_s"] != 16.03]
    assert len(dense) == 13
    assert max(abs(r["error"]) for r in dense) < 0.03
    assert [r["tok_s"] for r in dense if r["is_fitted"]] == [104.9, 328.43]
    slow = [r for r in records if r["collective"] == forecast.NCCL]
    assert all(15 < r["all_reduce_us"] < 50 for r in slow)


# -- what is measured, beside it --


def rounds(weight_bytes: list[float], *turns: tuple[float, float]) -> dict[str, Any]:
    """A team's figures: of each round tokens a second, and bytes a second of the memory."""
    per_round = [{"decode_tok_s": speed, "read_bandwidth": memory} for speed, memory in turns]
    return {"weight_bytes": weight_bytes, "per_round": per_round, "exchange_s": []}


def test_predictions_of_a_run_by_hand() -> None:
    """One process reads 9.95 MB and 50 kB of cache at half of what memory gives, fast in the second
    round, slow in the others. Two ranks read 6 MB each, where memory gives 20 GB/s 5 GB/s each:
    1.2 ms, and 300 us to talk."""
    subject = bench.Subject({1: 1000, 2: 500}, 4, 50)
    two, gloo = races.Line(2, 1), races.Line(2, 1, shared=False)
    slow, fast, halves = (1000.0, 20e9), (2000.0, 40e9), [5.975e6, 5e6]
    found = {
        "1 process x 1": rounds([9.95e6], (800.0, 20e9), (800.0, 20e9), (800.0, 20e9)),
        "1 process x 2": rounds([9.95e6], slow, fast, slow),
        two.name: rounds(halves, (600.0, 20e9), (800.0, 20e9), (700.0, 20e9)),
        gloo.name: rounds(halves, (300.0, 20e9), (400.0, 20e9), (300.0, 20e9)),
    }
    found[two.name]["exchange_s"] = [100e-6, 200e-6]
    said = bench.beside_model(two, found, 2, subject)
    assert said["gain"] == pytest.approx(0.6)  # of 0.6, 0.4, 0.7
    assert said["efficiency"] == pytest.approx(700 / 1600)
    assert said["reached"] == pytest.approx(0.42)  # 12 MB, 700 times a second
    assert said["predicted_tok_s"] == pytest.approx(1 / 1.5e-3)
    assert said["error"] == pytest.approx(1 / 1.5e-3 / 700 - 1)
    assert bench.beside_model(gloo, found, 2, subject)["gain"] == pytest.approx(0.3)
    # More threads than cores have the cores.
    many = {**found, "2 ranks x 2": found[two.name]}
    assert bench.beside_model(races.Line(2, 2), many, 2, subject)["gain"] == said["gain"]
    alone = bench.beside_model(races.Line(1, 2), found, 2, subject)
    assert alone["predicted_tok_s"] is None and alone["gain"] == 1.0
    assert alone["reached"] == pytest.approx(0.5)
    assert bench.beside_model(races.Line(1, 1), found, 2, subject)["gain"] == 1.0
    del found["1 process x 2"]
    assert bench.beside_model(two, found, 2, subject)["predicted_tok_s"] is None


def test_lines_of_a_run() -> None:
    cpu = torch.device("cpu")
    names = [line.name for line in bench._lines([1, 2, 4], 4, cpu)]
    assert names == [
        "1 process x 1", "1 process x 4", "2 ranks x 1", "2 ranks x 2", "4 ranks x 1",
        "2 ranks x 2, gloo", "4 ranks x 1, gloo",
    ]  # fmt: skip
    assert [line.name for line in bench._lines([1, 2], 4, torch.device("cuda"))] == [
        "1 process x 1", "2 ranks x 1"
    ]  # fmt: skip


def test_random_models_cost_the_same() -> None:
    config = model_config(TINY)
    share = costs.share_of(config, ALONE, torch.float32)
    assert share.weight_bytes == random_model(config, torch.float32).bytes_per_step
