"""config.json -> facts: what published models mean, in every spelling, and what is refused.

test_facts.py compares every fact with what transformers reads.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, cases_of, raw_config
from tiny import GPT2, LLAMA, gpt2_shapes, llama_shapes, tiny_llama

from gptfast.checkpoint import inspect, read_config, suggested_sampling
from gptfast.config import ModelConfig, RopeConfig
from gptfast.families import FAMILIES, OTHER_KINDS, model_config

# Counts as their publishers give them.
NUM_PARAMETERS = {
    "Mixtral-8x7B-v0.1.json": 46_702_792_704,
    "cerebras-gpt-111m.json": 111_050_496,
    "codellama_13b.json": 13_016_028_160,
    "codellama_7b.json": 6_738_546_688,
    "deepseek-r1.json": 671_026_419_200,
    "deepseek_v2_lite.json": 15_706_484_224,
    "gemma2_27b.json": 27_227_128_320,
    "gemma2_2b.json": 2_614_341_888,
    "gemma3_1b_it.json": 999_885_952,
    "gemma_2b.json": 2_506_172_416,
    "gpt-oss-20b.json": 20_914_757_184,
    "gpt2.json": 124_439_808,
    "gpt_j.json": 6_050_882_784,
    "llama2_13b.json": 13_015_864_320,
    "llama2_70b.json": 68_976_648_192,
    "llama2_7b.json": 6_738_415_616,
    "llama-3-70b.json": 70_553_706_496,
    "llama-3-8b.json": 8_030_261_248,
    "llama3_1_8b.json": 8_030_261_248,
    "llama3_2_1b.json": 1_235_814_400,
    "llama3_2_3b.json": 3_212_749_824,
    "mistral_7b.json": 7_241_732_096,
    "mosaicml_mpt-7b.json": 6_649_286_656,
    "olmo2_32b.json": 32_234_279_936,
    "olmo2_7b.json": 7_298_617_344,
    "opt-125m.json": 125_239_296,
    "phi-3_5.json": 3_821_079_552,
    "phi-4.json": 3_836_021_760,
    "pythia-14m.json": 14_067_712,
    "qwen2_0_5b.json": 494_032_768,
    "qwen2_1_5b.json": 1_543_714_304,
    "qwen2_7b.json": 7_615_616_512,
    "qwen3-0.6b.json": 596_049_920,
    "qwen3-14b.json": 14_768_307_200,
    "qwen3-1.7b.json": 1_720_574_976,
    "qwen3-235b.json": 235_093_634_560,
    "qwen3-32b.json": 32_762_123_264,
    "qwen3-4b.json": 4_022_468_096,
    "qwen3-8b.json": 8_190_735_360,
    "smollm2_135m.json": 134_515_008,
    "smollm_135m.json": 134_515_008,
    "smollm_360m.json": 361_821_120,
    "smollm_1_7b.json": 1_711_376_384,
    "starcoder2.json": 7_173_923_840,
    "tinyllama_1b_chat_v1.0.json": 1_100_048_384,
}
# Published files that are refused: name -> words of the reason.
REFUSED: dict[str, str] = {}
# Keys that a file lacks, with the value of the published one. Where DeepSeek-V2 is silent about
# queries, transformers takes a rank of 1536, and no tensor of V2-Lite would fit.
RESTORED: dict[str, dict[str, Any]] = {"deepseek_v2_lite.json": {"q_lora_rank": None}}
GENERATION = ".generation_config.json"


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "configs" / name).read_text())


def names_of_configs(folder: Path) -> list[str]:
    names = sorted(path.name for path in (folder / "configs").glob("*.json"))
    return [name for name in names if not name.endswith(GENERATION)]


# -- published models --


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_sizes(shared_data: Path, name: str) -> None:
    assert model_config(read(shared_data, name)).num_parameters == NUM_PARAMETERS[name]


def test_granite_is_published_with_three_tokens_more_and_a_tied_head(shared_data: Path) -> None:
    config = model_config(read(shared_data, "granite-3.1-2b-base.json"))
    published = replace(config, vocab_size=49155, tied_head=True)
    assert published.num_parameters == 2_533_531_648


def test_which_published_configs_are_refused(shared_data: Path) -> None:
    refused = {}
    for name in names_of_configs(shared_data):
        try:
            model_config(read(shared_data, name))
        except ValueError as error:
            refused[name] = str(error)
    assert refused.keys() == REFUSED.keys()
    assert [name for name, reason in REFUSED.items() if reason not in refused[name]] == []


def test_published_generation_configs(shared_data: Path, tmp_path: Path) -> None:
    """Their stop tokens win, their sampling is a suggestion."""
    paths = sorted((shared_data / "configs").glob("*" + GENERATION))
    assert len(paths) >= 12
    for path in paths:
        raw = json.loads(path.read_text())
        (tmp_path / "generation_config.json").write_text(path.read_text())
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        eos = raw["eos_token_id"]
        expected = tuple(eos) if isinstance(eos, list) else (eos,)
        assert read_config(tmp_path)[0].eos_token_ids == expected, path.name
        suggested = suggested_sampling(tmp_path)
        if raw.get("do_sample", True):
            keys = {"temperature", "top_k", "top_p", "repetition_penalty"} & raw.keys()
            assert suggested == {key: raw[key] for key in keys}, path.name
        else:
            assert suggested == {}, path.name
    (tmp_path / "generation_config.json").unlink()
    assert suggested_sampling(tmp_path) == {} and read_config(tmp_path)[0].eos_token_ids == (2,)


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


def test_gemma3_by_hand(shared_data: Path) -> None:
    config = model_config(read(shared_data, "gemma3_1b_it.json"))
    assert config.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert (config.rope, config.local_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert (config.attention_scale, config.embedding_multiplier) == (1 / 16, 1152**0.5)
    assert [config.layer_rope(layer) for layer in (4, 5)] == [RopeConfig(1e4), RopeConfig(1e6)]
    assert config.eos_token_ids == (1, 106) and config.tied_head and config.norm_offset


def test_gemma3_states_the_context_it_was_stretched_to() -> None:
    """As the 4B to 27B models do, beside linear scaling by 8: 128K tokens, not eight times that."""
    raw = raw_config("gemma3_text-two-ropes-pattern") | {"max_position_embeddings": 131072}
    assert raw["rope_scaling"]["factor"] == 8.0
    assert model_config(raw).max_seq_len == 131072
    silent = {key: value for key, value in raw.items() if key != "max_position_embeddings"}
    assert model_config(silent).max_seq_len == 131072


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
        learned_positions=True,
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


@pytest.mark.parametrize("key", ["hidden_act", "rms_norm_eps", "rope_theta", "attention_bias"])
def test_null_is_as_absent(key: str) -> None:
    absent = {k: value for k, value in LLAMA.items() if k != key}
    assert model_config(LLAMA | {key: None}) == model_config(absent)


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


def test_positions_of_text_alone_are_one_where_images_have_three() -> None:
    raw = LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    assert model_config(raw).rope == RopeConfig(10000.0)


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_writes_today_means_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    raw = raw_config(name)
    transformers.AutoConfig.for_model(**copy.deepcopy(raw)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved != raw
    assert model_config(saved) == model_config(raw)


def test_published_configs_that_transformers_has_rewritten(
    shared_data: Path, tmp_path: Path
) -> None:
    """Every file as today's release would save it: the same facts, but for stop tokens that it
    takes from its defaults.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    for name in names_of_configs(shared_data):
        raw = read(shared_data, name) | RESTORED.get(name, {})
        transformers.AutoConfig.for_model(**copy.deepcopy(raw)).save_pretrained(tmp_path)
        ours = model_config(raw)
        saved = model_config(json.loads((tmp_path / "config.json").read_text()))
        if "bos_token_id" not in raw:
            saved = replace(saved, bos_token_id=None)
        if "eos_token_id" not in raw:
            saved = replace(saved, eos_token_ids=())
        assert saved == ours, name


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_old_and_new_key_of_the_dtype(key: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, **{key: "float16"})  # the tensors are float32
    assert inspect(folder).dtype == torch.float16


