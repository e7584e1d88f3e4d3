"""LoRA adapters merged by `gptfast convert`, against unmerged arithmetic: y = W x + scale B (A x).

Adapters are written here as PEFT writes them.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases import write_checkpoint
from safetensors.torch import load_file, save_file
from test_convert import config_of, refused, stored
from tiny import LLAMA, gpt2_tensors, llama_tensors, tiny_gpt2, tiny_llama, write_folder
from torch import Tensor

from gptfast.checkpoint import inspect
from gptfast.commands import main
from gptfast.convert import convert
from gptfast.loading import load

RANK, ALPHA = 4, 6
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def low_rank(shapes: Mapping[str, tuple[int, int]], rank: int = RANK) -> dict[str, Tensor]:
    """A and B for modules of these (in, out) sizes."""
    found = {}
    for name, (num_in, num_out) in shapes.items():
        found[f"{name}.lora_A.weight"] = torch.randn(rank, num_in)
        found[f"{name}.lora_B.weight"] = torch.randn(num_out, rank)
    return found


def unmerged(weight: Tensor, x: Tensor, adapter: Mapping[str, Tensor], module: str) -> Tensor:
    """W x + B (A x), as it is computed while training, without the scale."""
    a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
    return F.linear(F.linear(x, a), b)


def assert_linear(merged: Tensor, base: Tensor, added: Tensor, x: Tensor) -> None:
    expected = F.linear(x, base) + added
    assert added.abs().max() > 0.1
    torch.testing.assert_close(F.linear(x, merged), expected, rtol=1e-5, atol=1e-4)


# -- each kind of target --


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_linears(tmp_path: Path, own: bool, use_rslora: bool) -> None:
    """Also in a checkpoint of our own names, where queries, keys and values are one weight."""
    base = llama_tensors(LLAMA)
    source = tiny_llama(tmp_path / "source")
    shapes = {Q: (32, 32), DOWN: (48, 32), "model.layers.0.self_attn.v_proj": (32, 16)}
    adapter = low_rank(shapes)
    folder = write_adapter(tmp_path / "adapter", adapter, use_rslora=use_rslora)
    if own:
        convert(source, tmp_path / "own")
        source = tmp_path / "own"
    convert(source, tmp_path / "merged", "hf", adapters=[folder])
    merged = stored(tmp_path / "merged")
    scale = ALPHA / (math.sqrt(RANK) if use_rslora else RANK)
    for module, (num_in, _) in shapes.items():
        x, name = torch.randn(3, num_in), f"{module}.weight"
        assert_linear(merged[name], base[name], scale * unmerged(base[name], x, adapter, module), x)
    changed = {f"{module}.weight" for module in shapes}
    assert {n for n, tensor in merged.items() if not torch.equal(tensor, base[n])} == changed
    # The fused weights of our own files are the same numbers.
    convert(source, tmp_path / "fused", adapters=[folder])
    expected = dict(load(tmp_path / "merged").named_parameters())
    for name, parameter in load(tmp_path / "fused").named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_patterns_of_rank_and_alpha(tmp_path: Path) -> None:
    """A pattern is a module's name or its end, and may be a regular expression; the first holds."""
    base = llama_tensors(LLAMA)
    k = "model.layers.1.self_attn.k_proj"
    adapter = low_rank({Q: (32, 32)}, 2) | low_rank({DOWN: (48, 32)}, 8) | low_rank({k: (32, 16)})
    folder = write_adapter(
        tmp_path / "adapter",
        adapter,
        rank_pattern={
            "q_proj": 2,
            "self_attn.q_proj": 9,
            r"model\.layers\.\d\.mlp\.down_proj": 8,
            "roj": 1,
        },
        alpha_pattern={"0.self_attn.q_proj": 5, "mlp.down_proj": 3},
    )
    convert(tiny_llama(tmp_path / "source"), tmp_path / "merged", "hf", adapters=[folder])
    merged = stored(tmp_path / "merged")
    for module, num_in, scale in ((Q, 32, 5 / 2), (DOWN, 48, 3 / 8), (k, 32, ALPHA / RANK)):
        x, name = torch.randn(3, num_in), f"{module}.weight"
        assert_linear(merged[name], base[name], scale * unmerged(base[name], x, adapter, module), x)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_weights_stored_transposed(tmp_path: Path, prefix: str) -> None:
    """GPT-2's are [in, out], and PEFT's own flag is that of the module it saw last."""
    source = tiny_gpt2(tmp_path / "source", prefix)
    base = gpt2_tensors(json.loads((source / "config.json").read_text()), prefix)
    shapes = {"h.0.attn.c_attn": (32, 96), "h.1.attn.c_proj": (32, 32), "h.1.mlp.c_proj": (128, 32)}
    adapter = low_rank({f"transformer.{name}": shape for name, shape in shapes.items()})
    folder = write_adapter(tmp_path / "adapter", adapter, fan_in_fan_out=True)
    convert(source, tmp_path / "merged", "hf", adapters=[folder])
    merged = stored(tmp_path / "merged")
    for module, (num_in, _) in shapes.items():
        x, weight = torch.randn(3, num_in), base[f"{prefix}{module}.weight"].t()
        added = ALPHA / RANK * unmerged(weight, x, adapter, f"transformer.{module}")
        assert_linear(merged[f"transformer.{module}.weight"].t(), weight, added, x)


