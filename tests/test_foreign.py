"""Checkpoints of other engines: written here from a known model as those engines write them, then
converted; the model that comes out must be the one that went in.
"""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_convert import assert_same_model, config_of, listing, refused
from tiny import GPT2, LLAMA, gpt2_tensors, llama_tensors, write_folder
from torch import Tensor

from gptfast.commands import main
from gptfast.convert import convert
from gptfast.engine import Engine
from gptfast.loading import load
from gptfast.sampling import SamplingParams

KINDS = {  # Hugging Face's name of a layer's tensor -> Meta's
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
PARAMS = {"n_heads": 4, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seq_len": 64}


def in_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of each head as Meta stores them: i and i + D/2 of Hugging Face's side by side."""
    rows = []
    for head in weight.split(head_dim):
        for i in range(head_dim // 2):
            rows += [head[i], head[i + head_dim // 2]]
    return torch.stack(rows)


def meta_tensors(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        found["output.weight"] = tensors["lm_head.weight"]
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    for layer in range(raw["num_hidden_layers"]):
        for theirs, kind in KINDS.items():
            tensor = tensors[f"model.layers.{layer}.{theirs}.weight"]
            paired = kind in ("attention.wq", "attention.wk")
            found[f"layers.{layer}.{kind}.weight"] = (
                in_pairs(tensor, head_dim) if paired else tensor
            )
    return found


def write_llama2c(path: Path, tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> Path:
    """As llama2.c's legacy export: seven numbers, then each kind for all layers."""
    meta, num_layers = meta_tensors(tensors, raw), raw["num_hidden_layers"]
    shared = "output.weight" not in meta
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    header = [raw[key] for key in keys.split()]
    header += [raw["vocab_size"] * (1 if shared else -1), raw["max_position_embeddings"]]
    parts = [meta["tok_embeddings.weight"]]
    order = "attention_norm attention.wq attention.wk attention.wv attention.wo ffn_norm"
    for kind in [*order.split(), *(f"feed_forward.w{i}" for i in (1, 2, 3))]:
        parts += [meta[f"layers.{layer}.{kind}.weight"] for layer in range(num_layers)]
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    rotations = torch.full((2, raw["max_position_embeddings"], head_dim // 2), torch.nan)
    parts += [meta["norm.weight"], rotations]
    parts += [] if shared else [meta["output.weight"]]
    numbers = torch.cat([part.float().flatten() for part in parts])
    path.write_bytes(struct.pack("7i", *header) + numbers.numpy().tobytes())
    return path


# -- llama2.c --


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tmp_path: Path, tied: bool) -> None:
    raw = LLAMA | {"tie_word_embeddings": tied}
    tensors = llama_tensors(raw)
    original = write_folder(tmp_path / "original", raw, tensors)
    path = write_llama2c(tmp_path / "model.bin", tensors, raw)
    (tmp_path / "tokenizer.model").write_text("words")
    (tmp_path / "tokenizer.bin").write_text("scores")
    assert convert(path, tmp_path / "own").has_tokenizer
    assert_same_model(tmp_path / "own", original)
    convert(path, tmp_path / "hf", "hf")
    assert_same_model(tmp_path / "hf", original)
    found = config_of(tmp_path / "hf")
    assert found["rms_norm_eps"] == 1e-5 and found["rope_theta"] == 10000
    assert found["max_position_embeddings"] == 64 and found["eos_token_id"] == [1, 2]
    names = listing(tmp_path / "hf").keys()
    assert names == {"config.json", "model.safetensors", "tokenizer.model"}


def test_stories_through_llama2c_are_the_published_ones(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "checkpoints"
    raw = json.loads((folder / "stories260K-hf" / "config.json").read_text())
    tensors = load_file(folder / "stories260K-hf" / "model.safetensors")
    path = write_llama2c(tmp_path / "stories260K.bin", tensors, raw)
    convert(path, tmp_path / "own")
    golden = json.loads((folder / "stories260K-golden" / "golden_greedy.json").read_text())
    engine = Engine(load(tmp_path / "own"), 3)
    expected = {}
    for case in golden["cases"]:
        prompt, ids = case["prompt_ids"], case["token_ids"]
        params = SamplingParams(
            temperature=0, max_new_tokens=len(ids) - len(prompt), ignore_eos=True
        )
        expected[engine.submit(prompt, params)] = ids[len(prompt) :]
    found: dict[int, list[int]] = {request: [] for request in expected}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.token_ids
    assert found == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-4], ("bytes found", "llama2.c")),
        (lambda data: data + b"\0\0\0\0", ("bytes found",)),
        (lambda data: data[:20], ("nor a llama2.c model",)),
        (lambda data: b"", ("neither",)),
        (lambda data: struct.pack("2I", 0x616B3432, 2) + data[8:], ("version 2", "--version 0")),
        (lambda data: struct.pack("7i", 32, 48, 2, 4, 3, 96, 64) + data[28:], ("neither",)),
        (lambda data: struct.pack("7i", *[2**31 - 1] * 7) + data[28:], ("neither",)),
    ],
)
def test_files_that_are_no_llama2c(tmp_path: Path, change: Any, words: tuple[str, ...]) -> None:
    path = write_llama2c(tmp_path / "model.bin", llama_tensors(LLAMA), LLAMA)
    path.write_bytes(change(path.read_bytes()))
    refused(str(path), *words, source=path, out=tmp_path / "own")


# -- gpt-fast and Meta --


def fused(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-fast keeps queries, keys and values in one tensor."""
    found = {}
    for name, tensor in meta.items():
        if name.endswith("wq.weight"):
            parts = [meta[name.replace("wq", part)] for part in ("wq", "wk", "wv")]
            found[name.replace("wq", "wqkv")] = torch.cat(parts)
        elif not name.endswith(("wk.weight", "wv.weight")):
            found[name] = tensor
    return found


@pytest.mark.parametrize("spelling", ["config.json", "params.json", "--config", "gpt-fast"])
@pytest.mark.parametrize("layout", ["gpt-fast", "meta"])
def test_model_pth(tmp_path: Path, layout: str, spelling: str) -> None:
    raw = LLAMA | {"torch_dtype": "bfloat16"}
    tensors = {name: tensor.bfloat16() for name, tensor in llama_tensors(raw).items()}
    original = write_folder(tmp_path / "original", raw, tensors)
    folder = tmp_path / "llama"
    folder.mkdir()
    meta = meta_tensors(tensors, raw)
    torch.save({}, folder / "training_args.bin")
    (folder / "tokenizer.bin").write_text("scores")
    meta["rope.freqs"] = meta["layers.0.attention.mask"] = torch.ones(4)
    torch.save(fused(meta) if layout == "gpt-fast" else meta, folder / "model.pth")
    facts = None
    if spelling == "config.json":
        (folder / spelling).write_text(json.dumps(raw))
    elif spelling == "params.json":
        (folder / spelling).write_text(json.dumps(PARAMS | {"dim": 32, "vocab_size": -1}))
    else:
        facts = tmp_path / "facts.json"
        gpt_fast = {"n_head": 4, "norm_eps": 1e-5, "rope_base": 10000, "block_size": 64}
        facts.write_text(json.dumps(PARAMS if spelling == "--config" else gpt_fast))
    for source, to in ((folder, "gptfast"), (folder / "model.pth", "hf")):
        convert(source, tmp_path / to, to, facts=facts, allow_pickle=True)
        assert_same_model(tmp_path / to, original)
        assert config_of(tmp_path / to)["num_key_value_heads"] == 2


def test_what_a_pth_does_not_say(tmp_path: Path) -> None:
    path, facts = tmp_path / "model.pth", tmp_path / "facts.json"
    torch.save(fused(meta_tensors(llama_tensors(LLAMA), LLAMA)), path)
    place = {"source": path, "out": tmp_path / "own", "allow_pickle": True}
    refused("num_attention_heads (n_heads)", "rope_theta", "--config", **place)
    for key, word in (("n_heads", "num_attention_heads"), ("norm_eps", "rms_norm_eps")):
        facts.write_text(json.dumps({k: v for k, v in PARAMS.items() if k != key}))
        refused(f"does not say {word} ({key});", facts=facts, **place)
    facts.write_text(json.dumps(PARAMS | {"use_scaled_rope": True}))
    refused("use_scaled_rope", "config.json", facts=facts, **place)
    facts.write_text(json.dumps(PARAMS | {"n_heads": 5}))
    refused("wo.weight", "5 heads", facts=facts, **place)
    facts.write_text(json.dumps(PARAMS | {"n_heads": "4"}))
    refused("num_attention_heads is '4'", facts=facts, **place)
    facts.write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))
    refused("missing tensors", "layers.2", facts=facts, **place)
    facts.write_text("[]")
    refused("JSON object", facts=facts, **place)


@pytest.mark.parametrize("layout", ["gpt-fast", "meta", "nanogpt"])
def test_each_tensor_is_needed_in_its_shape(tmp_path: Path, layout: str) -> None:
    path, facts = tmp_path / "model.pth", tmp_path / "facts.json"
    facts.write_text(json.dumps(PARAMS))
    place = {"source": path, "out": tmp_path / "own", "allow_pickle": True, "facts": facts}
    if layout == "nanogpt":
        tensors = gpt2_tensors(GPT2)
        linears = [n for n in tensors if ".c_" in n and n.endswith("weight")]
        tensors |= {name: tensors[name].t() for name in linears}
    else:
        tensors = meta_tensors(llama_tensors(LLAMA), LLAMA)
        tensors = fused(tensors) if layout == "gpt-fast" else tensors
    optional = ("output.weight", "bias")  # without them heads are tied and biases zero
    for name, tensor in tensors.items():
        for changed in (None, torch.tensor(1.0), tensor[:-1], tensor[..., None]):
            state = {n: t for n, t in tensors.items() if n != name}
            if changed is not None:
                state[name] = changed
            elif name.endswith(optional):
                continue
            if layout == "nanogpt":
                sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64}
                torch.save({"model": state, "model_args": sizes | {"vocab_size": 96}}, path)
            else:
                torch.save(state, path)
            with pytest.raises(ValueError):
                convert(**place)


def test_a_training_checkpoint_of_llama2c(tmp_path: Path) -> None:
    tensors = llama_tensors(LLAMA)
    original = write_folder(tmp_path / "original", LLAMA, tensors)
    meta = {f"_orig_mod.{name}": t for name, t in meta_tensors(tensors, LLAMA).items()}
    arguments = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    torch.save({"model": meta, "model_args": arguments, "iter_num": 3}, tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "own", allow_pickle=True)
    assert_same_model(tmp_path / "own", original)


# -- nanoGPT --


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path: Path, bias: bool) -> None:
    raw = GPT2 | {"activation_function": "gelu"}
    tensors = gpt2_tensors(raw)
    if not bias:
        tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("bias")}
    original = write_folder(tmp_path / "original", raw, tensors)
    state = {}
    for name, tensor in tensors.items():
        if bias or not name.endswith("bias"):
            linear = ".c_" in name and name.endswith("weight")
            state[f"_orig_mod.{name}"] = tensor.t().contiguous() if linear else tensor
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    for layer in range(2):
        state[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    arguments = {
        "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 96,
        "bias": bias, "dropout": 0.0,
    }  # fmt: skip
    checkpoint = {
        "model": state, "model_args": arguments, "iter_num": 7, "config": {"out_dir": "out"},
        "best_val_loss": torch.tensor(1.5), "optimizer": {"state": {}, "param_groups": []},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "own", allow_pickle=True)
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    ids, positions = torch.arange(3, 15).unsqueeze(0), torch.arange(12).unsqueeze(0)
    expected = load(original)(ids, positions)
    for folder in ("own", "hf"):
        assert_same_model(tmp_path / folder, original)
        model = load(tmp_path / folder)
        assert model.config.activation == load(original).config.activation
        assert model.config.eos_token_ids == ()
        torch.testing.assert_close(model(ids, positions), expected, rtol=0, atol=1e-5)
    del arguments["block_size"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    refused("block_size", source=tmp_path / "ckpt.pt", out=tmp_path / "new", allow_pickle=True)


# -- Hugging Face's pickles --


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin(tmp_path: Path, num_shards: int, zipped: bool) -> None:
    tensors = llama_tensors(LLAMA)
    original = write_folder(tmp_path / "original", LLAMA, tensors)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(LLAMA))
    torch.save({}, source / "training_args.bin")
    index = {}
    for number in range(num_shards):
        name = f"pytorch_model-{number + 1:05}-of-{num_shards:05}.bin"
        name = "pytorch_model.bin" if num_shards == 1 else name
        part = {n: tensors[n] for n in list(tensors)[number::num_shards]}
        torch.save(part, source / name, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(part, name)
    if num_shards > 1:
        text = json.dumps({"weight_map": index})
        (source / "pytorch_model.bin.index.json").write_text(text)
    refused("pickle", "--allow-pickle", source=source, out=tmp_path / "own")
    convert(source, tmp_path / "own", allow_pickle=True)
    assert_same_model(tmp_path / "own", original)
    assert not (tmp_path / "own" / "pytorch_model.bin.index.json").exists()
    if num_shards > 1:
        name = index["model.norm.weight"]
        (source / name).unlink()
        refused(name, source=source, out=tmp_path / "new", allow_pickle=True)
        text = json.dumps({"weight_map": {"model.norm.weight": "../original/x.bin"}})
        (source / "pytorch_model.bin.index.json").write_text(text)
        refused("plain files", source=source, out=tmp_path / "new", allow_pickle=True)


class Mischief:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("mischief"), "done"))


def test_pickles_that_do_more_than_hold_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    path = tmp_path / "model.pth"
    for zipped in (True, False):
        torch.save({"a": Mischief()}, path, _use_new_zipfile_serialization=zipped)
        refused(str(path), source=path, out=work / "own", allow_pickle=True)
    path.write_bytes(pickle.dumps({"a": Mischief()}, protocol=2))
    refused(str(path), source=path, out=work / "own", allow_pickle=True)
    assert not (work / "mischief").exists()


def test_pickles_of_other_things(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "model.pth"
    place = {"source": path, "out": tmp_path / "own", "allow_pickle": True}
    torch.save([torch.ones(2)], path)
    refused("dict of tensors", **place)
    torch.save({"epoch": 3}, path)
    refused("not a state dict", "epoch", **place)
    torch.save({}, path)
    refused("empty", **place)
    torch.save(llama_tensors(LLAMA), path)
    refused("no config.json", "--config", **place)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a complete file", **place)
    int8 = {name: tensor.to(torch.int8) for name, tensor in llama_tensors(LLAMA).items()}
    torch.save(int8, path)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused("I8", **place)
    torch.save(int8, folder / "other.pth")
    refused("several files", "model.pth, other.pth", **place | {"source": folder})


def test_what_is_said_of_a_hostile_pickle_is_no_advice(tmp_path: Path) -> None:
    """torch's own words are to switch the check off."""
    path = tmp_path / "model.pth"
    torch.save({"a": Mischief()}, path)
    with pytest.raises(ValueError, match="it asks for getattr; nothing of it was run") as found:
        convert(path, tmp_path / "own", allow_pickle=True)
    assert "weights_only" not in str(found.value) and "\n" not in str(found.value)


def test_damaged_pickles_and_odd_tensors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    place = {"source": path, "out": tmp_path / "own", "allow_pickle": True}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for data in (b"", b".", b"}q", b"(lp0", b"c\n\n", b"X\xff\xff", b"h\x07.", b"\x81."):
        path.write_bytes(b"\x80\x02" + data)
        refused(str(path), **place)
    name, wrong = "model.norm.weight", torch.eye(32)
    for odd in (wrong.to_sparse(), wrong.to("meta"), torch.nested.nested_tensor([wrong])):
        torch.save(llama_tensors(LLAMA) | {name: odd}, path)
        refused(str(path), **place)
    torch.save({"layers.0.attention.wo.weight": torch.ones(32, 0)}, path)
    torch.save(meta_tensors(llama_tensors(LLAMA), LLAMA) | {"norm.weight": torch.ones(0)}, path)
    refused("vectors and matrices", "norm.weight", **place)


def test_an_index_of_nonsense_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(llama_tensors(LLAMA), folder / "pytorch_model.bin")
    for named in (None, [], "x", {"a": 3}, {"a": ["b"]}, {"a": "../b.bin"}, {}):
        index = json.dumps({"weight_map": named})
        (folder / "pytorch_model.bin.index.json").write_text(index)
        refused("plain files", source=folder, out=tmp_path / "own", allow_pickle=True)


def test_a_part_of_a_model_parallel_checkpoint_is_no_model(tmp_path: Path) -> None:
    """Half of the heads and of the hidden units, as consolidated.00.pth of two has them."""
    meta = meta_tensors(llama_tensors(LLAMA), LLAMA)
    for name, tensor in meta.items():
        if any(part in name for part in (".wq.", ".wk.", ".wv.", ".w1.", ".w3.")):
            meta[name] = tensor.chunk(2)[0].clone()
        elif any(part in name for part in (".wo.", ".w2.")):
            meta[name] = tensor.chunk(2, dim=1)[0].clone()
    path, facts = tmp_path / "consolidated.00.pth", tmp_path / "facts.json"
    torch.save(meta, path)
    facts.write_text(json.dumps(PARAMS))
    place = {"source": path, "out": tmp_path / "own", "allow_pickle": True, "facts": facts}
    refused("head_dim 4, and 8", "not joined", **place)
    torch.save(meta_tensors(llama_tensors(LLAMA), LLAMA), path)
    for key, value in (("dim", 999), ("n_layers", 5), ("vocab_size", 7), ("n_kv_heads", 4)):
        facts.write_text(json.dumps(PARAMS | {key: value}))
        refused(key, str(value), **place)


def test_a_neighbour_of_a_file_is_not_its_own(tmp_path: Path) -> None:
    """A tokenizer is taken along only where no other weights could be its model."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = write_llama2c(folder / "model.bin", llama_tensors(LLAMA), LLAMA)
    (folder / "word2vec.model").write_text("vectors")
    (folder / "tokenizer_config.json").write_text("{}")
    convert(path, tmp_path / "alone")
    assert not (tmp_path / "alone" / "word2vec.model").exists()
    assert (tmp_path / "alone" / "tokenizer_config.json").is_file()
    (folder / "other.bin").write_text("")
    convert(path, tmp_path / "together")
    assert not (tmp_path / "together" / "tokenizer_config.json").exists()
    refused("leave out --config", source=path, out=tmp_path / "own", facts=tmp_path / "x.json")


def test_the_command_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = llama_tensors(LLAMA)
    path, facts = tmp_path / "model.pth", tmp_path / "facts.json"
    torch.save(fused(meta_tensors(tensors, LLAMA)), path)
    facts.write_text(json.dumps(PARAMS))
    own = tmp_path / "own"
    assert main(["convert", str(path), str(own)]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(["convert", str(path), str(own), "--allow-pickle", "--config", str(facts)]) == 0
    assert_same_model(own, write_folder(tmp_path / "original", LLAMA, tensors))
    assert "token ids only" in capsys.readouterr().err