@pytest.mark.parametrize(
    ("outer", "case"),
    [
        ("gemma3", "gemma3_text-two-ropes-pattern"),
        ("mistral3", "mistral-window"),
        ("llava", "llama-gqa"),
        ("qwen2_vl", "qwen2-biases-tied"),
        ("mllama", "llama-biases-tied"),
    ],
)
def test_the_language_part_of_a_multimodal_config(outer: str, case: str) -> None:
    text = raw_config(case)
    raw = {"model_type": outer, "text_config": text, "vision_config": {"hidden_size": 7}}
    assert model_config(raw) == model_config(text)


def test_what_stands_beside_a_text_config_holds_where_it_is_silent() -> None:
    text = {k: v for k, v in LLAMA.items() if k not in ("eos_token_id", "tie_word_embeddings")}
    raw = {"model_type": "llava", "text_config": text, "eos_token_id": [5, 6], "hidden_size": 7}
    assert model_config(raw).eos_token_ids == (5, 6) and not model_config(raw).tied_head
    assert model_config(raw | {"tie_word_embeddings": True}).tied_head
    assert model_config(raw | {"text_config": text | {"eos_token_id": 9}}).eos_token_ids == (9,)
    assert model_config(raw, {"eos_token_id": [3]}).eos_token_ids == (3,)
    assert model_config(raw).dim == 32


