"""The facts of every family against what transformers reads in the same config.json: published
files, and the tiny ones of family_cases.py.
"""

import copy
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, cases_of, raw_config
from test_families import REFUSED, RESTORED, names_of_configs, read

from gptfast.config import ModelConfig, RopeConfig
from gptfast.families import FAMILIES, model_config
from gptfast.families.readers import ACTIVATION_NAMES
from gptfast.layers import ACTIVATIONS
from gptfast.rope import Rope

# A fact of ours -> the attribute of transformers' config, a function of it, or the value that its
# architecture has.
Theirs = dict[str, Any]


def windows_of(theirs: Any) -> tuple[int | None, ...]:
    width, types = getattr(theirs, "sliding_window", None), getattr(theirs, "layer_types", None)
    types = types or ["sliding_attention"] * theirs.num_hidden_layers
    local = [kind == "sliding_attention" for kind in types]
    if width is None or not any(local):
        return ()
    return tuple(width if is_local else None for is_local in local)


def context_of(theirs: Any) -> int:
    """Linear scaling stretches what `max_position_embeddings` says; yarn and longrope say it."""
    scaling = getattr(theirs, "rope_parameters", None) or {}
    stretch = scaling["factor"] if scaling.get("rope_type") == "linear" else 1
    return int(theirs.max_position_embeddings * stretch)


def activation_of(key: str) -> Callable[[Any], str]:
    return lambda theirs: ACTIVATION_NAMES[getattr(theirs, key)]


def head_dim_of(theirs: Any) -> int:
    stated = getattr(theirs, "head_dim", None)
    return stated or theirs.hidden_size // theirs.num_attention_heads


def rope_of(layer_type: str | None = None) -> Callable[[Any], tuple[float, ...]]:
    """The factor of cos and sin, and every frequency (longrope: of short rows, then of long)."""

    def numbers(theirs: Any) -> tuple[float, ...]:
        rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
        rules = theirs.rope_parameters[layer_type] if layer_type else theirs.rope_parameters
        if rules["rope_type"] == "default":
            dim = int(head_dim_of(theirs) * rules.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, dim, 2).float() / dim
            return (1.0, *(1.0 / rules["rope_theta"] ** exponents).tolist())
        init = rope_utils.ROPE_INIT_FUNCTIONS[rules["rope_type"]]
        more = {"layer_type": layer_type} if layer_type else {}
        frequencies, factor = init(theirs, "cpu", seq_len=1, **more)
        found = [factor, *frequencies.tolist()]
        if rules["rope_type"] == "longrope":
            found += init(theirs, "cpu", seq_len=10**9)[0].tolist()
        return tuple(found)

    return numbers


def rotary_of(theirs: Any) -> tuple[float, ...]:
    """GPT-J's and CodeGen's: one base, and a count of rotated numbers."""
    exponents = torch.arange(0, theirs.rotary_dim, 2).float() / theirs.rotary_dim
    return (1.0, *(1.0 / 10000.0**exponents).tolist())


def our_rope(config: ModelConfig, rope: RopeConfig | None) -> tuple[float, ...] | None:
    if rope is None:
        return None
    module = Rope(rope, config.latent.rope_dim if config.latent else config.head_dim)
    long = module.long_inv_freq.tolist() if rope.scaling == "longrope" else []
    return (rope.attention_factor, *module.inv_freq.tolist(), *long)


def slopes_of(module: str, function: str) -> Callable[[Any], tuple[float, ...]]:
    """What a key one token back loses, by the function that makes transformers' ALiBi."""

    def slopes(theirs: Any) -> tuple[float, ...]:
        build = getattr(pytest.importorskip(f"transformers.models.{module}"), function)
        num_heads = theirs.num_attention_heads
        if module.startswith("mpt"):
            return tuple((-build(num_heads, 2)[:, 0, 0]).tolist())
        return tuple(build(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1].tolist())

    return slopes


def falcon_slopes(theirs: Any) -> tuple[float, ...]:
    if not theirs.alibi:
        return ()
    slopes = slopes_of("falcon.modeling_falcon", "build_alibi_tensor")(theirs)
    return tuple(slope * head_dim_of(theirs) ** -0.5 for slope in slopes)


