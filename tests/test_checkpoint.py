"""Loading a folder: what is read, in which dtype, and one clear ValueError for what is wrong."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, raw_config, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import GPT2, LLAMA, gpt2_tensors, llama_tensors, tiny_gpt2, tiny_llama, write_folder
from torch import Tensor

from gptfast.checkpoint import inspect
from gptfast.loading import load
from gptfast.model import Transformer

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")


def refused(folder: Path, *needles: str) -> None:
    """One line that names the thing, from `inspect` already: before anything is allocated."""
    for read in (inspect, load):
        with pytest.raises(ValueError, match=r".+") as caught:
            read(folder)
        message = str(caught.value)
        assert "\n" not in message and str(folder) in message
        for needle in needles:
            assert needle in message


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Applies `change` to the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def parameters(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def assert_same_model(first: Transformer, second: Transformer) -> None:
    ours, theirs = parameters(first), parameters(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# -- what is read --


def test_fused_and_transposed_weights(tmp_path: Path) -> None:
    raw = LLAMA | {"attention_bias": True}
    tensors = llama_tensors(raw)
    model = load(write_folder(tmp_path / "llama", raw, tensors))
    prefix = "model.layers.1.self_attn"
    for kind in ("weight", "bias"):
        expected = torch.cat([tensors[f"{prefix}.{part}_proj.{kind}"] for part in "qkv"])
        assert torch.equal(parameters(model)[f"blocks.1.attention.qkv.{kind}"], expected)
    tensors = gpt2_tensors(GPT2)
    model = load(write_folder(tmp_path / "gpt2", GPT2, tensors))
    expected = tensors["transformer.h.1.mlp.c_fc.weight"].T
    assert torch.equal(parameters(model)["blocks.1.mlp.up.weight"], expected)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(("raw", "tensors"), [(LLAMA, llama_tensors), (GPT2, gpt2_tensors)])
def test_shards_equal_a_single_file(raw: dict[str, Any], tensors: Any, tmp_path: Path) -> None:
    """One part of a fused weight may lie in another shard than the next."""
    single = load(write_folder(tmp_path / "single", raw, tensors(raw)))
    sharded = write_folder(tmp_path / "sharded", raw, tensors(raw), num_shards=3)
    assert_same_model(single, load(sharded))
    (sharded / INDEX).unlink()
    assert_same_model(single, load(sharded))


def test_an_index_decides_which_files_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", LLAMA, llama_tensors(LLAMA), num_shards=2)
    single = load(folder)
    (folder / "other.safetensors").write_text("not read")
    assert_same_model(single, load(folder))


def test_a_model_file_without_an_index_stands_for_itself(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "consolidated.safetensors").write_text("not read")
    load(folder)


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    load(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_masks_are_ignored(prefix: str, tmp_path: Path) -> None:
    """The first uploads carry the causal mask of every layer, some as booleans."""
    folder = tiny_gpt2(tmp_path / "model", prefix)
    plain = load(folder)

    def add_masks(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(folder, add_masks)
    assert_same_model(plain, load(folder))


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    """transformers before 4.31 saved the frequencies of every layer."""
    folder = tiny_llama(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    load(folder)


@pytest.mark.parametrize("maker", [tiny_llama, tiny_gpt2])
def test_a_tied_head_in_the_file_is_not_read_twice(
    maker: Callable[..., Path], tmp_path: Path
) -> None:
    folder = maker(tmp_path / "model", tie_word_embeddings=True)
    plain = load(folder)

    def add_head(tensors: dict[str, Tensor]) -> None:
        embed = next(
            tensors[name] for name in tensors if name.endswith(("wte.weight", "tokens.weight"))
        )
        tensors["lm_head.weight"] = embed.clone()

    rewrite(folder, add_head)
    model = load(folder)
    assert model.head.weight is model.embed.weight
    assert_same_model(plain, model)


@pytest.mark.parametrize("shape", [(96, 32), (10, 32)])
def test_a_tied_head_that_differs_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    """transformers 4 took the embedding, 5 takes the head: either would be a guess."""
    folder = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(shape)}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs .*tie_word_embeddings") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# -- dtype and place --


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_auto_dtype(stored: torch.dtype, key: str | None, tmp_path: Path) -> None:
    """What config.json says in either spelling, else what the file holds."""
    raw = LLAMA | ({key: "float16"} if key else {})
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors(raw).items()}
    folder = write_folder(tmp_path / "model", raw, tensors)
    wanted = torch.float16 if key else stored
    assert inspect(folder).dtype == wanted
    assert load(folder).embed.weight.dtype == wanted


@pytest.mark.parametrize("named", [None, "auto", "float8_e4m3fn", 16])
def test_auto_dtype_where_config_names_none_of_ours(named: Any, tmp_path: Path) -> None:
    raw = LLAMA | {"torch_dtype": named}
    tensors = {name: tensor.bfloat16() for name, tensor in llama_tensors(raw).items()}
    assert inspect(write_folder(tmp_path / "model", raw, tensors)).dtype == torch.bfloat16


def test_auto_dtype_looks_at_weights_only(tmp_path: Path) -> None:
    """A boolean mask beside float16 weights once made the model float32."""
    tensors = {name: tensor.half() for name, tensor in gpt2_tensors(GPT2).items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).bool()
    assert inspect(write_folder(tmp_path / "model", GPT2, tensors)).dtype == torch.float16


def test_auto_dtype_of_mixed_files_is_that_of_the_large_weights(tmp_path: Path) -> None:
    """Norms are often kept in float32."""
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in llama_tensors(LLAMA).items()
    }
    folder = write_folder(tmp_path / "model", LLAMA, tensors)
    assert inspect(folder).dtype == torch.bfloat16
    assert load(folder).norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp16", "float16", torch.bfloat16])
@pytest.mark.parametrize("maker", [tiny_llama, tiny_gpt2])
def test_conversion(maker: Callable[..., Path], name: str | torch.dtype, tmp_path: Path) -> None:
    """Each weight is rounded once, from what is stored."""
    folder = maker(tmp_path / "model")
    exact, converted = load(folder), load(folder, name)
    dtype = torch.float16 if name in ("fp16", "float16") else torch.bfloat16
    weights = parameters(converted)
    assert all(tensor.dtype == dtype for tensor in weights.values())
    for ours, tensor in parameters(exact).items():
        if ours in weights:
            assert torch.equal(weights[ours], tensor.to(dtype)), ours
        else:  # packed for the CPU
            linear = converted.get_submodule(ours.removesuffix(".weight"))
            assert torch.equal(linear.dequantize(), tensor.to(dtype)), ours


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int32, None, 16])
def test_unknown_dtype(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is unknown; use auto, bf16"):
        load(tiny_llama(tmp_path / "model"), dtype)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that torch.empty has given, but for those without memory (meta)."""
    tensors: list[Tensor] = []
    empty = torch.empty

    def recorded(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        if tensor.device.type != "meta":
            tensors.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    return tensors


def test_memory_is_checked_before_any_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocated: list[Tensor]
) -> None:
    folder = tiny_llama(tmp_path / "model")
    needed = 2 * inspect(folder).config.num_parameters
    monkeypatch.setattr("gptfast.device.free_memory", lambda device: needed)
    load(folder, "bf16")
    assert allocated
    allocated.clear()
    monkeypatch.setattr("gptfast.device.free_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match=r"needs 43\.33 kB, and 43\.33 kB are free .*smaller"):
        load(folder, "bf16")
    assert not allocated


def test_each_weight_is_allocated_once(tmp_path: Path, allocated: list[Tensor]) -> None:
    """Every parameter is the tensor that was allocated for it, in its final dtype."""
    folder = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    model = load(folder, "fp16")
    assert sum(tensor.nbytes for tensor in allocated) == 2 * model.config.num_parameters
    addresses = {tensor.data_ptr() for tensor in parameters(model).values()}
    assert addresses == {tensor.data_ptr() for tensor in allocated}


def test_progress_sees_every_parameter(tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(items: Iterable[Any]) -> Iterable[Any]:
        for name in items:
            seen.append(name)
            yield name

    model = load(tiny_gpt2(tmp_path / "model"), progress=progress)
    assert sorted(seen) == sorted(parameters(model))


# -- config.json --


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "no config.json")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b'"llama"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"null"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_files_that_are_no_json_object(name: str, text: bytes, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / name).write_bytes(text)
    refused(folder, name, "JSON")


def test_unsupported_facts_are_refused_with_the_folder_untouched(tmp_path: Path) -> None:
    """tests/test_families.py has the list; here that loading does not get past them."""
    for changes in ({"model_type": "bert"}, {"hidden_act": "xielu"}, {"num_hidden_layers": "2"}):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA | changes))
        for read in (inspect, load):
            with pytest.raises(ValueError, match=r"config\.json: \w+ "):
                read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1000},
        {"hidden_size": 2**40},
        {"vocab_size": 2**40},
        {"intermediate_size": 2**40},
    ],
)
def test_facts_far_beyond_the_files(changes: dict[str, int], tmp_path: Path) -> None:
    """To lay out such a model would take hours, or overflow."""
    folder = tiny_llama(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    refused(folder, "describes a model of", "the files hold 21,664")


# -- weights --


def test_no_weights(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused(folder, "no .safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(
        folder,
        "no .safetensors",
        "pytorch_model.bin",
        "pickles are not read here",
        "gptfast convert",
    )


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, "missing", name)


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "model", tie_word_embeddings=False)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "missing", "lm_head.weight")


