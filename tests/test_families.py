"""config.json -> facts: what published models mean, what transformers reads, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import GPT2, LLAMA, gpt2_shapes, llama_shapes

from gptfast.config import ModelConfig, RopeConfig
from gptfast.families import FAMILIES, model_config

# Counts as their publishers give them.
NUM_PARAMETERS = {
    "cerebras-gpt-111m.json": 111_050_496,
    "codellama_7b.json": 6_738_546_688,
    "gpt2.json": 124_439_808,
    "llama2_13b.json": 13_015_864_320,
    "llama2_70b.json": 68_976_648_192,
    "llama2_7b.json": 6_738_415_616,
    "llama-3-70b.json": 70_553_706_496,
    "llama-3-8b.json": 8_030_261_248,
    "llama3_1_8b.json": 8_030_261_248,
    "llama3_2_1b.json": 1_235_814_400,
    "llama3_2_3b.json": 3_212_749_824,
    "smollm2_135m.json": 134_515_008,
    "smollm_135m.json": 134_515_008,
    "smollm_360m.json": 361_821_120,
    "smollm_1_7b.json": 1_711_376_384,
    "tinyllama_1b_chat_v1.0.json": 1_100_048_384,
}


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "configs" / name).read_text())


# -- published models --


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_sizes(shared_data: Path, name: str) -> None:
    assert model_config(read(shared_data, name)).num_parameters == NUM_PARAMETERS[name]


def test_published_configs_are_read_as_transformers_reads_them(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    num_read = 0
    for path in sorted((shared_data / "configs").glob("*.json")):
        raw = json.loads(path.read_text())
        if raw.get("model_type") not in FAMILIES:
            continue
        theirs = transformers.AutoConfig.for_model(**raw)
        ours = model_config(raw)
        assert facts_shared_with(ours) == facts_of(theirs, raw), path.name
        num_read += 1
    assert num_read >= 18


def facts_shared_with(config: ModelConfig) -> dict[str, Any]:
    names = (
        "vocab_size dim num_layers num_heads num_kv_heads head_dim hidden_dim norm_eps tied_head"
    )
    facts = {name: getattr(config, name) for name in names.split()}
    facts |= {"bos_token_id": config.bos_token_id, "eos_token_ids": config.eos_token_ids}
    facts |= {"max_seq_len": config.max_seq_len, "qkv_bias": config.qkv_bias}
    facts |= {"mlp_bias": config.mlp_bias, "rope": None}
    if config.rope is not None:
        kind = "default" if config.rope.scaling == "none" else config.rope.scaling
        facts["rope"] = {"rope_theta": config.rope.theta, "rope_type": kind}
        if kind == "llama3":
            facts["rope"] |= {
                "factor": config.rope.factor,
                "low_freq_factor": config.rope.low_freq_factor,
                "high_freq_factor": config.rope.high_freq_factor,
                "original_max_position_embeddings": config.rope.original_max_seq_len,
            }
    return facts


def facts_of(theirs: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """The same from a transformers config. Token ids that config.json leaves out are left out:
    transformers then takes those of its default tokenizer.
    """
    gpt2 = theirs.model_type == "gpt2"
    eos = theirs.eos_token_id if "eos_token_id" in raw else []
    return {
        "vocab_size": theirs.vocab_size,
        "dim": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.n_head if gpt2 else theirs.num_key_value_heads,
        "head_dim": theirs.n_embd // theirs.n_head if gpt2 else theirs.head_dim,
        "hidden_dim": (theirs.n_inner or 4 * theirs.n_embd) if gpt2 else theirs.intermediate_size,
        "norm_eps": theirs.layer_norm_epsilon if gpt2 else theirs.rms_norm_eps,
        "tied_head": theirs.tie_word_embeddings,
        "bos_token_id": theirs.bos_token_id if "bos_token_id" in raw else None,
        "eos_token_ids": tuple(eos if isinstance(eos, list) else [eos]),
        "max_seq_len": theirs.max_position_embeddings,
        "qkv_bias": True if gpt2 else theirs.attention_bias,
        "mlp_bias": True if gpt2 else theirs.mlp_bias,
        "rope": None if gpt2 else theirs.rope_parameters,
    }


def test_llama_3_1_by_hand(shared_data: Path) -> None:
    config = model_config(read(shared_data, "llama3_1_8b.json"))
    assert config == ModelConfig(
        model_type="llama",
        vocab_size=128256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        max_seq_len=131072,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=RopeConfig(500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        tied_head=False,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_gpt2_by_hand(shared_data: Path) -> None:
    config = model_config(read(shared_data, "gpt2.json"))
    assert config == ModelConfig(
        model_type="gpt2",
        vocab_size=50257,
        dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        hidden_dim=3072,
        max_seq_len=1024,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        gated_mlp=False,
        rope=None,
        tied_head=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_token_id=50256,
        eos_token_ids=(50256,),
    )


# -- spellings and defaults --


@pytest.mark.parametrize(
    ("generation", "raw_eos", "expected"),
    [
        (None, 2, (2,)),
        (None, [2, 5], (2, 5)),
        (None, None, ()),
        (None, [], ()),
        ({}, 2, (2,)),
        ({"eos_token_id": None}, 2, (2,)),
        ({"eos_token_id": []}, 2, (2,)),
        ({"eos_token_id": 7}, 2, (7,)),
        ({"eos_token_id": [7, 8]}, 2, (7, 8)),
        ({"eos_token_id": 0}, None, (0,)),
    ],
)
def test_stop_tokens(generation: Any, raw_eos: Any, expected: tuple[int, ...]) -> None:
    config = model_config(LLAMA | {"eos_token_id": raw_eos}, generation)
    assert config.eos_token_ids == expected


def test_absent_keys_mean_what_transformers_takes() -> None:
    raw = dict(LLAMA)
    for key in "num_key_value_heads hidden_act rms_norm_eps rope_theta tie_word_embeddings".split():
        del raw[key]
    config = model_config(raw)
    assert (config.num_kv_heads, config.activation, config.norm_eps) == (4, "silu", 1e-6)
    assert (config.rope, config.tied_head) == (RopeConfig(10000.0), False)
    assert model_config({**GPT2, "n_inner": None}).hidden_dim == 128
    assert model_config({k: v for k, v in GPT2.items() if k != "activation_function"}).tied_head


def test_old_gpt2_spells_the_context_n_ctx() -> None:
    raw = {key: value for key, value in GPT2.items() if key != "n_positions"}
    assert model_config(raw | {"n_ctx": 40}).max_seq_len == 40


def test_gpt2_knows_no_head_dim() -> None:
    assert model_config(GPT2 | {"head_dim": 16}).head_dim == 8


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 1.5}, 96),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
    ],
)
def test_context_is_stretched_where_config_leaves_it_to_us(scaling: Any, expected: int) -> None:
    assert model_config(LLAMA | {"rope_scaling": scaling}).max_seq_len == expected


@pytest.mark.parametrize("empty", [None, {}])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_no_scaling(key: str, empty: Any) -> None:
    assert model_config(LLAMA | {key: empty}).rope == RopeConfig(10000.0)


def test_yarn_without_a_factor_takes_the_ratio_of_contexts() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    config = model_config(LLAMA | {"rope_scaling": rope}).rope
    assert config is not None and config.factor == 4.0


def test_original_context_may_stand_outside_the_scaling() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0}
    raw = LLAMA | {"rope_scaling": rope, "original_max_position_embeddings": 8}
    config = model_config(raw).rope
    assert config is not None and config.original_max_seq_len == 8


# -- refused --


def refused(raw: dict[str, Any], *needles: str) -> None:
    """One line, a ValueError, that names the key and its value."""
    with pytest.raises(ValueError, match=r"config\.json|needed") as caught:
        model_config(raw)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


@pytest.mark.parametrize("model_type", [None, "", "bert", "Llama", 7, ["llama"], {}])
def test_unknown_model_type(model_type: Any) -> None:
    refused(LLAMA | {"model_type": model_type}, f"model_type {model_type!r}", "gpt2, llama")
    refused({}, "model_type None")


@pytest.mark.parametrize(
    ("base", "changes", "needles"),
    [
        (
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            ["scale_attn_by_inverse_layer_idx = True"],
        ),
        (GPT2, {"scale_attn_weights": False}, ["scale_attn_weights = False"]),
        (GPT2, {"add_cross_attention": True}, ["add_cross_attention"]),
        (GPT2, {"activation_function": "quick_gelu"}, ["activation_function = 'quick_gelu'"]),
        (LLAMA, {"hidden_act": "xielu"}, ["hidden_act = 'xielu'", "silu"]),
        (LLAMA, {"hidden_act": ["silu"]}, ["hidden_act"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor"],
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, ["'longrope'", "linear, dynamic"]),
        (LLAMA, {"rope_scaling": {"type": "mrope"}}, ["'mrope'"]),
        (LLAMA, {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, ["['linear']"]),
        (LLAMA, {"rope_scaling": "linear"}, ["'linear'", "rope_type"]),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, ["factor = None", "'linear'"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "x"}}, ["factor = 'x'"]),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, ["factor = nan"]),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 10**400}}, ["factor = 1000"]),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["low_freq_factor = None"]),
        (LLAMA, {"rope_theta": "1e4"}, ["rope_theta = '1e4'"]),
        (LLAMA, {"rope_theta": [1]}, ["rope_theta = [1]"]),
        (LLAMA, {"num_attention_heads": 5}, ["hidden_size 32", "num_attention_heads 5"]),
        (GPT2, {"n_head": 5}, ["n_embd 32", "n_head 5"]),
        (LLAMA, {"tie_word_embeddings": "false"}, ["'false'"]),
        (LLAMA, {"attention_bias": 1}, ["qkv_bias is 1"]),
        (LLAMA, {"rms_norm_eps": "1e-5"}, ["'1e-5'"]),
        (LLAMA, {"eos_token_id": "</s>"}, ["</s>"]),
        (LLAMA, {"eos_token_id": {"id": 2}}, ["{'id': 2}"]),
        (LLAMA, {"eos_token_id": [2, [3]]}, ["[3]"]),
        (LLAMA, {"bos_token_id": True}, ["bos_token_id is True"]),
        (GPT2, {"n_inner": "40"}, ["'40'"]),
    ],
)
def test_values_that_change_the_mathematics_or_mean_nothing(
    base: dict[str, Any], changes: dict[str, Any], needles: list[str]
) -> None:
    refused(base | changes, *needles)


SIZE_KEYS = [
    *(
        (LLAMA, key)
        for key in LLAMA
        if key.startswith(("vocab", "hidden_s", "inter", "num_", "max_"))
    ),
    *((GPT2, key) for key in GPT2 if key.startswith(("vocab", "n_"))),
    (LLAMA, "head_dim"),
]


@pytest.mark.parametrize("value", [0, -4, "12", 4.0, True, [8], {}])
@pytest.mark.parametrize(
    ("base", "key"), SIZE_KEYS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_sizes_that_are_none(base: dict[str, Any], key: str, value: Any) -> None:
    refused(base | {key: value}, f"{key} = {value!r}", "positive whole number")


@pytest.mark.parametrize(
    ("base", "key"),
    [
        *((LLAMA, key) for key in ("vocab_size", "hidden_size", "intermediate_size")),
        *((LLAMA, key) for key in ("num_hidden_layers", "num_attention_heads")),
        (LLAMA, "max_position_embeddings"),
        *((GPT2, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")),
    ],
)
def test_required_keys(base: dict[str, Any], key: str) -> None:
    refused({k: v for k, v in base.items() if k != key}, repr(key), "missing", base["model_type"])
    refused(base | {key: None}, repr(key), "missing")


# -- names --


def test_names_are_those_of_the_published_files() -> None:
    raw = LLAMA | {"attention_bias": True, "mlp_bias": True}
    llama = FAMILIES["llama"]
    assert llama.source("blocks.11.attention.qkv.weight") == tuple(
        f"model.layers.11.self_attn.{part}_proj.weight" for part in "qkv"
    )
    assert llama.source("blocks.0.mlp.gate_up.bias") == (
        "model.layers.0.mlp.gate_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
    )
    assert not llama.is_transposed("blocks.0.attention.out.weight")
    assert FAMILIES["gpt2"].is_transposed("blocks.7.mlp.down.weight")
    assert not FAMILIES["gpt2"].is_transposed("blocks.7.mlp.down.bias")
    for family, shapes in (("llama", llama_shapes(raw)), ("gpt2", gpt2_shapes(GPT2, prefix=""))):
        templates = {re.sub(r"\.\d+\.", ".{i}.", name) for name in shapes}
        known = {theirs for names in FAMILIES[family].names.values() for theirs in names}
        assert templates <= known
