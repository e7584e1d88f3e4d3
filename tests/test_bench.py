"""The benchmark's bookkeeping: its shapes are the published ones, its figures agree with each
other. That they are fast is measured elsewhere (bench/LOG.md).
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast.commands import main
from gptfast.commands.contest import ROUND_KEYS
from gptfast.config import ModelConfig
from gptfast.families import model_config
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.shapes import (
    SHAPES,
    random_model,
    random_weights,
    shape_config,
    write_random_checkpoint,
)

REPOSITORY = Path(__file__).resolve().parents[1]
TINY: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        **SHAPES["tinyllama-1.1b"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 128,
    },
    "tiny-gpt2": {
        **SHAPES["gpt2"],
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 128,
    },
}
KEYS = {
    *("decode_tok_s", "prefill_tok_s", "ttft_s", "itl_p50_ms", "itl_p99_ms", "bytes_per_token"),
    *("bandwidth_gb_s", "bandwidth_fraction", "peak_memory_bytes", "load_s", "compile_s"),
}
SHORT = ["--prompt-tokens=8", "--prefill-tokens=32", "--new-tokens=8", "--rounds=3"]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in TINY.items():
        monkeypatch.setitem(SHAPES, name, raw)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading memory takes longer than all the rest of these tests."""
    monkeypatch.setattr("gptfast.commands.bench.read_bandwidth", lambda device: 25e9)


def bench(*options: str) -> int:
    """The exit code, also where the parser ends the process."""
    try:
        return main(["bench", *options])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def check_figures(figures: dict[str, Any], num_rounds: int) -> None:
    """The promised keys, all finite, and consistent with one another."""
    assert figures.keys() >= KEYS
    assert all(math.isfinite(figures[key]) and figures[key] >= 0 for key in KEYS)
    assert figures["decode_tok_s"] > 0 and figures["peak_memory_bytes"] > 0
    traffic = figures["bytes_per_token"] * figures["decode_tok_s"] / 1e9
    assert figures["bandwidth_gb_s"] == pytest.approx(traffic)
    assert figures["bandwidth_fraction"] == pytest.approx(traffic / 25)
    assert len(figures["per_round"]) == num_rounds
    for key in ROUND_KEYS:
        values = sorted(each[key] for each in figures["per_round"])
        assert figures[key] == values[num_rounds // 2], f"{key} is not the median of the rounds"


def test_a_table_and_then_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--shape", "tiny-llama", "--dtype", "fp32", *SHORT) == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    check_figures(result, 3)
    assert (result["model"], result["dtype"], result["rounds"]) == ("tiny-llama", "float32", 3)
    assert {"commit", "device_name", "torch", "threads"} <= result.keys()
    assert result["peers"] == {}
    # Weights but for the embedding's rows, which are looked up; keys and values of 8 + 8/2 tokens.
    config = model_config(TINY["tiny-llama"])
    embedding = config.vocab_size * config.dim
    cache = config.cache_bytes_per_token(4) * 12
    assert result["bytes_per_token"] == 4 * (config.num_parameters - embedding) + cache
    assert any(
        row.startswith("gptfast ") and f"{result['decode_tok_s']:.2f}" in row for row in table
    )


def test_rows_share_the_weights_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    each = {}
    for rows in (1, 4):
        options = ["--shape", "tiny-llama", "--batch-size", str(rows), *SHORT, "--json"]
        assert bench(*options) == 0
        each[rows] = json.loads(capsys.readouterr().out)
        check_figures(each[rows], 3)
    config = model_config(TINY["tiny-llama"])
    weights = 2 * (config.num_parameters - config.vocab_size * config.dim)
    saved = each[1]["bytes_per_token"] - each[4]["bytes_per_token"]
    assert saved == pytest.approx(weights * 3 / 4, abs=1)


def test_json_prints_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--shape", "tiny-gpt2", *SHORT, "--json") == 0
    output = capsys.readouterr().out
    check_figures(json.loads(output), 3)
    assert output.count("\n") == 1


def test_a_small_model_shortens_the_default_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt as long as the context leaves no room for a token: with 128 positions, 127 tokens
    are read and 120 decoded.
    """
    write_random_checkpoint(TINY["tiny-gpt2"], tmp_path, torch.float32)
    assert bench("--model", str(tmp_path), "--rounds", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prefill_tokens"], result["new_tokens"]) == (127, 120)
    assert (result["dtype"], result["weights"]) == ("float32", "checkpoint")


@pytest.mark.parametrize("shape", TINY)
def test_a_peer_does_the_same_work(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 the same weights give the same tokens, or it was not the same work."""
    pytest.importorskip("transformers")
    options = ["--shape", shape, "--dtype", "fp32", "--peer", "transformers", *SHORT, "--json"]
    assert bench(*options) == 0
    result = json.loads(capsys.readouterr().out)
    peer = result["peers"]["transformers"]
    check_figures(result, 3)
    check_figures(peer, 3)
    assert peer["equal_tokens"] == 1.0
    assert peer["bytes_per_token"] == result["bytes_per_token"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "llama-9"], "shape 'llama-9' is unknown; use one of: smollm-135m, "),
        (["--shape", "gpt2", "--model", "folder"], "--model and --shape cannot be given together"),
        (["--shape", "tiny-gpt2", "--rounds", "0"], "must be at least 1"),
        (["--shape", "tiny-gpt2", "--new-tokens", "1"], "a decoding speed needs at least 2"),
        (["--shape", "tiny-gpt2", "--prefill-tokens", "128"], "takes 129 tokens of context"),
        (["--shape", "tiny-gpt2", "--peer", "me"], "invalid choice: 'me'"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*options) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and message in errors