def test_missing_layer_is_summed_up(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))
    refused(folder, "missing", "model.layers.2.input_layernorm.weight", "and 5 more")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "surprise",
    ],
)
def test_extra_tensor(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refused(folder, name, "no place for")


def test_a_name_with_and_without_the_prefix(tmp_path: Path) -> None:
    """Which of the two counts would be a guess."""
    folder = tiny_gpt2(tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({"wte.weight": torch.zeros(96, 32)}))
    refused(folder, "wte.weight", "no place for")


@pytest.mark.parametrize(
    ("maker", "changes"),
    [
        (tiny_llama, {"model.norm.weight": (33,)}),
        (tiny_llama, {"model.norm.weight": (1, 32)}),
        (tiny_llama, {"model.norm.weight": ()}),
        (tiny_llama, {"model.embed_tokens.weight": (32, 96)}),
        (tiny_llama, {"lm_head.weight": (95, 32)}),
        (tiny_llama, {"model.layers.1.mlp.down_proj.weight": (48, 32)}),
        (tiny_gpt2, {"transformer.h.0.mlp.c_fc.weight": (128, 32)}),
        (tiny_gpt2, {"transformer.h.0.attn.c_attn.weight": (96, 32)}),
        (tiny_gpt2, {"transformer.wpe.weight": (65, 32)}),
    ],
)
def test_misshapen_tensor(
    maker: Callable[..., Path], changes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    folder = maker(tmp_path / "model")
    for name, shape in changes.items():
        rewrite(folder, lambda t, name=name, shape=shape: t.update({name: torch.zeros(shape)}))
        refused(folder, name, f"shape {list(shape)}", "needs")


def test_misshapen_parts_whose_sum_fits(tmp_path: Path) -> None:
    """q 32, k 16, v 16 rows: 24, 24 and 16 would fill the fused weight just as well."""
    folder = tiny_llama(tmp_path / "model")
    prefix = "model.layers.0.self_attn"
    wrong = {f"{prefix}.q_proj.weight": torch.zeros(24, 32)}
    wrong |= {f"{prefix}.k_proj.weight": torch.zeros(24, 32)}
    rewrite(folder, lambda tensors: tensors.update(wrong))
    refused(folder, f"{prefix}.q_proj.weight", "[24, 32]", "[32, 32]")


def test_a_weight_stored_the_other_way_round_is_refused_not_turned(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "model", n_inner=40)
    name = "transformer.h.1.mlp.c_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(folder, name, "[32, 40]", "[40, 32]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(48, 32).to(dtype)}))
    refused(folder, name, "only float weights")


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refused(folder, "model.safetensors", "complete", f"{len(whole[:keep]):,} bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage, and quite a lot of it",
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0{}",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_garbage(content: bytes, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder)


# -- shards --


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", LLAMA, llama_tensors(LLAMA), num_shards=3)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    refused(sharded, INDEX, SHARDS[1])


@pytest.mark.parametrize("where", ["../x.safetensors", "{}/x.safetensors", "", ".", "..", "a/b"])
def test_shards_stay_inside_the_folder(where: str, sharded: Path) -> None:
    """Even where the file is there and complete."""
    shutil.copy(sharded / SHARDS[0], sharded.parent / "x.safetensors")
    shard = where.format(sharded.parent)
    edit_index(sharded, lambda shards: shards.update({"model.norm.weight": shard}))
    refused(sharded, INDEX, repr(shard), "plain file name")


@pytest.mark.parametrize("shard", [None, 3, ["a.safetensors"], {"file": "a"}])
def test_shards_are_named_by_strings(shard: Any, sharded: Path) -> None:
    edit_index(sharded, lambda shards: shards.update({"model.norm.weight": shard}))
    refused(sharded, INDEX, repr(shard))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 1}])