def dense_layers_of(theirs: Any) -> tuple[int, ...]:
    step, dense = theirs.decoder_sparse_step, theirs.mlp_only_layers
    layers = range(theirs.num_hidden_layers)
    return tuple(i for i in layers if i in dense or (i + 1) % step > 0)


def latent_scale_of(theirs: Any) -> float:
    """As DeepSeek's own code: 1/sqrt(head), times (0.1 m log(s) + 1)^2 under yarn."""
    rules, scale = (
        theirs.rope_parameters,
        (theirs.qk_nope_head_dim + theirs.qk_rope_head_dim) ** -0.5,
    )
    if rules["rope_type"] == "default":
        return scale
    log = torch.tensor(float(rules["factor"])).log().item()
    return scale * (0.1 * rules["mscale_all_dim"] * log + 1.0) ** 2


def biases(*, qkv: Any = False, out: Any = False, mlp: Any = False) -> Theirs:
    return {"qkv_bias": qkv, "out_bias": out, "mlp_bias": mlp}


ALL: Theirs = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": head_dim_of,
    "tied_head": "tie_word_embeddings",
    "max_seq_len": context_of,
    "windows": windows_of,
    "nope_layers": lambda theirs: (),
    "alibi": lambda theirs: (),
    "experts": None,
    "latent": None,
    "norm_offset": False,
    "parallel_residual": False,
    "learned_positions": False,
    "head_bias": False,
    "attention_scale": None,
    "attention_softcap": None,
    "logits_softcap": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_divisor": 1.0,
    "attention_sinks": False,
    "qkv_clip": None,
    "norms": lambda theirs: "pre",
    "qk_norm": lambda theirs: "none",
    "norm": lambda theirs: "layer",
    "local_rope": None,
}
GATED: Theirs = ALL | {
    "norm": lambda theirs: "rms",
    "num_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "activation": activation_of("hidden_act"),
    "rope": rope_of(),
    **biases(),
}
ATTENTION_BIAS = biases(qkv="attention_bias", out="attention_bias")
QWEN3: Theirs = GATED | ATTENTION_BIAS | {"qk_norm": lambda theirs: "head"}
GEMMA: Theirs = (
    GATED
    | ATTENTION_BIAS
    | {"norm_offset": True, "embedding_multiplier": lambda theirs: theirs.hidden_size**0.5}
)
SANDWICH: Theirs = {
    "norms": lambda theirs: "both",
    "activation": activation_of("hidden_activation"),
    "attention_scale": lambda theirs: theirs.query_pre_attn_scalar**-0.5,
    "attention_softcap": "attn_logit_softcapping",
    "logits_softcap": "final_logit_softcapping",
}
QWEN_EXPERTS: Theirs = {
    "experts.num_experts": "num_experts",
    "experts.num_active": "num_experts_per_tok",
    "experts.hidden_dim": "moe_intermediate_size",
    "experts.normalize": "norm_topk_prob",
    "experts.dense_layers": dense_layers_of,
}
DEEPSEEK: Theirs = (
    GATED
    | {"num_kv_heads": "num_attention_heads"}  # all share a vector; each has keys of its own
    | biases(qkv="attention_bias", out="attention_bias")
    | {
        "head_dim": lambda theirs: theirs.qk_nope_head_dim + theirs.qk_rope_head_dim,
        "attention_scale": latent_scale_of,
        "latent.kv_rank": "kv_lora_rank",
        "latent.q_rank": "q_lora_rank",
        "latent.nope_dim": "qk_nope_head_dim",
        "latent.rope_dim": "qk_rope_head_dim",
        "latent.value_dim": "v_head_dim",
        "experts.num_experts": "n_routed_experts",
        "experts.num_active": "num_experts_per_tok",
        "experts.hidden_dim": "moe_intermediate_size",
        "experts.shared_hidden_dim": lambda theirs: (
            theirs.n_shared_experts * theirs.moe_intermediate_size
        ),
        "experts.scale": "routed_scaling_factor",
        "experts.dense_layers": lambda theirs: tuple(
            range(min(theirs.first_k_dense_replace, theirs.num_hidden_layers))
        ),
    }
)
MULTI_HEAD: Theirs = ALL | {
    "num_kv_heads": "num_attention_heads",
    "norm_eps": "layer_norm_epsilon",
    "rope": None,
    **biases(qkv=True, out=True, mlp=True),
}
GPT2_LIKE: Theirs = MULTI_HEAD | {
    "hidden_dim": lambda theirs: theirs.n_inner or 4 * theirs.n_embd,
    "activation": activation_of("activation_function"),
    "learned_positions": True,
}
GPTJ_LIKE: Theirs = GPT2_LIKE | {
    "learned_positions": False,
    "parallel_residual": True,
    "shared_norm": True,
    "head_bias": True,
    "rope": rotary_of,
    "rope.interleaved": True,
    **biases(mlp=True),
}
NEOX_LIKE: Theirs = MULTI_HEAD | {
    "hidden_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "activation": activation_of("hidden_act"),
    "rope": rope_of(),
}
# Family by family: which facts are compared, and with what. A family without published files at
# hand may be missing here; test_parity.py says what it computes.
COMPARED: dict[str, Theirs] = {
    "llama": GATED | ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    "mistral": GATED,
    "ministral": GATED,
    "mixtral": GATED
    | {
        "experts.num_experts": "num_local_experts",
        "experts.num_active": "num_experts_per_tok",
        "experts.hidden_dim": "intermediate_size",
        "experts.normalize": True,
    },
    "qwen2": GATED | {"qkv_bias": True},
    "qwen3": QWEN3,
    "qwen2_moe": GATED
    | QWEN_EXPERTS
    | {
        "qkv_bias": "qkv_bias",
        "experts.shared_hidden_dim": "shared_expert_intermediate_size",
        "experts.shared_gate": True,
    },
    "qwen3_moe": QWEN3 | QWEN_EXPERTS | {"experts.shared_hidden_dim": 0},
    "granite": GATED
    | ATTENTION_BIAS
    | {
        "mlp_bias": "mlp_bias",
        "attention_scale": "attention_multiplier",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_divisor": "logits_scaling",
    },
    "olmo2": GATED
    | ATTENTION_BIAS
    | {"norms": lambda theirs: "post", "qk_norm": lambda theirs: "all"},
    "smollm3": GATED
    | ATTENTION_BIAS
    | {
        "mlp_bias": "mlp_bias",
        "nope_layers": lambda theirs: tuple(
            layer for layer, rotates in enumerate(theirs.no_rope_layers) if not rotates
        ),
    },
    "phi3": GATED | {"num_kv_heads": "num_key_value_heads"},
    "stablelm": GATED
    | {
        "norm": lambda theirs: "layer",
        "norm_eps": "layer_norm_eps",
        "qkv_bias": "use_qkv_bias",
        "parallel_residual": "use_parallel_residual",
        "shared_norm": "use_parallel_residual",
        "qk_norm": lambda theirs: "heads" if theirs.qk_layernorm else "none",
    },
    # Of the first Gemma's two keys, "hidden_act" decides, and its "gelu" is the tanh kind.
    "gemma": GEMMA | {"activation": lambda theirs: "gelu_tanh"},
    "gemma2": GEMMA | SANDWICH,
    "gemma3_text": GEMMA
    | SANDWICH
    | {
        "max_seq_len": "max_position_embeddings",
        "qk_norm": lambda theirs: "head",
        "rope": rope_of("full_attention"),
        "local_rope": rope_of("sliding_attention"),
    },
    "gpt_oss": GATED
    | ATTENTION_BIAS
    | {
        "activation": lambda theirs: "gelu_quick",
        "attention_sinks": True,
        "swiglu_limit": "swiglu_limit",
        "experts.num_experts": "num_local_experts",
        "experts.num_active": "num_experts_per_tok",
        "experts.hidden_dim": "intermediate_size",
        "experts.bias": True,
        "experts.router_bias": True,
    },
    "deepseek_v2": DEEPSEEK
    | {
        "rope.interleaved": True,
        "mlp_bias": "mlp_bias",
        "experts.score": lambda theirs: "softmax",
        "experts.normalize": False,
        "experts.num_groups": lambda theirs: (
            1 if theirs.topk_method == "greedy" else theirs.n_group
        ),
        "experts.num_active_groups": lambda theirs: (
            1 if theirs.topk_method == "greedy" else theirs.topk_group
        ),
    },
    "deepseek_v3": DEEPSEEK
    | {
        "rope.interleaved": "rope_interleave",
        "experts.score": lambda theirs: "sigmoid",
        "experts.normalize": "norm_topk_prob",
        "experts.correction_bias": True,
        "experts.num_groups": "n_group",
        "experts.num_active_groups": "topk_group",
    },
    "gpt2": GPT2_LIKE,
    "gpt_bigcode": GPT2_LIKE
    | {"num_kv_heads": lambda theirs: 1 if theirs.multi_query else theirs.n_head},
    "gptj": GPTJ_LIKE,
    "codegen": GPTJ_LIKE,
    "gpt_neox": NEOX_LIKE
    | ATTENTION_BIAS
    | {
        "mlp_bias": True,
        "parallel_residual": "use_parallel_residual",
        "shared_norm": False,
    },
    "phi": NEOX_LIKE
    | {
        "num_kv_heads": "num_key_value_heads",
        "parallel_residual": True,
        "shared_norm": True,
        "head_bias": True,
        "qk_norm": lambda theirs: "head" if theirs.qk_layernorm else "none",
    },
    "starcoder2": NEOX_LIKE
    | {"num_kv_heads": "num_key_value_heads", "norm_eps": "norm_epsilon"}
    | biases(qkv="use_bias", out="use_bias", mlp="use_bias"),
    "opt": MULTI_HEAD
    | {
        "hidden_dim": "ffn_dim",
        "norm_eps": 1e-5,
        "activation": activation_of("activation_function"),
        "learned_positions": True,
        "position_offset": 2,
    }
    | biases(qkv="enable_bias", out="enable_bias", mlp="enable_bias"),
    "bloom": MULTI_HEAD
    | {
        "hidden_dim": lambda theirs: 4 * theirs.hidden_size,
        "max_seq_len": "seq_length",
        "activation": lambda theirs: "gelu_tanh",
        "embedding_norm": True,
        "alibi": slopes_of("bloom.modeling_bloom", "build_alibi_tensor"),
    },
    "falcon": MULTI_HEAD
    | {
        "num_kv_heads": lambda theirs: (
            theirs.num_kv_heads if theirs.new_decoder_architecture or not theirs.multi_query else 1
        ),
        "hidden_dim": "ffn_hidden_size",
        "activation": activation_of("activation"),
        "rope": lambda theirs: None if theirs.alibi else rope_of()(theirs),
        "alibi": falcon_slopes,
        "parallel_residual": lambda theirs: theirs.new_decoder_architecture or theirs.parallel_attn,
        "shared_norm": lambda theirs: (
            theirs.num_ln_in_parallel_attn == 1
            if theirs.new_decoder_architecture
            else theirs.parallel_attn
        ),
    }
    | biases(qkv="bias", out="bias", mlp="bias"),
    "mpt": MULTI_HEAD
    | {
        "max_seq_len": "max_seq_len",
        "hidden_dim": lambda theirs: theirs.expansion_ratio * theirs.d_model,
        "norm_bias": False,
        "activation": lambda theirs: "gelu",
        "alibi": slopes_of("mpt.modeling_mpt", "build_mpt_alibi_tensor"),
        "qkv_clip": "attn_config.clip_qkv",
        "attention_scale": "attn_config.softmax_scale",
    }
    | biases(),
}


