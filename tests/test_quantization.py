"""Quantizing while loading, and our own quantized checkpoints: written, read in another process,
damaged, and made plain again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, cases_of, raw_config, write_checkpoint
from safetensors.torch import load_file, save_file
from test_convert import config_of, stored
from tiny import tiny_gpt2, tiny_llama
from torch import nn

from gptfast import LLM, SamplingParams
from gptfast.checkpoint import inspect
from gptfast.convert import convert
from gptfast.loading import load, weight_bytes
from gptfast.model import Transformer
from gptfast.quantization import QuantPlan, quant_plan
from quantize.formats import Format
from quantize.kernels.cpu import PackedQuantizedLinear
from quantize.rounding import round_to_nearest

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")


def logits(model: Transformer, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (2, 11), generator=generator)
    return model(tokens, torch.arange(11).expand(2, -1))


def rounded_by_hand(folder: Path, plan: QuantPlan) -> Transformer:
    """The plain float32 model, each weight of the plan replaced by its rounded numbers."""
    model = load(folder, "fp32")
    formats = plan.formats(model)
    tied = model.config.tied_head
    for name, form in formats.items():
        module = model.get_submodule(name)
        numbers = round_to_nearest(module.weight, form).dequantize()
        if name == "head" and tied:
            bias, model.head = model.head.bias, nn.Linear(*reversed(numbers.shape), bias=False)
            model.head.bias = bias
        model.get_submodule(name).weight = nn.Parameter(numbers, requires_grad=False)
    return model


def test_plans_go_to_other_processes_as_names() -> None:
    for plan in (
        quant_plan("int4", 64, "int8", "int8-g32", ["mlp.down", "blocks.0.*"]),
        quant_plan("int8", head="none"),
    ):
        assert QuantPlan.of_names(json.loads(json.dumps(plan.names))) == plan


@pytest.mark.parametrize("name", CASES)
def test_every_family_loads_quantized_and_is_read_back(tmp_path: Path, name: str) -> None:
    """Quantized while loading = quantized into a folder and loaded = rounded by hand."""
    source = write_checkpoint(tmp_path / "source", name)
    plan = quant_plan("int4", 16)
    expected = logits(rounded_by_hand(source, plan))
    found = logits(load(source, "fp32", quant=plan))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    convert(source, tmp_path / "own", dtype="fp32", quant=plan)
    again = load(tmp_path / "own")
    assert torch.equal(logits(again), found)
    assert again.formats == plan.formats(load(source, "fp32"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quant", "int8 int8-g32-asym int4 int4-asym int3 fp8 mxfp4 int8-dynamic int4-dynamic".split()
)
def test_every_format_is_read_back(tmp_path: Path, quant: str, tied: bool) -> None:
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
    plan = quant_plan(quant, embedding="int8")
    convert(source, tmp_path / "own", quant=plan)
    expected = logits(load(source, quant=plan))
    assert torch.equal(logits(load(tmp_path / "own")), expected)
    convert(tmp_path / "own", tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "own")
    difference = (expected - logits(load(source))).abs().max()
    assert 0 < difference < 4


def test_it_says_in_config_json_what_it_is(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    convert(source, tmp_path / "own", quant=quant_plan("int4", 16, exclude=["blocks.0.*"]))
    settings = config_of(tmp_path / "own")["quantization_config"]
    assert settings == {
        "quant_method": "gptfast",
        "method": "rtn",
        "bits": 4,
        "group_size": 16,
        "modules": {
            "int4-g16": [f"blocks.1.{part}" for part in ("attention.qkv", "attention.out")]
            + ["blocks.1.mlp.gate_up", "blocks.1.mlp.down"],
            "int8": ["head"],
        },
    }
    weights = stored(tmp_path / "own")
    assert weights["blocks.1.mlp.down.weight"].shape == (32, 24)
    assert weights["blocks.1.mlp.down.weight"].dtype == torch.uint8
    assert weights["blocks.1.mlp.down.scales"].shape == (32, 3)
    assert weights["blocks.0.mlp.down.weight"].shape == (32, 48)
    assert weights["head.weight"].dtype == torch.int8
    assert inspect(tmp_path / "own").quantized_as == "rtn, int4-g16, int8"


def test_defaults_of_a_plan() -> None:
    """An int8 head under a body of fewer bits; the same format otherwise; embedding plain."""
    assert quant_plan("int4") == QuantPlan(Format.parse("int4-g32"), Format.parse("int8"))
    assert quant_plan("int8-g64").head == Format.parse("int8-g64")
    assert quant_plan("int4-dynamic").head == Format.parse("int8-dynamic")
    assert quant_plan("fp8").head == Format.parse("fp8")
    assert quant_plan("int4", head="none").head is None
    assert quant_plan("int4", 128).body == Format.parse("int4-g128")
    assert quant_plan("int4", -1).body == Format.parse("int4-row")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("int4", 4), "group size 4"),
        (("int4", 48), "power of two"),
        (("int5",), "int5"),
        (("int4", None, "best"), "best"),
        (("mxfp4", 64), "mxfp4"),
        (("mxfp4", -1), "mxfp4"),
        (("int4-g64", -1), "leave out the other, -1"),
        (("int4-row", 64), "leave out the other, 64"),
        (("int4", None, None, "int8-dynamic"), "embedding"),
    ],
)
def test_plans_that_cannot_be(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quant_plan(*arguments)


def test_parts_that_stay_plain(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    model = load(
        folder, quant=quant_plan("int4", 16, head="none", exclude=["mlp.down", "*.0.*qkv"])
    )
    assert "head" not in model.formats and "blocks.0.attention.qkv" not in model.formats
    assert "blocks.1.attention.qkv" in model.formats
    assert not any(name.endswith("down") for name in model.formats)
    with pytest.raises(ValueError, match="no part of the model is called 'lm_head'; parts are"):
        load(folder, quant=quant_plan("int4", exclude=["lm_head"]))
    tied = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="the head shares the embedding"):
        load(tied, quant=quant_plan("int4", head="none", embedding="int8"))


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    convert(source, tmp_path / "own", quant=quant_plan("int4", 16))
    for act in (
        lambda: load(tmp_path / "own", quant=quant_plan("int8")),
        lambda: LLM(tmp_path / "own", quant="int8"),
        lambda: convert(tmp_path / "own", tmp_path / "new", quant=quant_plan("int8")),
    ):
        with pytest.raises(ValueError, match=r"own is quantized already \(rtn, int4-g16, int8\)"):
            act()
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="adapters are merged into plain weights"):
        convert(tmp_path / "own", tmp_path / "new", adapters=[source])
    with pytest.raises(ValueError, match="for gptfast only"):
        convert(source, tmp_path / "new", "hf", quant=quant_plan("int8"))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_numbers_of_a_quantized_checkpoint(tmp_path: Path, tied: bool) -> None:
    """quant="none" and `convert --to hf`: the numbers that the quantized model computes with. Of a
    tied head that was quantized apart a published file has no place: it is the embedding again.
    """
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
    convert(source, tmp_path / "own", quant=quant_plan("int4", 16))
    quantized, plain = load(tmp_path / "own"), load(tmp_path / "own", quant="none")
    assert not plain.formats
    torch.testing.assert_close(logits(plain), logits(quantized), rtol=1e-4, atol=1e-4)
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    assert "quantization_config" not in config_of(tmp_path / "hf")
    published = load(tmp_path / "hf")
    for name, parameter in plain.named_parameters():
        if name != "head.weight" or not tied:
            assert torch.equal(published.get_parameter(name), parameter), name
    assert load(source, quant="none").formats == {}


def damaged(folder: Path, change: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("quant", [4, True, ["int4"], b"int4", "nonsense"])
def test_what_is_no_plan_is_never_ignored(tmp_path: Path, quant: Any) -> None:
    folder = tiny_llama(tmp_path / "model")
    for make in (LLM, load):
        with pytest.raises(ValueError, match="nonsense" if quant == "nonsense" else "quant"):
            make(folder, quant=quant)
    assert quant_plan("int4", exclude="mlp.down").exclude == ("mlp.down",)
    with pytest.raises(ValueError, match="nothing is left"):
        load(folder, quant=quant_plan("int4", head="none", exclude=["*"]))
    with pytest.raises(ValueError, match="names its group size"):
        quant_plan("int4-g64", 128)


def test_an_embedding_is_counted_as_it_is(tmp_path: Path) -> None:
    """fp8 has no products on a CPU, but rows of it can be looked up."""
    source = inspect(tiny_llama(tmp_path / "model"))
    plan = quant_plan("int4", 16, embedding="fp8")
    model = load(source, quant=plan)
    held = sum(parameter.nbytes for parameter in model.embed.parameters())
    assert held == 96 * 32 + 96 * 4
    plain = weight_bytes(source, torch.float32, CPU, quant_plan("int4", 16))
    assert weight_bytes(source, torch.float32, CPU, plan) == plain - 96 * 32 * 4 + held


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mlp.down.scales", lambda t: t[:-1].clone(), "has shape [31, 3]"),
        ("mlp.down.weight", lambda t: t[:, :-1].contiguous(), "has shape [32, 23]"),
        ("mlp.down.weight", lambda t: t.view(torch.int8), "stored as I8"),
        ("mlp.down.scales", lambda t: None, "missing tensors: blocks.1.mlp.down.scales"),
        ("mlp.down.weight", lambda t: None, "missing tensors: blocks.1.mlp.down.weight"),
        ("mlp.down.zeros", lambda t: torch.zeros(32, 3), "no place for"),
        ("mlp.down.order", lambda t: torch.arange(47), "has shape [47]"),
        ("mlp.down.order", lambda t: torch.arange(48.0), "stored as F32; int64 is needed"),
        ("mlp.down.scales", lambda t: t.view(torch.int16).byte(), "stored as U8; bfloat16 or"),
    ],
)
def test_damage_is_refused_before_weights_are_used(
    tmp_path: Path, name: str, change: Any, words: str
) -> None:
    convert(tiny_llama(tmp_path / "source"), tmp_path / "own", quant=quant_plan("int4", 16))

    def change_one(weights: dict[str, torch.Tensor]) -> None:
        changed = change(weights.pop(f"blocks.1.{name}", None))
        if changed is not None:
            weights[f"blocks.1.{name}"] = changed

    folder = damaged(tmp_path / "own", change_one)
    with pytest.raises(ValueError) as error:
        inspect(folder)
    assert words in str(error.value)


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    convert(tiny_llama(tmp_path / "source"), tmp_path / "own", quant=quant_plan("int4", 16))
    name = "blocks.0.attention.out.scales"
    damaged(tmp_path / "own", lambda weights: weights[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name} has numbers that are not finite"):
        load(tmp_path / "own")
    name = "blocks.0.attention.out.order"
    damaged(tmp_path / "own", lambda weights: weights.update({name: torch.zeros(32).long()}))
    with pytest.raises(ValueError):
        load(tmp_path / "own")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptfast"},
        {"quant_method": "gptfast", "modules": {}},
        {"quant_method": "gptfast", "modules": {"int4-g16": "head"}},
        {"quant_method": "gptfast", "modules": {"int7": ["head"]}},
        {"quant_method": "gptfast", "modules": {"int8": ["tail"]}},
        {"quant_method": "gptfast", "modules": {"int8": ["head"], "int4-g16": ["head"]}},
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any]) -> None:
    convert(tiny_llama(tmp_path / "source"), tmp_path / "own", quant=quant_plan("int4", 16))
    raw = config_of(tmp_path / "own") | {"quantization_config": settings}
    (tmp_path / "own" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError):
        inspect(tmp_path / "own")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_with_their_tensor(tmp_path: Path, number: float) -> None:
    folder = tiny_llama(tmp_path / "model")
    damaged(
        folder,
        lambda weights: weights["model.layers.1.mlp.down_proj.weight"].view(-1)[7:8].fill_(number),
    )
    with pytest.raises(ValueError, match=r"model: blocks\.1\.mlp\.down\.weight"):
        load(folder, quant=quant_plan("int4", 16))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight"):
        convert(folder, tmp_path / "own", quant=quant_plan("int8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_conv1d_families_keep_their_orientation(tmp_path: Path) -> None:
    """GPT-2 stores weights [in, out]; groups are of inputs all the same."""
    folder = tiny_gpt2(tmp_path / "model")
    plan = quant_plan("int4", 8)
    expected = logits(rounded_by_hand(folder, plan))
    torch.testing.assert_close(logits(load(folder, quant=plan)), expected, rtol=1e-4, atol=1e-4)


def test_experts_are_quantized_each(tmp_path: Path) -> None:
    name = cases_of("mixtral")[0]
    folder = write_checkpoint(tmp_path / "model", name, raw_config(name))
    model = load(folder, "fp32", quant=quant_plan("int4", 16))
    assert "blocks.0.mlp.expert_down" in model.formats
    assert not any("router" in name for name in model.formats)


def test_a_gate_of_one_row_is_left_alone(tmp_path: Path) -> None:
    name = next(case for case in cases_of("qwen2_moe"))
    model = load(write_checkpoint(tmp_path / "model", name), "fp32", quant=quant_plan("int4", 16))
    gates = [name for name, _ in model.named_modules() if name.endswith("shared_gate")]
    assert gates and not set(gates) & model.formats.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_a_step_reads(tmp_path: Path, tied: bool) -> None:
    """Each quantized weight, its scales and the norms; of the embedding nothing, tied or not, since
    the head is quantized apart.
    """
    folder = tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    model = load(folder, quant=quant_plan("int4", 16))
    stored = sum(model.get_submodule(name).weight_bytes for name in model.formats)
    assert model.bytes_per_step == stored + 5 * 32 * 4


def test_what_runs_otherwise_than_asked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path / "model")
    [note] = LLM(folder, device="cpu", quant="fp8").notes
    assert "fp8 runs on CUDA" in note and "float32" in note
    monkeypatch.setattr(PackedQuantizedLinear, "supports", staticmethod(lambda *facts: False))
    notes = LLM(folder, device="cpu", quant="int4").notes
    assert len(notes) == 2 and all("has no kernel here" in note for note in notes)


def test_a_fresh_process_needs_only_the_new_folder(tmp_path: Path) -> None:
    convert(tiny_llama(tmp_path / "source"), tmp_path / "own", quant=quant_plan("int4", 16))
    expected = logits(load(tmp_path / "own"))
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    code = (
        "import sys, torch; from pathlib import Path; from gptfast import load\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "tokens = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))\n"
        "found = load(Path(sys.argv[1]))(tokens, torch.arange(11).expand(2, -1))\n"
        "torch.save(found, sys.argv[2])"
    )
    arguments = [tmp_path / "own", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_whole_plain_model_is_never_in_memory(tmp_path: Path) -> None:
    """Twenty blocks of which each is 10 MB plain and 1.5 MB in int4. (What rounding holds beside,
    for each thread, is the same for any number of blocks.)
    """
    raw = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 20}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tiny_llama(tmp_path / "model", **raw, **heads)
    code = (
        "import sys, torch; from pathlib import Path; from gptfast import load\n"
        "torch.set_num_threads(1)\n"
        "from gptfast.quantization import quant_plan\n"
        "def held():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "seen = []\n"
        "def watched(items):\n"
        "    for item in items:\n"
        "        yield item\n"
        "        seen.append(held())\n"
        "plan = quant_plan(sys.argv[3]) if sys.argv[3] else None\n"
        "load(Path(sys.argv[2]), quant=plan)\n"
        "before = held()\n"
        "model = load(Path(sys.argv[1]), quant=plan, progress=watched)\n"
        "print(max(*seen, held()) - before)"
    )
    small = tiny_llama(tmp_path / "small")
    peaks = {}
    for quant in ("", "int4"):
        command = [sys.executable, "-c", code, str(folder), str(small), quant]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks[quant] = int(found.stdout)
    assert peaks["int4"] < 0.5 * peaks[""], peaks


def test_generating_with_quantized_weights(tmp_path: Path) -> None:
    """Through the engine, rows of different lengths, as the linears rounded by hand."""
    plan = quant_plan("int4", 16)
    folder = tiny_llama(tmp_path / "model")
    llm = LLM(folder, dtype="fp32", quant=plan)
    plain = LLM(folder, dtype="fp32")
    plain.model = rounded_by_hand(folder, plan)
    plain.engine = plain._build_engine(3)
    prompts = [[1, 5, 9], [7], list(range(20))]
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    found, expected = llm.generate(prompts, params), plain.generate(prompts, params)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert llm.model.bytes_per_step < plain.model.bytes_per_step / 3


def test_compiled_is_eager(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    outputs = [
        LLM(folder, dtype="fp32", quant=quant_plan("int4", 16), compile=compile)
        .generate([[1, 2, 3]], params)[0]
        .token_ids
        for compile in (False, True)
    ]
    assert outputs[0] == outputs[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptfast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_line() -> None:
    """The brief's own words, but for --compile."""
    options = ("--prompt", "Once upon a time", "-n", "12", "--seed", "1", "--device", "cpu")
    done = run("generate", "--quant", "int4", "--group-size", "64", *options)
    assert done.returncode == 0 and "tokens/sec" in done.stdout + done.stderr
    assert "int4-g64, int8" in done.stderr
    for wrong, words in (
        (["--quant", "int4", "--group-size", "5"], "group size 5"),
        (["--quant", "q4"], "quantization 'q4' is unknown"),
        (["--group-size", "64"], "--quant"),
        (["--quant", "none", "--quant-head", "int8"], "--quant"),
        (["--quant", "int4", "--quant-exclude", "tail"], "'tail'"),
    ):
        failed = run("generate", *wrong, *options)
        assert failed.returncode == 2 and words in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