def test_an_index_without_a_map(index: dict[str, Any], sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, "weight_map")


def test_an_index_that_promises_what_a_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda shards: shards.update({"model.layers.0.missing": SHARDS[0]}))
    refused(sharded, INDEX, "model.layers.0.missing")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    def swap(shards: dict[str, Any]) -> None:
        shards["model.norm.weight"] = next(
            shard for shard in SHARDS if shard != shards["model.norm.weight"]
        )

    edit_index(sharded, swap)
    refused(sharded, INDEX, "model.norm.weight")


def test_one_tensor_in_two_files(sharded: Path) -> None:
    """Without an index, the last file read once won silently."""
    (sharded / INDEX).unlink()
    tensors = load_file(sharded / SHARDS[0])
    tensors["model.norm.weight"] = torch.zeros(32)
    save_file(tensors, sharded / SHARDS[0])
    refused(sharded, "model.norm.weight", "both", SHARDS[0])


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, SHARDS[1], "complete")


# -- other places and forms --


def gpt_oss_folder(folder: Path) -> Path:
    """A gpt-oss whose sizes are multiples of a block of 32."""
    name = next(name for name in CASES if name.startswith("gpt_oss-"))
    raw = raw_config(name) | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    return write_checkpoint(folder, name, raw)


def test_mxfp4_experts_are_read(tmp_path: Path) -> None:
    """As published: blocks and scales in place of the experts' weights. The same model with these
    written out in bfloat16, [in, out], is the oracle.
    """
    mxfp4 = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="transformers is the oracle here"
    )
    packed, plain = tmp_path / "packed", gpt_oss_folder(tmp_path / "plain")
    shutil.copytree(plain, packed)
    tensors = load_file(plain / "model.safetensors")
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(256, (num_experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (num_experts, rows, columns // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = mxfp4.convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(stored, packed / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, plain / "model.safetensors")
    raw = json.loads((packed / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(raw))
    found, expected = load(packed, "fp32", quant="none"), load(plain, "fp32")
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    kept = load(packed, "fp32")
    assert {form.name for form in kept.formats.values()} == {"mxfp4"}
    for name in kept.formats:
        assert torch.equal(
            kept.get_submodule(name).dequantize(), expected.get_parameter(f"{name}.weight")
        )
    del stored["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(stored, packed / "model.safetensors")
    refused(packed, "missing tensors", "layers.0.mlp.experts.down_proj")


@pytest.mark.parametrize("method", ["exl2", "quark", 4, None])
def test_quantized_weights_are_refused_by_name(tmp_path: Path, method: Any) -> None:
    folder = tiny_llama(tmp_path / "model", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, repr(method), "gptq, awq", "unquantized")


@pytest.mark.parametrize("settings", ["gptq", ["fp8"], 4])
def test_quantization_that_is_no_object_is_refused(tmp_path: Path, settings: Any) -> None:
    folder = tiny_llama(tmp_path / "model", quantization_config=settings)
    refused(folder, repr(settings), "a JSON object is needed")


def test_a_router_bias_stays_exact_in_half_precision(tmp_path: Path) -> None:
    """DeepSeek-V3 chooses by scores that differ in the third digit after this bias of about 7."""
    name = next(name for name in CASES if name.startswith("deepseek_v3-"))
    folder = write_checkpoint(tmp_path / "model", name)
    model, wide = load(folder, torch.bfloat16), load(folder, torch.float32)
    found = {n: p for n, p in model.named_parameters() if n.endswith("router.correction")}
    assert found and all(p.dtype == torch.float32 for p in found.values())
    assert all(torch.equal(p, wide.get_parameter(n)) for n, p in found.items())


def test_experts_need_room_to_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's experts stand in memory twice for a moment."""
    name = next(name for name in CASES if name.startswith("mixtral-"))
    folder = write_checkpoint(tmp_path / "model", name)
    config = inspect(folder).config
    assert config.experts is not None
    layer = config.experts.num_experts * 2 * config.experts.hidden_dim * config.dim
    needed = 2 * (config.num_parameters + layer)
    monkeypatch.setattr("gptfast.device.free_memory", lambda device: needed)
    load(folder, "bf16")
    monkeypatch.setattr("gptfast.device.free_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError):
        load(folder, "bf16")


def test_parts_of_a_multimodal_model_are_left_out_and_named(tmp_path: Path) -> None:
    raw = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 8}}
    tensors = {f"language_model.{n}": t for n, t in llama_tensors(LLAMA).items()}
    vision = {"vision_tower.layer.weight": torch.ones(2, 2), "projector.bias": torch.ones(2)}
    folder = write_folder(tmp_path / "model", raw, tensors | vision)
    assert inspect(folder).left_out == "2 tensors of projector, vision_tower"
    plain = load(write_folder(tmp_path / "plain", LLAMA, llama_tensors(LLAMA)))
    for name, parameter in load(folder).named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name))
    write_folder(folder, raw, tensors | vision | {"language_model.model.odd": torch.ones(2)})
    refused(folder, "no place for", "language_model.model.odd")


def test_layers_that_predict_further_ahead_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 publishes one layer more than it generates with."""
    name = next(name for name in CASES if name.startswith("deepseek_v3-"))
    folder = write_checkpoint(tmp_path / "model", name)
    tensors = load_file(folder / "model.safetensors")
    num_layers = inspect(folder).config.num_layers
    tensors[f"model.layers.{num_layers}.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "no place for", "eh_proj")
    raw = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    assert inspect(folder).left_out == "1 tensors of layers"


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    refused(tiny_llama(tmp_path / "model", gptfast_format=99), "gptfast_format is 99", "reads 1")