def near(value: Any) -> Any:
    """Equal to `value`; numbers but for rounding."""
    values = value if isinstance(value, tuple) else (value,)
    is_real = bool(values) and all(isinstance(item, float) for item in values)
    return pytest.approx(value, rel=1e-5) if is_real else value


def assert_read_as_transformers_reads(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    ours = model_config(raw)
    ropes = {name: our_rope(ours, getattr(ours, name)) for name in ("rope", "local_rope")}
    compared = COMPARED[ours.model_type]
    for name, source in compared.items():
        if name in ("experts", "latent") and any(n.startswith(name + ".") for n in compared):
            continue  # compared in parts
        found = ropes[name] if name in ropes else attrgetter(name)(ours)
        source = attrgetter(source) if isinstance(source, str) else source
        needed = source(theirs) if callable(source) else source
        assert found == near(needed), f"{ours.model_type}: {name}"
    # Where config.json is silent, transformers takes the tokens of its default tokenizer.
    if "bos_token_id" in raw:
        assert ours.bos_token_id == theirs.bos_token_id
    if "eos_token_id" in raw:
        eos = theirs.eos_token_id
        assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    else:
        assert ours.eos_token_ids == ()


def test_published_configs_are_read_as_transformers_reads_them(shared_data: Path) -> None:
    names = [name for name in names_of_configs(shared_data) if name not in REFUSED]
    assert len(names) >= 60
    for name in names:
        raw, restored = read(shared_data, name), RESTORED.get(name, {})
        assert not raw.keys() & restored.keys()
        assert model_config(raw) == model_config(raw | restored)
        try:
            assert_read_as_transformers_reads(raw | restored)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("name", [name for name in CASES if name.split("-")[0] in COMPARED])
def test_tiny_configs_are_read_as_transformers_reads_them(name: str) -> None:
    assert_read_as_transformers_reads(raw_config(name))


@pytest.mark.parametrize(
    "name", [name for name in CASES if "num_key_value_heads" in raw_config(name)]
)
def test_null_means_a_key_head_for_every_query_head(name: str) -> None:
    assert model_config(raw_config(name) | {"num_key_value_heads": None}).num_kv_heads == 4


def test_groups_that_a_greedy_choice_does_not_look_at() -> None:
    raw = raw_config("deepseek_v2-groups") | {"topk_method": "greedy"}
    assert_read_as_transformers_reads(raw)
    experts = model_config(raw).experts
    assert experts is not None and (experts.num_groups, experts.num_active_groups) == (1, 1)


# Keys of which transformers makes nothing that a model could be run with, or (q_lora_rank) what the
# published files without it are not.
SILENT_OTHERWISE = {
    ("deepseek_v2", "q_lora_rank"),
    ("deepseek_v2", "topk_group"),
    ("bloom", "seq_length"),
}


@pytest.mark.parametrize("model_type", COMPARED)
def test_absent_keys_mean_what_transformers_takes(model_type: str) -> None:
    """Each key left out in turn: our reading is transformers', or an error."""
    for name in cases_of(model_type):
        raw = raw_config(name)
        for key in raw.keys() - {"model_type"}:
            silent = {k: value for k, value in raw.items() if k != key}
            if key == "num_key_value_heads":  # so many that the default fits
                silent |= {"hidden_size": 512, "num_attention_heads": 64}
            try:
                model_config(silent)
            except ValueError:  # the key is needed, or what is taken then does not fit the others
                continue
            if (model_type, key) not in SILENT_OTHERWISE:
                assert_read_as_transformers_reads(silent)


def test_every_fact_of_every_family_is_compared() -> None:
    """Somewhere; a fact that is the same for all families of a line is compared there."""
    assert COMPARED.keys() <= FAMILIES.keys() and len(COMPARED) >= 30
    compared = {name.split(".")[0] for facts in COMPARED.values() for name in facts}
    # Of these the model_type says all, or the lines above compare what comes from them.
    apart = {"model_type", "gated_mlp", "bos_token_id", "eos_token_ids"}
    assert {field.name for field in fields(ModelConfig)} - compared == apart
    for model_type, facts in COMPARED.items():
        names = {name.split(".")[0] for name in facts}
        assert FAMILIES[model_type].facts.keys() - names <= {"gated_mlp"}, model_type


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_are_those_of_transformers(name: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 101)
    ours = ACTIVATIONS[ACTIVATION_NAMES[name]](x)
    torch.testing.assert_close(ours, activations.ACT2FN[name](x), rtol=1e-5, atol=1e-5)