def test_a_missing_peer_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an ImportError now
    assert bench("--shape", "tiny-gpt2", "--peer", "transformers", *SHORT) == 2
    output, errors = capsys.readouterr()
    assert output == "" and "pip install 'gptfast[peers]'" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("smollm-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama-160m", 162_417_408),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gemma-2-2b", 2_614_341_888),
        ("phi-4-mini", 3_836_021_760),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt-oss-20b", 20_914_757_184),
        ("deepseek-v2-lite", 15_706_484_224),
        ("pythia-1.4b", 1_414_647_808),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    config = model_config(shape_config(name))
    assert config.num_parameters == num_parameters
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_every_shape_has_its_number_of_parameters_tested() -> None:
    test = test_shapes_have_the_published_number_of_parameters
    [mark] = test.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == SHAPES.keys() - TINY.keys()


def test_a_shape_may_be_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mixtral-8x7b", "gpt2"):
        whole, short = (model_config(shape_config(name, n)) for n in (None, 2))
        assert (short.num_layers, short.dim) == (2, whole.dim)
    with pytest.raises(ValueError, match="num_layers is 13; shape gpt2 has 1 to 12"):
        shape_config("gpt2", 13)
    assert bench("--num-layers", "1") == 2
    assert "--num-layers shortens a --shape" in capsys.readouterr().err
    assert bench("--shape", "tiny-llama", "--num-layers", "1", "--json", *SHORT) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["model"] == "tiny-llama, 1 layers"
    assert (
        result["parameters"]
        == result["active_parameters"]
        == tiny_config("tiny-llama", num_hidden_layers=1).num_parameters
    )


def test_bytes_of_a_step_follow_the_active_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {**SHAPES["mixtral-8x7b"], **{k: TINY["tiny-llama"][k] for k in TINY["tiny-llama"]}}
    raw |= {"model_type": "mixtral", "num_local_experts": 8}
    sizes = []
    for num_active in (1, 2, 8):
        config = model_config({**raw, "num_experts_per_tok": num_active})
        model = random_model(config, torch.float32)
        embedding = config.vocab_size * config.dim
        assert model.bytes_per_step == 4 * (config.num_active_parameters - embedding)
        sizes.append(model.bytes_per_step)
    expert = 2 * 3 * config.dim * config.hidden_dim  # of both layers
    assert (sizes[1] - sizes[0], sizes[2] - sizes[1]) == (4 * expert, 4 * 6 * expert)


def tiny_config(name: str, **changes: Any) -> ModelConfig:
    return model_config({**TINY[name], **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY)
def test_random_models_keep_their_activations_finite(name: str, dtype: torch.dtype) -> None:
    """Over many layers, in every dtype; and logits vary about as much as a trained model's do."""
    key = {"tiny-llama": "num_hidden_layers", "tiny-gpt2": "n_layer"}[name]
    model = random_model(tiny_config(name, **{key: 32}), dtype)
    logits = model(torch.arange(16)[None], torch.arange(16)[None])
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert logits[0].argmax(-1).unique().numel() > 1, "the same answer everywhere tests nothing"


def test_random_weights_are_larger_than_the_block_they_repeat() -> None:
    """16.8 M numbers of a block of 1 M: no two rows are equal, and each weight begins elsewhere."""
    config = tiny_config("tiny-llama", vocab_size=262_144)
    with torch.device("meta"):
        model = Transformer(config)
    weights = dict(random_weights(model, torch.float32, torch.device("cpu"), seed=0))
    embed, head = weights["embed.weight"], weights["head.weight"]
    assert embed.unique(dim=0).size(0) == config.vocab_size
    assert not torch.equal(embed, head)
    assert embed.std() == pytest.approx(config.dim**-0.5, rel=0.01)
    assert weights["norm.weight"].eq(1).all()


@pytest.mark.parametrize("name", TINY)
def test_a_written_shape_holds_the_weights_of_the_one_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptfast.shards.SHARD_BYTES", 50_000)
    write_random_checkpoint(TINY[name], tmp_path, torch.float32, seed=3)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read, made = load(tmp_path), random_model(tiny_config(name), torch.float32, seed=3)
    made_weights = dict(made.named_parameters())
    for parameter, value in read.named_parameters():
        assert torch.equal(value, made_weights[parameter]), parameter


def test_the_door_opens_from_another_folder(tmp_path: Path) -> None:
    door = [sys.executable, str(REPOSITORY / "bench" / "decode.py"), "--help"]
    result = subprocess.run(door, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--prefill-tokens" in result.stdout