def test_embedding_and_head(tmp_path: Path) -> None:
    base = llama_tensors(LLAMA)
    a, b = torch.randn(RANK, 96), torch.randn(32, RANK)
    table = {"embed_tokens.lora_embedding_A": a, "embed_tokens.lora_embedding_B": b}
    adapter = low_rank({"lm_head": (32, 96)})
    folder = write_adapter(
        tmp_path / "adapter", adapter | {f"model.{name}": tensor for name, tensor in table.items()}
    )
    convert(tiny_llama(tmp_path / "source"), tmp_path / "merged", "hf", adapters=[folder])
    merged = stored(tmp_path / "merged")
    ids = torch.tensor([0, 5, 95])
    expected = F.embedding(ids, base["model.embed_tokens.weight"])
    expected = expected + ALPHA / RANK * F.linear(F.embedding(ids, a.t()), b)
    found = F.embedding(ids, merged["model.embed_tokens.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    x, head = torch.randn(3, 32), "lm_head.weight"
    added = ALPHA / RANK * unmerged(base[head], x, adapter, "lm_head")
    assert_linear(merged[head], base[head], added, x)


@pytest.mark.parametrize("target", ["embed", "head"])
@pytest.mark.parametrize("own", [False, True])
def test_one_of_a_tied_pair(tmp_path: Path, target: str, own: bool) -> None:
    """Training changed one and left the other: from then on they are two."""
    raw = LLAMA | {"tie_word_embeddings": True}
    base = llama_tensors(raw)["model.embed_tokens.weight"]
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    if own:
        convert(source, tmp_path / "own")
        source = tmp_path / "own"
    adapter = low_rank({"lm_head": (32, 96)})
    a, b = adapter.values()
    delta = ALPHA / RANK * b @ a
    if target == "embed":
        adapter = {
            "model.embed_tokens.lora_embedding_A": b.t().contiguous(),
            "model.embed_tokens.lora_embedding_B": a.t().contiguous(),
        }
    folder = write_adapter(tmp_path / "adapter", adapter)
    result = convert(source, tmp_path / "merged", adapters=[folder])
    model = load(tmp_path / "merged")
    assert not model.config.tied_head
    assert result.num_parameters == model.config.num_parameters
    changed, kept = model.embed.weight, model.head.weight
    changed, kept = (changed, kept) if target == "embed" else (kept, changed)
    assert torch.equal(kept, base)
    torch.testing.assert_close(changed.detach(), base + delta, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "merged", tmp_path / "hf", "hf")
    assert config_of(tmp_path / "hf")["tie_word_embeddings"] is False
    assert "lm_head.weight" in stored(tmp_path / "hf")


def test_a_tied_embedding_saved_as_it_was_stays_tied(tmp_path: Path) -> None:
    raw = LLAMA | {"tie_word_embeddings": True}
    table = llama_tensors(raw)["model.embed_tokens.weight"]
    adapter = low_rank({Q: (32, 32)}) | {"model.embed_tokens.weight": table}
    folder = write_adapter(tmp_path / "adapter", adapter)
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    convert(source, tmp_path / "merged", adapters=[folder])
    assert inspect(tmp_path / "merged").config.tied_head


def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    """Under each of the names that PEFT has given them; a change may come on top."""
    base = llama_tensors(LLAMA)
    norm, head, table = torch.randn(32), torch.randn(96, 32), torch.randn(96, 32)
    adapter = low_rank({"lm_head": (32, 96)}) | {
        "model.norm.weight": norm,
        "lm_head.base_layer.weight": head,
        "model.embed_tokens.modules_to_save.weight": table,
    }
    folder = write_adapter(tmp_path / "adapter", adapter, modules_to_save=["norm", "embed_tokens"])
    convert(tiny_llama(tmp_path / "source"), tmp_path / "merged", "hf", adapters=[folder])
    merged = stored(tmp_path / "merged")
    assert torch.equal(merged.pop("model.norm.weight"), norm)
    assert torch.equal(merged.pop("model.embed_tokens.weight"), table)
    x = torch.randn(3, 32)
    added = ALPHA / RANK * unmerged(head, x, adapter, "lm_head")
    assert_linear(merged.pop("lm_head.weight"), head, added, x)
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_dora(tmp_path: Path) -> None:
    """Each row of W + scale B A is brought to a learned length."""
    base = llama_tensors(LLAMA)[f"{Q}.weight"]
    adapter, magnitude = low_rank({Q: (32, 32)}), torch.rand(32) + 0.5
    named = {f"{Q}.lora_magnitude_vector": magnitude}
    folder = write_adapter(tmp_path / "adapter", adapter | named, use_dora=True)
    convert(tiny_llama(tmp_path / "source"), tmp_path / "merged", "hf", adapters=[folder])
    found, x = stored(tmp_path / "merged")[f"{Q}.weight"], torch.randn(3, 32)
    plain = F.linear(x, base) + ALPHA / RANK * unmerged(base, x, adapter, Q)
    a, b = adapter.values()
    rows = [base[i] + ALPHA / RANK * sum(b[i, j] * a[j] for j in range(RANK)) for i in range(32)]
    lengths = torch.tensor([math.sqrt(float((row * row).sum())) for row in rows])
    torch.testing.assert_close(F.linear(x, found), plain * magnitude / lengths)
    torch.testing.assert_close(found.norm(dim=1), magnitude)


def test_two_adapters_add_up(tmp_path: Path) -> None:
    base = llama_tensors(LLAMA)[f"{Q}.weight"]
    adapters = [low_rank({Q: (32, 32)}, rank) for rank in (2, 3)]
    folders = [
        write_adapter(tmp_path / f"adapter{i}", adapter, r=i + 2)
        for i, adapter in enumerate(adapters)
    ]
    convert(tiny_llama(tmp_path / "source"), tmp_path / "merged", "hf", adapters=folders)
    x = torch.randn(3, 32)
    added = sum(ALPHA / (i + 2) * unmerged(base, x, adapters[i], Q) for i in range(2))
    assert isinstance(added, Tensor)
    assert_linear(stored(tmp_path / "merged")[f"{Q}.weight"], base, added, x)


def test_numbers_are_rounded_once(tmp_path: Path) -> None:
    """A change too small for the base's bfloat16 is there in a float32 result, and rounding to
    bfloat16 comes after the sum.
    """
    base = {name: tensor.bfloat16() for name, tensor in llama_tensors(LLAMA).items()}
    source = write_folder(tmp_path / "source", LLAMA | {"torch_dtype": "bfloat16"}, base)
    adapter = low_rank({Q: (32, 32)})
    a, b = adapter.values()
    b.mul_(1e-3)
    a, b = a.half(), b.half()
    named = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    folder = write_adapter(tmp_path / "adapter", named)
    exact = base[f"{Q}.weight"].double() + ALPHA / RANK * b.double() @ a.double()
    for dtype in (torch.float32, torch.bfloat16):
        convert(source, tmp_path / str(dtype), "hf", dtype, adapters=[folder])
        found = stored(tmp_path / str(dtype))[f"{Q}.weight"]
        torch.testing.assert_close(found, exact.to(dtype), rtol=1e-6, atol=1e-7)
    assert not torch.equal(exact.float().bfloat16().double(), exact)


def test_transformers_computes_the_same_with_the_merged_weights(tmp_path: Path) -> None:
    """Weights merged by hand in transformers' own modules are the oracle, expert by expert."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    for name, targets in (
        ("qwen2-biases-tied", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("phi3-fused-window", "qkv_proj o_proj gate_up_proj down_proj"),
        ("gpt_neox-parallel", "query_key_value dense dense_h_to_4h dense_4h_to_h"),
        ("gpt2-tied", "c_attn c_proj c_fc"),
    ):
        source = write_checkpoint(tmp_path / name / "source", name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        adapter: dict[str, Tensor] = {}
        for module_name, module in theirs.named_modules():
            if module_name.split(".")[-1] not in targets.split():
                continue
            is_conv = type(module).__name__ == "Conv1D"
            weight = module.weight.data.t() if is_conv else module.weight.data
            pair = low_rank({module_name: (weight.size(1), weight.size(0))}, RANK)
            a, b = (tensor.mul_(0.2) for tensor in pair.values())
            weight += ALPHA / RANK * b @ a
            adapter |= pair
        folder = write_adapter(tmp_path / name / "adapter", adapter)
        convert(source, tmp_path / name / "merged", adapters=[folder])
        ids, positions = torch.arange(3, 15).unsqueeze(0), torch.arange(12).unsqueeze(0)
        with torch.no_grad():
            expected = theirs.eval()(ids).logits
            found = load(tmp_path / name / "merged")(ids, positions)
            before = load(source)(ids, positions)
        assert (expected - before).abs().max() > 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- what is refused --


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("use_qalora", True),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("kasa_config", {"beta": 1.0}),
        ("rank_pattern", {"q_proj": "many"}),
        ("lora_alpha", "many"),
        ("rank_pattern", {"q_(proj": 2}),
        ("alpha_pattern", [2]),
    ],
)
def test_adapters_that_are_more_than_a_sum(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_adapter(tmp_path / "adapter", low_rank({Q: (32, 32)}), **{key: value})
    source = tiny_llama(tmp_path / "source")
    refused(key, repr(value), source=source, out=tmp_path / "merged", adapters=[folder])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (low_rank({"model.layers.7.self_attn.q_proj": (32, 32)}), ("no place", "layers.7")),
        (low_rank({"model.layers.0.mlp.experts": (32, 32)}), ("no place", "lora_A", "lora_B")),
        ({"model.layers.0.other.weight": torch.ones(2)}, ("no place", "other")),
        ({f"{Q}.lora_A.weight": torch.ones(RANK, 32)}, (Q, "has no lora_B")),
        ({f"{Q}.lora_B.weight": torch.ones(32, RANK)}, (Q, "has no lora_A")),
        (low_rank({Q: (32, 32)}, 3), (Q, "rank 3", "says 4")),
        (low_rank({Q: (32, 32)}) | {f"{Q}.lora_A.weight": torch.ones(3, 32)}, (Q, "rank 3")),
        (low_rank({Q: (32, 31)}), (Q, "[31, 32]", "[32, 32]")),
        (low_rank({DOWN: (32, 48)}), (DOWN, "[48, 32]", "[32, 48]")),
        (low_rank({Q: (32, 32)}) | {f"{Q}.lora_B.bias": torch.ones(32)}, ("lora_B.bias",)),
        ({"model.norm.weight": torch.ones(33)}, ("model.norm.weight", "[33]", "[32]")),
        (
            {
                "model.embed_tokens.lora_embedding_A": torch.ones(RANK, 96),
                "model.embed_tokens.lora_embedding_B": torch.ones(32, RANK),
                "model.embed_tokens.lora_magnitude_vector": torch.ones(96),
            },
            ("embed_tokens", "use_dora"),
        ),
        ({}, ("there are no tensors",)),
        ({f"{Q}.lora_A.weight": torch.ones(4), f"{Q}.lora_B.weight": torch.ones(4)}, ("matrices",)),
        (
            low_rank({Q: (32, 32)}) | {f"{Q}.lora_magnitude_vector": torch.ones(7)},
            (Q, "do not fit together"),
        ),
    ],
)
def test_tensors_without_a_place(
    tmp_path: Path, tensors: dict[str, Tensor], words: tuple[str, ...]
) -> None:
    folder = write_adapter(tmp_path / "adapter", tensors)
    source = tiny_llama(tmp_path / "source")
    refused(str(folder), *words, source=source, out=tmp_path / "merged", adapters=[folder])


def test_dora_without_its_magnitudes_is_no_lora(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", low_rank({Q: (32, 32)}), use_dora=True)
    source = tiny_llama(tmp_path / "source")
    words = (Q, "use_dora is set", "no lora_magnitude_vector")
    refused(*words, source=source, out=tmp_path / "merged", adapters=[folder])


def test_a_rank_that_is_no_count(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", low_rank({Q: (32, 32)}), r=4.5)
    source = tiny_llama(tmp_path / "source")
    refused(Q, "rank 4", "4.5", source=source, out=tmp_path / "merged", adapters=[folder])


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    place = {"source": source, "out": tmp_path / "merged"}
    refused("adapter_config.json", adapters=[source], **place)
    folder = write_adapter(tmp_path / "adapter", low_rank({Q: (32, 32)}), lora_alpha=None)
    refused("lora_alpha = None", adapters=[folder], **place)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n.removeprefix("base_model."): t for n, t in tensors.items()}, folder / "x")
    (folder / "x").rename(folder / "adapter_model.safetensors")
    refused("no part of a LoRA", "lora_A", adapters=[folder], **place)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    refused("not a complete safetensors file", adapters=[folder], **place)
    (folder / "adapter_model.safetensors").unlink()
    refused("no adapter_model.safetensors", adapters=[folder], **place)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_llama(tmp_path / "source"), tmp_path / "merged"
    folders = [
        write_adapter(tmp_path / f"adapter{i}", low_rank({name: (32, 32)}))
        for i, name in enumerate((Q, "model.layers.1.self_attn.o_proj"))
    ]
    options = [word for folder in folders for word in ("--lora", str(folder))]
    assert main(["convert", str(source), str(out), "--to", "hf", *options]) == 0
    base, merged = stored(source), stored(out)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{Q}.weight", "model.layers.1.self_attn.o_proj.weight"}
    inner = tiny_llama(out / "source")
    assert main(["convert", str(inner), str(out), "--force"]) == 2
    assert "would be replaced" in capsys.readouterr().err