def test_a_text_config_of_a_text_model_is_not_read() -> None:
    assert model_config(LLAMA | {"text_config": GPT2}) == model_config(LLAMA)


# -- refused --


def refused(raw: dict[str, Any], *needles: str) -> None:
    """One line, a ValueError, that names the key and its value."""
    with pytest.raises(ValueError, match=r"config\.json|needed") as caught:
        model_config(raw)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


@pytest.mark.parametrize("model_type", [None, "", "vit", "Llama", 7, ["llama"], {}])
def test_unknown_model_type(model_type: Any) -> None:
    supported = ", ".join(sorted(FAMILIES))
    refused(LLAMA | {"model_type": model_type}, f"model_type {model_type!r}", supported)
    refused({}, "model_type None")
    refused({"model_type": "llava", "text_config": {"model_type": model_type}}, supported)
    refused({"model_type": "llava", "text_config": str(model_type)}, "model_type 'llava'")


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("t5", "has an encoder and a decoder"),
        ("umt5", "has an encoder and a decoder"),
        ("ul2", "has an encoder and a decoder"),
        ("rwkv", "is a recurrent network"),
        ("mamba", "is a recurrent network"),
        ("bert", "is an encoder"),
    ],
)
def test_models_of_other_kinds(model_type: str, kind: str) -> None:
    needles = (f"{model_type!r} model {kind}", "only decoder-only transformers run here", "llama")
    refused(LLAMA | {"model_type": model_type}, *needles)
    refused({"model_type": "llava", "text_config": {"model_type": model_type}}, *needles)


def test_no_family_is_of_another_kind() -> None:
    assert not OTHER_KINDS.keys() & FAMILIES.keys()


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
        (LLAMA, {"rope_scaling": {"rope_type": "ntk"}}, ["'ntk'", "linear, dynamic"]),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, ["'longrope'", "short_factor"]),
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
        (LLAMA, {"attention_bias": 1}, ["attention_bias = 1; true or false"]),
        (LLAMA, {"num_key_value_heads": 3}, ["4 attention heads", "3 key/value heads"]),
        (LLAMA, {"head_dim": 7}, ["even head size, found 7"]),
        (LLAMA, {"rms_norm_eps": -1.0}, ["norm_eps is -1.0"]),
        (LLAMA, {"num_hidden_layers": 2**31}, ["num_hidden_layers = 2147483648", "10000"]),
        (LLAMA, {"hidden_size": 10**30}, ["hidden_size = 1000000", "at most"]),
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


