"""Llama and its heirs: gated MLP, rotary positions, separate projections for queries, keys and
values.
"""

from typing import Any

from gptfast.families.family import Family, layer_names, model_names, one
from gptfast.families.positions import (
    context,
    everywhere,
    rope,
    windows,
)
from gptfast.families.readers import (
    Fact,
    Raw,
    activation,
    cap,
    constant,
    flag,
    head_dim,
    kv_heads,
    number,
    positive,
    size,
    whole_numbers,
)
from gptfast.sources import Names

# -- what they share --

LAYER = "model.layers.{i}"
_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "attention_norm": "input_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
}
_MLP: dict[str, str | tuple[str, ...]] = {
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": "mlp.down_proj",
}
_QK_NORMS: dict[str, str | tuple[str, ...]] = {
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
_SANDWICH: dict[str, str | tuple[str, ...]] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_MODEL = model_names("model.embed_tokens", "model.norm")
NAMES: Names = _MODEL | layer_names(LAYER, _ATTENTION | _MLP)
NORMED_NAMES: Names = {**NAMES, **layer_names(LAYER, _QK_NORMS)}

FACTS: dict[str, Fact] = {
    "vocab_size": size("vocab_size"),
    "dim": size("hidden_size"),
    "num_layers": size("num_hidden_layers"),
    "num_heads": size("num_attention_heads"),
    "num_kv_heads": size("num_key_value_heads", "num_attention_heads"),
    "head_dim": head_dim,
    "hidden_dim": size("intermediate_size"),
    "max_seq_len": context,
    "norm": constant("rms"),
    "norm_eps": number("rms_norm_eps", 1e-6),
    "activation": activation("hidden_act", "silu"),
    "gated_mlp": constant(True),
    "rope": rope(partial=None),
    "tied_head": flag("tie_word_embeddings", False),
}
BIASES: dict[str, Fact] = {
    "qkv_bias": flag("attention_bias", False),
    "out_bias": flag("attention_bias", False),
    "mlp_bias": flag("mlp_bias", False),
}
SLIDING = {"use_sliding_window": flag("use_sliding_window", False)}
QWEN_WINDOWS = windows(
    lambda raw, layer: layer >= size("max_window_layers", default=28)(raw),
    default=4096,
    enabled=SLIDING["use_sliding_window"],
)

# -- Gemma --


def _gemma_activation(raw: Raw) -> str:
    """The first releases say "gelu" and mean its tanh approximation."""
    key = "hidden_act" if raw.get("hidden_activation") is None else "hidden_activation"
    name = "gelu_pytorch_tanh" if raw.get(key) == "gelu" else raw.get(key)
    return activation(key, "gelu_pytorch_tanh")({key: name})


def _query_scale(raw: Raw) -> float:
    return size("query_pre_attn_scalar", default=256)(raw) ** -0.5


def _gemma3_local_rope(raw: Raw) -> Any:
    """Local layers turn at their own base and are not stretched."""
    rules = raw.get("rope_parameters")
    if isinstance(rules, dict) and isinstance(rules.get("sliding_attention"), dict):
        return rope(layer_type="sliding_attention", head_size=_FACTS_GEMMA["head_dim"])(raw)
    base = number("rope_local_base_freq", 10000.0)(raw)
    return rope(head_size=_FACTS_GEMMA["head_dim"])({**raw, "rope_theta": base, **_NO_SCALING})


_NO_SCALING: dict[str, Any] = {"rope_scaling": None, "rope_parameters": None}
_FACTS_GEMMA: dict[str, Fact] = FACTS | {
    "head_dim": size("head_dim", default=256),
    "activation": activation("hidden_activation", "gelu_pytorch_tanh"),
    "norm_offset": constant(True),
    "embedding_multiplier": lambda raw: size("hidden_size")(raw) ** 0.5,
    "tied_head": flag("tie_word_embeddings", True),
    "rope": rope(partial=None, head_size=size("head_dim", default=256)),
    "qkv_bias": flag("attention_bias", False),
    "out_bias": flag("attention_bias", False),
}
_SANDWICH_FACTS: dict[str, Fact] = {
    "norms": constant("both"),
    "attention_scale": _query_scale,
}
_SANDWICH_NAMES: Names = {**NAMES, **layer_names(LAYER, _SANDWICH)}


def is_even(raw: Raw, layer: int) -> bool:
    return layer % 2 == 0


def _is_local_of_pattern(raw: Raw, layer: int) -> bool:
    """All but every sixth."""
    return (layer + 1) % size("sliding_window_pattern", "_sliding_window_pattern", default=6)(
        raw
    ) != 0


# -- the table --

LLAMA_LINE: dict[str, Family] = {
    "llama": Family(
        examples="Llama 1, 2, 3, 3.1, 3.2, CodeLlama, TinyLlama, SmolLM, OpenLLaMA, Vicuna",
        special="GQA, tied heads, biases, rope scaling linear, dynamic, llama3, yarn",
        facts=FACTS | BIASES,
        names=NAMES,
    ),
    "mistral": Family(
        examples="Mistral 7B v0.1 to v0.3, Nemo, Small, Codestral, Zephyr",
        special="sliding window, head size apart from the width",
        facts=FACTS | {"num_kv_heads": kv_heads(8), "windows": windows(everywhere, default=4096)},
        names=NAMES,
    ),
    "ministral": Family(
        examples="Ministral 8B",
        special="sliding window on some layers",
        facts=FACTS | {"num_kv_heads": kv_heads(8), "windows": windows(everywhere, default=4096)},
        names=NAMES,
    ),
    "qwen2": Family(
        examples="Qwen 1.5, 2, 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
        special="biases of queries, keys and values; sliding window on late layers",
        facts=FACTS
        | {
            "num_kv_heads": kv_heads(32),
            "qkv_bias": constant(True),
            "windows": QWEN_WINDOWS,
        },
        names=NAMES,
    ),
    "qwen3": Family(
        examples="Qwen3 0.6B to 32B",
        special="norm of each head's query and key",
        facts=FACTS
        | BIASES
        | {
            "num_kv_heads": kv_heads(32),
            "head_dim": size("head_dim", default=128),
            "rope": rope(partial=None, head_size=size("head_dim", default=128)),
            "qk_norm": constant("head"),
            "mlp_bias": constant(False),
            "windows": QWEN_WINDOWS,
        },
        names=NORMED_NAMES,
    ),
    "granite": Family(
        examples="Granite 3.0, 3.1, 3.2, 3.3",
        special="multipliers of embedding, attention, residual and logits",
        facts=FACTS
        | BIASES
        | {
            "embedding_multiplier": number("embedding_multiplier", 1.0),
            "attention_scale": number("attention_multiplier", 1.0),
            "residual_multiplier": number("residual_multiplier", 1.0),
            "logits_divisor": positive("logits_scaling", 1.0),
        },
        names=NAMES,
    ),
    "olmo2": Family(
        examples="OLMo 2 1B to 32B",
        special="norms behind attention and MLP, norm of all queries and keys",
        facts=FACTS
        | {
            "norm_eps": number("rms_norm_eps", 1e-5),
            "norms": constant("post"),
            "qk_norm": constant("all"),
            "qkv_bias": flag("attention_bias", False),
            "out_bias": flag("attention_bias", False),
        },
        names={
            **NORMED_NAMES,
            **layer_names(
                LAYER,
                {
                    "attention_post_norm": "post_attention_layernorm",
                    "mlp_post_norm": "post_feedforward_layernorm",
                },
            ),
        },
    ),
    "smollm3": Family(
        examples="SmolLM3 3B",
        special="layers without positions",
        facts=FACTS
        | BIASES
        | {
            "num_kv_heads": kv_heads(4),
            "tied_head": flag("tie_word_embeddings", True),
            "rope": rope(theta=2e6, partial=None),
            "nope_layers": lambda raw: _nope_layers(raw),
            "windows": windows(
                lambda raw, layer: layer in _nope_layers(raw),
                enabled=lambda raw: bool(raw.get("use_sliding_window") or raw.get("layer_types")),
            ),
        },
        names=NAMES,
    ),
    "phi3": Family(
        examples="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        special="fused projections, longrope, partial rotary, sliding window",
        facts=FACTS
        | {
            "norm_eps": number("rms_norm_eps", 1e-5),
            "rope": lambda raw: rope()(_as_longrope(raw)),
            "windows": windows(),
        },
        requires={"attention_bias": (False, None), "mlp_bias": (False, None)}
        | {"lm_head_bias": (False, None)},
        names={
            **NAMES,
            **layer_names(
                LAYER,
                {"attention.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"},
            ),
        },
    ),
    "stablelm": Family(
        examples="StableLM 2 1.6B, 3B, 12B, Zephyr 3B",
        special="LayerNorm, partial rotary, parallel residual, a norm for each head",
        facts=FACTS
        | {
            "num_kv_heads": kv_heads(32),
            "norm": constant("layer"),
            "norm_eps": number("layer_norm_eps", 1e-5),
            "rope": rope(partial=0.25),
            "qkv_bias": flag("use_qkv_bias", False),
            "parallel_residual": flag("use_parallel_residual", False),
            "shared_norm": flag("use_parallel_residual", False),
            "qk_norm": lambda raw: "heads" if flag("qk_layernorm", False)(raw) else "none",
        },
        names={
            **NAMES,
            "blocks.{i}.attention.q_norm.weight": one(
                f"{LAYER}.self_attn.q_layernorm.norms.{{e}}.weight"
            ),
            "blocks.{i}.attention.k_norm.weight": one(
                f"{LAYER}.self_attn.k_layernorm.norms.{{e}}.weight"
            ),
        },
    ),
    "gemma": Family(
        examples="Gemma 2B, 7B, CodeGemma",
        special="norm weights as difference from one, scaled embedding, GeGLU",
        facts=_FACTS_GEMMA | {"num_kv_heads": kv_heads(16), "activation": _gemma_activation},
        requires={"use_bidirectional_attention": (False, None)},
        names=NAMES,
    ),
    "gemma2": Family(
        examples="Gemma 2 2B, 9B, 27B",
        special="soft caps, norms on both sides, window on every other layer",
        facts=_FACTS_GEMMA
        | _SANDWICH_FACTS
        | {
            "num_kv_heads": kv_heads(4),
            "windows": windows(is_even, default=4096),
            "attention_softcap": cap("attn_logit_softcapping", 50.0),
            "logits_softcap": cap("final_logit_softcapping", 30.0),
        },
        requires={"use_bidirectional_attention": (False, None)},
        names=_SANDWICH_NAMES,
    ),
    "gemma3_text": Family(
        examples="Gemma 3 270M to 27B (the language part)",
        special="norm of queries and keys, five local layers to a global one, two rope bases",
        facts=_FACTS_GEMMA
        | _SANDWICH_FACTS
        | {
            "vocab_size": size("vocab_size", default=262208),
            "num_heads": size("num_attention_heads", default=8),
            "num_kv_heads": kv_heads(4),
            "max_seq_len": size("max_position_embeddings", default=131072),  # already stretched
            "qk_norm": constant("head"),
            "rope": rope(theta=1e6, partial=None, head_size=_FACTS_GEMMA["head_dim"]),
            "local_rope": _gemma3_local_rope,
            "windows": lambda raw: windows(_is_local_of_pattern, default=4096)(
                _with_context(raw, 131072)
            ),
            "logits_softcap": cap("final_logit_softcapping", None),
        },
        # transformers reads the first of these and does nothing with it.
        requires={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
        names={**_SANDWICH_NAMES, **layer_names(LAYER, _QK_NORMS)},
    ),
}


def _nope_layers(raw: Raw) -> tuple[int, ...]:
    """Layers without positions: where `no_rope_layers` has a zero, else every fourth."""
    num_layers, flags = size("num_hidden_layers")(raw), whole_numbers("no_rope_layers")(raw)
    if flags is None:
        interval = size("no_rope_layer_interval", default=4)(raw)
        flags = tuple((layer + 1) % interval for layer in range(num_layers))
    if len(flags) < num_layers:
        raise ValueError(
            f"config.json: no_rope_layers has {len(flags)} entries for {num_layers} layers"
        )
    return tuple(layer for layer in range(num_layers) if not flags[layer])


def _with_context(raw: Raw, default: int) -> Raw:
    return {"max_position_embeddings": default, **raw}


def _as_longrope(raw: Raw) -> Raw:
    """Early files call longrope "su" or "yarn", and it counts from 4096 tokens by default."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rules = dict(raw.get(key) or {})
    kind = rules.get("rope_type") or rules.get("type")
    if kind in ("su", "yarn"):
        rules |= {"rope_type": "longrope", "type": "longrope"}
    return {"original_max_position_embeddings": 4096, **raw, key: rules}
