"""GPT-2 and its heirs: LayerNorm, a plain MLP, often one tensor for queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from gptfast.config import RopeConfig
from gptfast.families.family import Family, layer_names, model_names, one
from gptfast.families.positions import (
    alibi_slopes,
    context,
    mpt_slopes,
    rope,
    windows,
)
from gptfast.families.readers import (
    Fact,
    Raw,
    activation,
    constant,
    flag,
    head_dim,
    kv_heads,
    number,
    optional,
    quotient,
    size,
)
from gptfast.sources import Names, by_kv_head, by_quarter

# -- what they share --


def _sizes(
    dim: tuple[str, ...] = ("hidden_size",),
    layers: tuple[str, ...] = ("num_hidden_layers",),
    heads: tuple[str, ...] = ("num_attention_heads",),
) -> dict[str, Fact]:
    """Multi-head attention of `heads` over `dim`; each may stand under one of several keys."""
    return {
        "vocab_size": size("vocab_size"),
        "dim": size(*dim),
        "num_layers": size(*layers),
        "num_heads": size(*heads),
        "num_kv_heads": size(*heads),
        "head_dim": quotient(dim, heads),
        "norm": constant("layer"),
        "gated_mlp": constant(False),
        "rope": constant(None),
    }


def _biases(fact: Fact) -> dict[str, Fact]:
    return {"qkv_bias": fact, "out_bias": fact, "mlp_bias": fact}


_PARALLEL: dict[str, Fact] = {"parallel_residual": constant(True), "shared_norm": constant(True)}

# GPT-2's own keys, which several others use.
_GPT2_FACTS: dict[str, Fact] = {
    **_sizes(
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
    ),
    "hidden_dim": lambda raw: size("n_inner", default=4 * _GPT2_FACTS["dim"](raw))(raw),
    "max_seq_len": size("n_positions", "max_position_embeddings", "n_ctx"),
    "norm_eps": number("layer_norm_epsilon", 1e-5),
    "activation": activation("activation_function", "gelu_new"),
    "tied_head": flag("tie_word_embeddings", True),
}
_GPT2_LAYER = "transformer.h.{i}"
_GPT2_NORMS: dict[str, str | tuple[str, ...]] = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_GPT2_LINEARS: dict[str, str | tuple[str, ...]] = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_GPT2_MODEL: Names = model_names("transformer.wte", "transformer.ln_f") | {
    "positions.weight": one("transformer.wpe.weight")
}
_LEARNED: dict[str, Fact] = {"learned_positions": constant(True)}

# -- rotary ones of EleutherAI and Salesforce --


def _gptj_rope(raw: Raw) -> RopeConfig:
    whole = _GPT2_FACTS["head_dim"](raw)
    dim = whole if raw.get("rotary_dim", 64) is None else size("rotary_dim", default=64)(raw)
    return RopeConfig(dim=None if dim == whole else dim, interleaved=True)


_GPTJ_FACTS: dict[str, Fact] = (
    _GPT2_FACTS
    | _PARALLEL
    | {
        "rope": _gptj_rope,
        "mlp_bias": constant(True),
        "head_bias": constant(True),
        "tied_head": flag("tie_word_embeddings", False),
    }
)
_GPTJ_MLP: dict[str, str | tuple[str, ...]] = {
    "attention_norm": "ln_1",
    "attention.out": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
}
_GPTJ_MODEL: Names = model_names("transformer.wte", "transformer.ln_f")


def _neox_rope(raw: Raw) -> Any:
    renamed = {"rope_theta": raw.get("rotary_emb_base"), **raw}
    return rope(partial=number("rotary_pct", 0.25)(raw))(renamed)


_NEOX_LAYER = "gpt_neox.layers.{i}"
_LINEAR_NAMES: dict[str, str | tuple[str, ...]] = {
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_BY_HEAD = {"attention.qkv": by_kv_head}

# -- Falcon --

_FALCON_SIZES = _sizes(
    ("hidden_size", "n_embed"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")
)
_FALCON_HEADS = _FALCON_SIZES["num_heads"]
_IS_NEW_FALCON, _HAS_ALIBI = flag("new_decoder_architecture", False), flag("alibi", False)


def _falcon_kv_heads(raw: Raw) -> int:
    if _IS_NEW_FALCON(raw):
        return size("num_kv_heads", "n_head_kv", "num_attention_heads", "n_head")(raw)
    return 1 if flag("multi_query", True)(raw) else _FALCON_HEADS(raw)


def _falcon_slopes(raw: Raw) -> tuple[float, ...]:
    """Falcon adds the slopes before it divides by sqrt(head size)."""
    if not _HAS_ALIBI(raw):
        return ()
    scale = _FALCON_SIZES["head_dim"](raw) ** -0.5
    return tuple(slope * scale for slope in alibi_slopes(_FALCON_HEADS(raw)))


def _falcon_shares_norm(raw: Raw) -> bool:
    """One norm for attention and MLP: Falcon 7B and 11B; two: 40B and 180B."""
    if not _falcon_is_parallel(raw):
        return False
    return not _IS_NEW_FALCON(raw) or size("num_ln_in_parallel_attn", default=2)(raw) != 2


def _falcon_is_parallel(raw: Raw) -> bool:
    return _IS_NEW_FALCON(raw) or flag("parallel_attn", True)(raw)


_FALCON_LAYER = "transformer.h.{i}"

# -- MPT --


def _attention_key(key: str, default: Any) -> Fact:
    def read(raw: Raw) -> Any:
        settings = raw.get("attn_config") or {}
        if not isinstance(settings, Mapping):
            raise ValueError(f"config.json: attn_config = {settings!r}; an object is needed")
        return optional(key, default)(settings)

    return read


def _check_mpt(raw: Raw) -> Any:
    """The part of attn_config that decides what is computed."""
    supported = {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_type": "multihead_attention",
        "qk_ln": False,
        "prefix_lm": False,
    }
    for key, needed in supported.items():
        found = _attention_key(key, needed)(raw)
        if found != needed:
            raise ValueError(
                f"config.json: attn_config.{key} = {found!r} is not supported "
                f"(supported: {needed!r})"
            )
    return _attention_key("softmax_scale", None)(raw)


# -- OPT --


def _opt_dim(raw: Raw) -> int:
    """Of the stream, and of the embedding: only OPT-350M has a smaller one, brought up to it."""
    dim, embedded = size("hidden_size")(raw), raw.get("word_embed_proj_dim")
    if embedded not in (None, dim):
        raise ValueError(
            f"config.json: word_embed_proj_dim = {embedded!r} is not supported (supported: {dim}, "
            "as hidden_size)"
        )
    return dim


# -- the table --

GPT_LINE: dict[str, Family] = {
    "gpt2": Family(
        examples="GPT-2, DistilGPT2, Cerebras-GPT, DLite",
        special="learned positions, weights stored [in, out]",
        facts=_GPT2_FACTS | _LEARNED | _biases(constant(True)),
        requires={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        names={
            **_GPT2_MODEL,
            **layer_names(
                _GPT2_LAYER, _GPT2_NORMS | _GPT2_LINEARS, transposed=tuple(_GPT2_LINEARS)
            ),
        },
    ),
    "gpt_bigcode": Family(
        examples="StarCoder, StarCoderBase, SantaCoder",
        special="learned positions, one key/value head",
        facts=_GPT2_FACTS
        | _LEARNED
        | _biases(constant(True))
        | {
            "num_kv_heads": lambda raw: (
                1 if flag("multi_query", True)(raw) else _GPT2_FACTS["num_heads"](raw)
            ),
            "activation": activation("activation_function", "gelu_pytorch_tanh"),
        },
        requires={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
        names={
            **_GPT2_MODEL,
            **layer_names(_GPT2_LAYER, _GPT2_NORMS | _GPT2_LINEARS, order=_BY_HEAD),
        },
    ),
    "gptj": Family(
        examples="GPT-J 6B, GPT4All-J, Dolly v1",
        special="neighbouring rotary pairs, parallel residual, biased head",
        facts=_GPTJ_FACTS,
        names={
            **_GPTJ_MODEL,
            **layer_names(
                _GPT2_LAYER,
                {"attention.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), **_GPTJ_MLP},
            ),
        },
    ),
    "codegen": Family(
        examples="CodeGen 350M to 16B",
        special="as GPT-J, projections of four parts",
        facts=_GPTJ_FACTS,
        names={
            **_GPTJ_MODEL,
            **layer_names(
                _GPT2_LAYER,
                {"attention.qkv": "attn.qkv_proj", **_GPTJ_MLP},
                order={"attention.qkv": by_quarter},
            ),
        },
    ),
    "gpt_neox": Family(
        examples="Pythia, GPT-NeoX-20B, Dolly v2, RedPajama-INCITE, StableLM-Alpha, "
        "OpenAssistant (Pythia), h2oGPT",
        special="partial rotary, parallel residual with two norms",
        facts={
            **_sizes(),
            **_biases(constant(True)),
            "qkv_bias": flag("attention_bias", True),
            "out_bias": flag("attention_bias", True),
            "hidden_dim": size("intermediate_size"),
            "max_seq_len": context,
            "norm_eps": number("layer_norm_eps", 1e-5),
            "activation": activation("hidden_act", "gelu"),
            "rope": _neox_rope,
            "tied_head": flag("tie_word_embeddings", False),
            "parallel_residual": flag("use_parallel_residual", True),
        },
        names={
            **model_names("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
            **layer_names(
                _NEOX_LAYER,
                {
                    "attention_norm": "input_layernorm",
                    "attention.qkv": "attention.query_key_value",
                    "attention.out": "attention.dense",
                    "mlp_norm": "post_attention_layernorm",
                    **_LINEAR_NAMES,
                },
                order=_BY_HEAD,
            ),
        },
    ),
    "phi": Family(
        examples="Phi-1, Phi-1.5, Phi-2",
        special="parallel residual, partial rotary, biases everywhere",
        facts={
            **_sizes(),
            **_biases(constant(True)),
            **_PARALLEL,
            "num_kv_heads": size("num_key_value_heads", "num_attention_heads"),
            "hidden_dim": size("intermediate_size"),
            "max_seq_len": context,
            "norm_eps": number("layer_norm_eps", 1e-5),
            "activation": activation("hidden_act", "gelu_new"),
            "rope": rope(partial=0.5),
            "tied_head": flag("tie_word_embeddings", False),
            "head_bias": constant(True),
            "qk_norm": lambda raw: "head" if flag("qk_layernorm", False)(raw) else "none",
        },
        names={
            **model_names("model.embed_tokens", "model.final_layernorm"),
            **layer_names(
                "model.layers.{i}",
                {
                    "attention_norm": "input_layernorm",
                    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "attention.out": "self_attn.dense",
                    "attention.q_norm": "self_attn.q_layernorm",
                    "attention.k_norm": "self_attn.k_layernorm",
                    "mlp.up": "mlp.fc1",
                    "mlp.down": "mlp.fc2",
                },
            ),
        },
    ),
    "starcoder2": Family(
        examples="StarCoder2 3B, 7B, 15B",
        special="LayerNorm, plain MLP, sliding window, GQA",
        facts={
            **_sizes(),
            **_biases(flag("use_bias", True)),
            "num_kv_heads": kv_heads(2),
            "head_dim": head_dim,
            "hidden_dim": size("intermediate_size"),
            "max_seq_len": context,
            "norm_eps": number("norm_epsilon", 1e-5),
            "activation": activation("hidden_act", "gelu_pytorch_tanh"),
            "rope": rope(partial=None),
            "tied_head": flag("tie_word_embeddings", True),
            "windows": windows(),
        },
        requires={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
        names={
            **model_names("model.embed_tokens", "model.norm"),
            **layer_names(
                "model.layers.{i}",
                {
                    "attention_norm": "input_layernorm",
                    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "attention.out": "self_attn.o_proj",
                    "mlp_norm": "post_attention_layernorm",
                    "mlp.up": "mlp.c_fc",
                    "mlp.down": "mlp.c_proj",
                },
            ),
        },
    ),
    "opt": Family(
        examples="OPT 125M, 1.3B to 66B",
        special="learned positions from the third row on, ReLU",
        facts={
            **_sizes(),
            "dim": _opt_dim,
            **_LEARNED,
            **_biases(flag("enable_bias", True)),
            "hidden_dim": size("ffn_dim"),
            "max_seq_len": size("max_position_embeddings"),
            "norm_eps": constant(1e-5),
            "activation": activation("activation_function", "relu"),
            "tied_head": flag("tie_word_embeddings", True),
            "position_offset": constant(2),
        },
        requires={
            "do_layer_norm_before": (True,),
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
        names={
            **model_names("model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
            "positions.weight": one("model.decoder.embed_positions.weight"),
            **layer_names(
                "model.decoder.layers.{i}",
                {
                    "attention_norm": "self_attn_layer_norm",
                    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "attention.out": "self_attn.out_proj",
                    "mlp_norm": "final_layer_norm",
                    "mlp.up": "fc1",
                    "mlp.down": "fc2",
                },
            ),
        },
    ),
    "bloom": Family(
        examples="BLOOM 560M to 176B, BLOOMZ",
        special="ALiBi, norm of the embedding",
        facts={
            **_sizes(
                ("hidden_size", "n_embed"),
                ("n_layer", "num_hidden_layers"),
                ("n_head", "num_attention_heads"),
            ),
            **_biases(constant(True)),
            "hidden_dim": lambda raw: 4 * size("hidden_size", "n_embed")(raw),
            "max_seq_len": size("seq_length", default=2048),  # trained at; ALiBi has no end
            "norm_eps": number("layer_norm_epsilon", 1e-5),
            "activation": constant("gelu_tanh"),
            "tied_head": flag("tie_word_embeddings", True),
            "embedding_norm": constant(True),
            "alibi": lambda raw: alibi_slopes(size("n_head", "num_attention_heads")(raw)),
        },
        requires={"apply_residual_connection_post_layernorm": (False,)},
        names={
            **model_names("transformer.word_embeddings", "transformer.ln_f"),
            **{
                f"embedding_norm.{kind}": one(f"transformer.word_embeddings_layernorm.{kind}")
                for kind in ("weight", "bias")
            },
            **layer_names(
                "transformer.h.{i}",
                {
                    "attention_norm": "input_layernorm",
                    "attention.qkv": "self_attention.query_key_value",
                    "attention.out": "self_attention.dense",
                    "mlp_norm": "post_attention_layernorm",
                    **_LINEAR_NAMES,
                },
                order=_BY_HEAD,
            ),
        },
    ),
    "falcon": Family(
        examples="Falcon 7B, 40B, 180B, 11B, RW-1B",
        special="parallel residual with one norm or two, multi-query, ALiBi (RW)",
        facts={
            **_FALCON_SIZES,
            **_biases(flag("bias", False)),
            "num_kv_heads": _falcon_kv_heads,
            "hidden_dim": lambda raw: size(
                "ffn_hidden_size", default=4 * _FALCON_SIZES["dim"](raw)
            )(raw),
            "max_seq_len": size("max_position_embeddings", default=2048),
            "norm_eps": number("layer_norm_epsilon", 1e-5),
            "activation": activation("activation", "gelu"),
            "rope": lambda raw: (
                None
                if _HAS_ALIBI(raw)
                else rope(partial=None, head_size=_FALCON_SIZES["head_dim"])(
                    {"max_position_embeddings": 2048, **raw}
                )
            ),
            "tied_head": flag("tie_word_embeddings", True),
            "parallel_residual": _falcon_is_parallel,
            "shared_norm": _falcon_shares_norm,
            "alibi": _falcon_slopes,
        },
        requires={"apply_residual_connection_post_layernorm": (False, None)},
        names={
            **model_names("transformer.word_embeddings", "transformer.ln_f"),
            **layer_names(
                _FALCON_LAYER,
                {
                    "attention.qkv": "self_attention.query_key_value",
                    "attention.out": "self_attention.dense",
                    **_LINEAR_NAMES,
                },
                order=_BY_HEAD,
            ),
            **{
                f"blocks.{{i}}.{ours}.{kind}": tuple(
                    source for name in theirs for source in one(f"{_FALCON_LAYER}.{name}.{kind}")
                )
                for kind in ("weight", "bias")
                for ours, theirs in {
                    "attention_norm": ("ln_attn", "input_layernorm"),
                    "mlp_norm": ("ln_mlp", "post_attention_layernorm"),
                }.items()
            },
        },
    ),
    "mpt": Family(
        examples="MPT 7B, 30B and their chat and instruct models",
        special="ALiBi, clipped projections, no biases",
        facts={
            **_sizes(("d_model",), ("n_layers",), ("n_heads",)),
            "hidden_dim": lambda raw: 4 * size("d_model")(raw),
            "max_seq_len": size("max_seq_len", default=2048),
            "norm_eps": number("layer_norm_epsilon", 1e-5),
            "norm_bias": constant(False),
            "activation": constant("gelu"),
            "tied_head": flag("tie_word_embeddings", True),
            "alibi": lambda raw: mpt_slopes(size("n_heads")(raw)),
            "attention_scale": _check_mpt,
            "qkv_clip": _attention_key("clip_qkv", None),
        },
        requires={"no_bias": (True,), "logit_scale": (None,), "expansion_ratio": (4,)},
        names={
            **model_names("transformer.wte", "transformer.norm_f"),
            **layer_names(
                "transformer.blocks.{i}",
                {
                    "attention_norm": "norm_1",
                    "attention.qkv": "attn.Wqkv",
                    "attention.out": "attn.out_proj",
                    "mlp_norm": "norm_2",
                    "mlp.up": "ffn.up_proj",
                    "mlp.down": "ffn.down_proj",
                },
            ),
        },
    ),
}