# Family by family: what its `requires` and readers refuse, and what the error must name.
FAMILY_REFUSES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mistral-window", {"sliding_window": 0}, ["sliding_window = 0", "positive whole number"]),
    (
        "ministral-layer-types",
        {"layer_types": ["chunked_attention", "full_attention", "full_attention"]},
        ["layer_types", "'chunked_attention'", "'sliding_attention' or 'full_attention'"],
    ),
    (
        "ministral-layer-types",
        {"layer_types": ["full_attention"] * 2},
        ["layer_types has 2 entries", "3 layers"],
    ),
    ("ministral-layer-types", {"layer_types": "all"}, ["layer_types", "'all'"]),
    ("ministral-layer-types", {"layer_types": [["full_attention"]] * 3}, ["layer_types"]),
    ("mixtral-top2", {"num_experts_per_tok": 5}, ["5 of 4 experts"]),
    ("mixtral-top2", {"num_local_experts": None}, ["'num_local_experts' is missing"]),
    ("mixtral-top2", {"num_local_experts": 0}, ["num_local_experts = 0"]),
    ("qwen2-window-layers", {"use_sliding_window": "yes"}, ["use_sliding_window = 'yes'"]),
    ("qwen2-window-layers", {"max_window_layers": "1"}, ["max_window_layers = '1'"]),
    ("qwen2_moe-shared-expert", {"num_experts": None}, ["'num_experts' is missing"]),
    ("qwen2_moe-shared-expert", {"mlp_only_layers": "0"}, ["mlp_only_layers = '0'", "a list"]),
    ("qwen3_moe-normalised", {"mlp_only_layers": [0.5]}, ["mlp_only_layers = [0.5]"]),
    ("qwen3_moe-normalised", {"norm_topk_prob": "yes"}, ["norm_topk_prob = 'yes'"]),
    ("qwen3_moe-normalised", {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
    ("granite-multipliers", {"logits_scaling": 0}, ["logits_scaling = 0", "positive"]),
    ("granite-multipliers", {"residual_multiplier": "x"}, ["residual_multiplier = 'x'"]),
    ("granite-multipliers", {"attention_multiplier": -1}, ["attention_scale is -1.0"]),
    ("smollm3-nope-layers", {"no_rope_layers": [1, 0]}, ["no_rope_layers has 2", "4 layers"]),
    ("smollm3-nope-layers", {"no_rope_layers": 4}, ["no_rope_layers = 4", "a list"]),
    ("stablelm-parallel-qk-norm", {"qk_layernorm": 1}, ["qk_layernorm = 1"]),
    ("stablelm-parallel-qk-norm", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
    ("starcoder2-no-biases", {"mlp_type": "gated"}, ["mlp_type = 'gated'", "'default'"]),
    ("starcoder2-no-biases", {"norm_type": "rms_norm"}, ["norm_type = 'rms_norm'", "layer_norm"]),
    ("phi-partial-rotary", {"partial_rotary_factor": 0.4}, ["3 rotated numbers"]),
    ("phi3-fused-window", {"attention_bias": True}, ["attention_bias = True", "False"]),
    ("phi3-fused-window", {"mlp_bias": True}, ["mlp_bias = True"]),
    ("phi3-fused-window", {"lm_head_bias": True}, ["lm_head_bias = True"]),
    (
        "phi3-longrope-beyond-original",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}},
        ["longrope has 3 factors", "4 frequencies"],
    ),
    (
        "phi3-longrope-beyond-original",
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 5}},
        ["longrope has 5 factors", "4 frequencies"],
    ),
    (
        "phi3-longrope-beyond-original",
        {"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 4, "long_factor": "x"}},
        ["short_factor", "other than zero"],
    ),
    *(
        (name, {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"])
        for name in ("gemma-mqa", "gemma2-softcaps-window", "gemma3_text-two-ropes-pattern")
    ),
    ("gemma-mqa", {"hidden_activation": "xielu", "hidden_act": "xielu"}, ["'xielu'", "gelu"]),
    ("gemma2-softcaps-window", {"attn_logit_softcapping": 0.0}, ["attention_softcap is 0.0"]),
    ("gemma2-softcaps-window", {"final_logit_softcapping": "30"}, ["logit_softcapping = '30'"]),
    ("gemma2-softcaps-window", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar = 0"]),
    ("gemma3_text-two-ropes-pattern", {"rope_local_base_freq": "x"}, ["rope_local_base_freq"]),
    (
        "gemma3_text-two-ropes-pattern",
        {"attn_logit_softcapping": 50.0},
        ["attn_logit_softcapping = 50.0"],
    ),
    ("gpt_oss-sinks-yarn", {"swiglu_alpha": 1.0}, ["swiglu_alpha = 1.0", "1.702"]),
    ("gpt_oss-sinks-yarn", {"swiglu_limit": -7.0}, ["swiglu_limit = -7.0", "positive"]),
    ("gpt_oss-sinks-yarn", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
    ("deepseek_v2-lite", {"norm_topk_prob": True}, ["norm_topk_prob = True", "False"]),
    ("deepseek_v2-lite", {"topk_method": "noaux_tc"}, ["'noaux_tc'", "'group_limited_greedy'"]),
    ("deepseek_v2-lite", {"scoring_func": "sigmoid"}, ["scoring_func = 'sigmoid'", "'softmax'"]),
    ("deepseek_v2-lite", {"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
    ("deepseek_v2-lite", {"kv_lora_rank": None}, ["'kv_lora_rank' is missing"]),
    ("deepseek_v2-lite", {"q_lora_rank": 0}, ["q_rank is 0"]),
    ("deepseek_v2-lite", {"n_shared_experts": "2"}, ["n_shared_experts = '2'"]),
    ("deepseek_v2-groups", {"n_group": 3}, ["8 experts in 3 groups"]),
    ("deepseek_v3-groups-yarn", {"topk_group": 5}, ["4 groups, of which 5 are active"]),
    ("deepseek_v3-groups-yarn", {"scoring_func": "softmax"}, ["'softmax'", "'sigmoid'"]),
    ("deepseek_v3-groups-yarn", {"topk_method": "greedy"}, ["'greedy'", "'noaux_tc'"]),
    ("deepseek_v3-groups-yarn", {"moe_layer_freq": 3}, ["moe_layer_freq = 3"]),
    ("deepseek_v3-groups-yarn", {"first_k_dense_replace": 0.5}, ["first_k_dense_replace = 0.5"]),
    ("deepseek_v3-groups-yarn", {"n_routed_experts": "8"}, ["n_routed_experts = '8'"]),
    ("gpt_bigcode-multi-query", {"scale_attn_weights": False}, ["scale_attn_weights = False"]),
    ("gpt_bigcode-multi-query", {"add_cross_attention": True}, ["add_cross_attention = True"]),
    ("gpt_bigcode-multi-query", {"multi_query": "yes"}, ["multi_query = 'yes'"]),
    ("gptj-partial-rotary", {"rotary_dim": 10}, ["found 10 (of heads of 8)"]),
    ("gptj-partial-rotary", {"rotary_dim": "64"}, ["rotary_dim = '64'"]),
    ("codegen-4-heads", {"n_head": 5}, ["n_embd 32", "n_head 5"]),
    ("gpt_neox-parallel", {"rotary_pct": None, "partial_rotary_factor": 2}, ["_factor = 2"]),
    ("gpt_neox-parallel", {"hidden_act": "relu6"}, ["hidden_act = 'relu6'"]),
    ("opt-tied", {"do_layer_norm_before": False}, ["do_layer_norm_before = False", "True"]),
    ("opt-tied", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
    ("opt-tied", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm = True"]),
    ("opt-tied", {"word_embed_proj_dim": 16}, ["word_embed_proj_dim = 16", "32"]),
    (
        "bloom-4-heads",
        {"apply_residual_connection_post_layernorm": True},
        ["apply_residual_connection_post_layernorm = True"],
    ),
    (
        "falcon-7b",
        {"apply_residual_connection_post_layernorm": True},
        ["apply_residual_connection_post_layernorm = True"],
    ),
    ("falcon-40b", {"num_kv_heads": 3}, ["4 attention heads cannot share 3"]),
    ("falcon-7b", {"alibi": "no"}, ["alibi = 'no'", "true or false"]),
    ("mpt-clip-6-heads", {"no_bias": False}, ["no_bias = False"]),
    ("mpt-clip-6-heads", {"logit_scale": 0.5}, ["logit_scale = 0.5"]),
    ("mpt-clip-6-heads", {"expansion_ratio": 8}, ["expansion_ratio = 8"]),
    *(
        ("mpt-clip-6-heads", {"attn_config": {key: value}}, [f"attn_config.{key} = {value!r}"])
        for key, value in {
            "alibi": False,
            "alibi_bias_max": 16,
            "attn_type": "multiquery_attention",
            "qk_ln": True,
            "prefix_lm": True,
        }.items()
    ),
    ("mpt-clip-6-heads", {"attn_config": [1]}, ["attn_config = [1]"]),
    ("mpt-clip-6-heads", {"attn_config": {"clip_qkv": -1}}, ["qkv_clip is -1"]),
]


@pytest.mark.parametrize(("name", "changes", "needles"), FAMILY_REFUSES)
def test_what_a_family_refuses(name: str, changes: dict[str, Any], needles: list[str]) -> None:
    raw = raw_config(name)
    model_config(raw)
    refused(raw | changes, *needles)


def test_the_plain_transformers_of_the_deepseek_line_have_no_experts() -> None:
    config = model_config(raw_config("deepseek_v3-groups-yarn") | {"n_routed_experts": None})
    assert config.experts is None and config.latent is not None


def test_every_requirement_is_tried() -> None:
    tried = {(name.split("-")[0], key) for name, changes, _ in FAMILY_REFUSES for key in changes}
    tried |= {("gpt2", "add_cross_attention"), ("gpt2", "scale_attn_weights")}
    tried.add(("gpt2", "scale_attn_by_inverse_layer_idx"))
    needed = {(name, key) for name, family in FAMILIES.items() for key in family.requires}
    assert needed <= tried


# -- nonsense --

NONSENSE: tuple[Any, ...] = (
    *(None, "x", "", -1, 0, 0.5, True, False, [], [None], [[]], {}, {"x": 1}),
    *(float("inf"), float("nan"), 2**31, 10**400),
)


class Watched(dict[str, Any]):
    """A config.json that remembers which keys were asked for."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a parsed file."""
    inside: Iterable[Any] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inside:
        yield (*above, key)
        if isinstance(item, dict | list):
            yield from places(item, (*above, key))


def with_nonsense(raw: dict[str, Any], place: tuple[Any, ...], nonsense: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    owner: Any = raw
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = nonsense
    return raw


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nonsense_gives_facts_or_one_line(model_type: str) -> None:
    """Whatever a key holds; keys that are absent from the files but would be read included."""
    num_refused = 0
    for name in cases_of(model_type):
        watched = Watched(raw_config(name))
        model_config(watched)
        tried = {*places(dict(watched)), *((key,) for key in watched.asked)}
        assert len(tried) > 10
        for place in tried:
            for nonsense in NONSENSE:
                raw = with_nonsense(dict(watched), place, nonsense)
                try:
                    config = model_config(raw)
                    assert hash(config) and config.num_parameters >= config.num_active_parameters
                except ValueError as error:
                    assert "\n" not in str(error) and str(error).startswith("config.json")
                    num_refused += 1
                except Exception as error:
                    raise AssertionError(f"{place} = {nonsense!r:.40}: {error!r}") from error
    assert num_refused > 100


# -- names --


def test_names_are_those_of_the_published_files() -> None:
    raw = LLAMA | {"attention_bias": True, "mlp_bias": True}
    llama, gpt2 = FAMILIES["llama"], FAMILIES["gpt2"]
    [qkv] = llama.sources("blocks.11.attention.qkv.weight")
    assert qkv.names == tuple(f"model.layers.11.self_attn.{part}_proj.weight" for part in "qkv")
    [gate_up] = llama.sources("blocks.0.mlp.gate_up.bias")
    assert gate_up.names == ("model.layers.0.mlp.gate_proj.bias", "model.layers.0.mlp.up_proj.bias")
    assert not llama.sources("blocks.0.attention.out.weight")[0].transposed
    assert gpt2.sources("blocks.7.mlp.down.weight")[0].transposed
    assert not gpt2.sources("blocks.7.mlp.down.bias")[0].transposed
    for family, shapes in ((llama, llama_shapes(raw)), (gpt2, gpt2_shapes(GPT2))):
        templates = {re.sub(r"\.\d+\.", ".{i}.", name) for name in shapes}
        sources = (source for sources in family.names.values() for source in sources)
        assert templates <= {name for source in sources for name in source.names}


def test_a_name_that_no_family_has() -> None:
    for name in ("blocks.0.attention.nothing.weight", "nothing.weight"):
        with pytest.raises(KeyError):
            FAMILIES["llama"].sources(name)


@pytest.mark.parametrize("family", ["mixtral", "phi3", "starcoder2", "qwen3_moe"])
def test_families_without_layer_types_have_one_window(family: str) -> None:
    """transformers gives every layer the window there, whatever the list says."""
    raw = raw_config(next(name for name in CASES if name.startswith(f"{family}-")))
    raw |= {"sliding_window": 5, "use_sliding_window": True}
    num_layers = raw["num_hidden_layers"]
    plain = model_config(raw)
    assert plain.windows == (5,) * num_layers
    types = ["full_attention"] * num_layers
    assert model_config(raw | {"layer_types": types}).windows == plain.windows


def test_null_is_no_where_a_yes_is_the_default() -> None:
    """transformers keeps the null, which is false to it; only an absent key means the default."""
    raw = raw_config(next(name for name in CASES if name.startswith("deepseek_v3-")))
    for key, found in {
        "norm_topk_prob": lambda config: config.experts.normalize,
        "rope_interleave": lambda config: config.rope.interleaved,
    }.items():
        assert found(model_config({k: v for k, v in raw.items() if k != key})) is True
        assert found(model_config(raw | {key: None})) is False
