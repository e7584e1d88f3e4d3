"""Llama's heirs with a mixture of experts in place of the MLP, DeepSeek's latent attention among
them.
"""

from typing import Any

from gptfast.config import ExpertsConfig
from gptfast.families.family import Family, layer_names, one
from gptfast.families.llama_line import (
    BIASES,
    FACTS,
    LAYER,
    NAMES,
    NORMED_NAMES,
    SLIDING,
    is_even,
)
from gptfast.families.positions import (
    latent,
    latent_head_dim,
    latent_scale,
    rope,
    windows,
)
from gptfast.families.readers import (
    Fact,
    Raw,
    constant,
    count,
    flag,
    kv_heads,
    number,
    positive,
    size,
    whole_numbers,
)
from gptfast.sources import Names, Source, by_pair

# -- mixtures of experts --

_MIXTRAL_NUM = size("num_local_experts", "num_experts")
_QWEN_NUM = size("num_experts", "num_local_experts")


def _qwen_dense_layers(raw: Raw) -> tuple[int, ...]:
    step = size("decoder_sparse_step", default=1)(raw)
    dense = whole_numbers("mlp_only_layers")(raw) or ()
    layers = range(size("num_hidden_layers")(raw))
    return tuple(layer for layer in layers if layer in dense or (layer + 1) % step)


def _mixtral_experts(raw: Raw) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=_MIXTRAL_NUM(raw),
        num_active=size("num_experts_per_tok", default=2)(raw),
        hidden_dim=size("intermediate_size")(raw),
    )


def _qwen2_experts(raw: Raw) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=_QWEN_NUM(raw),
        num_active=size("num_experts_per_tok", default=4)(raw),
        hidden_dim=size("moe_intermediate_size", default=1408)(raw),
        shared_hidden_dim=size("shared_expert_intermediate_size", default=5632)(raw),
        shared_gate=True,
        normalize=flag("norm_topk_prob", False)(raw),
        dense_layers=_qwen_dense_layers(raw),
    )


def _qwen3_experts(raw: Raw) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=_QWEN_NUM(raw),
        num_active=size("num_experts_per_tok", default=8)(raw),
        hidden_dim=size("moe_intermediate_size", default=768)(raw),
        normalize=flag("norm_topk_prob", False)(raw),
        dense_layers=_qwen_dense_layers(raw),
    )


def _gpt_oss_experts(raw: Raw) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=_MIXTRAL_NUM(raw),
        num_active=size("num_experts_per_tok", "experts_per_token", default=4)(raw),
        hidden_dim=size("intermediate_size")(raw),
        router_bias=True,
        bias=True,
    )


def _deepseek_experts(raw: Raw) -> ExpertsConfig | None:
    if raw.get("n_routed_experts", 1) is None:  # the plain transformers of the line
        return None
    is_v3 = raw["model_type"] == "deepseek_v3"
    method = raw.get("topk_method") or ("noaux_tc" if is_v3 else "greedy")
    in_groups = method != "greedy"
    hidden_dim, num_layers = size("moe_intermediate_size")(raw), size("num_hidden_layers")(raw)
    return ExpertsConfig(
        num_experts=size("n_routed_experts", "num_local_experts", "num_experts")(raw),
        num_active=size("num_experts_per_tok")(raw),
        hidden_dim=hidden_dim,
        shared_hidden_dim=hidden_dim * count("n_shared_experts", 1 if is_v3 else 2)(raw),
        score="sigmoid" if is_v3 else "softmax",
        normalize=is_v3 and flag("norm_topk_prob", True)(raw),
        scale=number("routed_scaling_factor", 2.5 if is_v3 else 1.0)(raw),
        correction_bias=is_v3,
        num_groups=size("n_group", default=8 if is_v3 else 1)(raw) if in_groups else 1,
        num_active_groups=size("topk_group", default=4 if is_v3 else 1)(raw) if in_groups else 1,
        group_score="best_two" if is_v3 else "best",
        dense_layers=tuple(
            range(min(count("first_k_dense_replace", 3 if is_v3 else 0)(raw), num_layers))
        ),
    )


def _gpt_oss_rope(raw: Raw) -> Any:
    """Where config.json is silent, the context is stretched as in the published models."""
    read = rope(theta=150000.0, partial=None, head_size=size("head_dim", default=64))
    stretched = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
    stretched["original_max_position_embeddings"] = 4096
    is_silent = not (raw.get("rope_scaling") or raw.get("rope_parameters"))
    return read({**raw, "rope_scaling": stretched} if is_silent else raw)


def _experts_names(experts: str, router: str, gate: str, up: str, down: str) -> Names:
    """Tensors of one expert each."""
    return {
        "blocks.{i}.mlp.router.weight": one(f"{LAYER}.{router}.weight"),
        "blocks.{i}.mlp.expert_gate_up.weight": one(
            *(f"{LAYER}.{experts}.{{e}}.{name}.weight" for name in (gate, up))
        ),
        "blocks.{i}.mlp.expert_down.weight": one(f"{LAYER}.{experts}.{{e}}.{down}.weight"),
    }


_QWEN_EXPERTS = _experts_names("mlp.experts", "mlp.gate", "gate_proj", "up_proj", "down_proj")
_GPT_OSS_EXPERTS = f"{LAYER}.mlp.experts"

# -- latent attention --

_DEEPSEEK_FACTS: dict[str, Fact] = FACTS | {
    "head_dim": latent_head_dim,
    "num_kv_heads": size("num_attention_heads"),
    "latent": latent(q_rank=None),
    "attention_scale": latent_scale,
    "experts": _deepseek_experts,
    "qkv_bias": flag("attention_bias", False),
    "out_bias": flag("attention_bias", False),
    "mlp_bias": flag("mlp_bias", False),
}
_DEEPSEEK_NAMES: Names = {
    **NAMES,
    **_QWEN_EXPERTS,
    **layer_names(
        LAYER,
        {
            "attention.q_a": "self_attn.q_a_proj",
            "attention.q_norm": "self_attn.q_a_layernorm",
            "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
            "attention.kv_norm": "self_attn.kv_a_layernorm",
            "mlp.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            "mlp.shared.down": "mlp.shared_experts.down_proj",
        },
    ),
    "blocks.{i}.attention.q.weight": (
        Source((f"{LAYER}.self_attn.q_b_proj.weight",)),
        Source((f"{LAYER}.self_attn.q_proj.weight",)),
    ),
    "blocks.{i}.attention.kv_b": one(f"{LAYER}.self_attn.kv_b_proj.weight"),
    "blocks.{i}.mlp.router.correction": one(f"{LAYER}.mlp.gate.e_score_correction_bias"),
}

# -- the table --

EXPERT_LINE: dict[str, Family] = {
    "mixtral": Family(
        examples="Mixtral 8x7B, 8x22B",
        special="mixture of experts",
        facts=FACTS
        | {
            "num_kv_heads": kv_heads(8),
            "norm_eps": number("rms_norm_eps", 1e-5),
            "rope": rope(theta=1e6, partial=None),
            "windows": windows(),
            "experts": _mixtral_experts,
        },
        names={
            **NAMES,
            **_experts_names("block_sparse_moe.experts", "block_sparse_moe.gate", "w1", "w3", "w2"),
        },
    ),
    "qwen2_moe": Family(
        examples="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        special="mixture of experts with a gated shared one",
        facts=FACTS
        | {
            "num_kv_heads": kv_heads(16),
            "qkv_bias": flag("qkv_bias", True),
            "windows": windows(
                lambda raw, layer: (
                    layer % 2 == 0 and layer < size("max_window_layers", default=28)(raw)
                ),
                default=4096,
                enabled=SLIDING["use_sliding_window"],
            ),
            "experts": _qwen2_experts,
        },
        names={
            **NAMES,
            **_QWEN_EXPERTS,
            **layer_names(
                LAYER,
                {
                    "mlp.shared.gate_up": (
                        "mlp.shared_expert.gate_proj",
                        "mlp.shared_expert.up_proj",
                    ),
                    "mlp.shared.down": "mlp.shared_expert.down_proj",
                    "mlp.shared_gate": "mlp.shared_expert_gate",
                },
            ),
        },
    ),
    "qwen3_moe": Family(
        examples="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        special="mixture of experts, norm of each head's query and key",
        facts=FACTS
        | BIASES
        | {
            "num_kv_heads": kv_heads(4),
            "qk_norm": constant("head"),
            "mlp_bias": constant(False),
            "windows": windows(default=4096, enabled=SLIDING["use_sliding_window"]),
            "experts": _qwen3_experts,
        },
        names={**NORMED_NAMES, **_QWEN_EXPERTS},
    ),
    "gpt_oss": Family(
        examples="gpt-oss-20b, gpt-oss-120b",
        special="attention sinks, experts with clamped SwiGLU, MXFP4 weights read",
        facts=FACTS
        | {
            "num_kv_heads": kv_heads(8),
            "head_dim": size("head_dim", default=64),
            "norm_eps": number("rms_norm_eps", 1e-5),
            "activation": constant("gelu_quick"),
            "rope": _gpt_oss_rope,
            "windows": windows(is_even, default=128),
            "qkv_bias": flag("attention_bias", True),
            "out_bias": flag("attention_bias", True),
            "attention_sinks": constant(True),
            "swiglu_limit": positive("swiglu_limit", 7.0),
            "experts": _gpt_oss_experts,
        },
        requires={"swiglu_alpha": (1.702,), "hidden_act": ("silu",)},
        names={
            **NAMES,
            "blocks.{i}.attention.sinks": one(f"{LAYER}.self_attn.sinks"),
            "blocks.{i}.mlp.router.weight": one(f"{LAYER}.mlp.router.weight"),
            "blocks.{i}.mlp.router.bias": one(f"{LAYER}.mlp.router.bias"),
            "blocks.{i}.mlp.expert_gate_up.weight": (
                Source((f"{_GPT_OSS_EXPERTS}.gate_up_proj",), transposed=True, order=by_pair),
                Source(
                    tuple(f"{_GPT_OSS_EXPERTS}.gate_up_proj_{x}" for x in ("blocks", "scales")),
                    order=by_pair,
                    mxfp4=True,
                ),
            ),
            "blocks.{i}.mlp.expert_gate_up.bias": one(
                f"{_GPT_OSS_EXPERTS}.gate_up_proj_bias", order=by_pair, rows_dim=-1
            ),
            "blocks.{i}.mlp.expert_down.weight": (
                Source((f"{_GPT_OSS_EXPERTS}.down_proj",), transposed=True),
                Source(
                    tuple(f"{_GPT_OSS_EXPERTS}.down_proj_{x}" for x in ("blocks", "scales")),
                    mxfp4=True,
                ),
            ),
            "blocks.{i}.mlp.expert_down.bias": one(f"{_GPT_OSS_EXPERTS}.down_proj_bias"),
        },
    ),
    "deepseek_v2": Family(
        examples="DeepSeek-V2, V2-Lite, Coder-V2",
        special="latent attention, shared and routed experts",
        facts=_DEEPSEEK_FACTS
        | {
            "rope": rope(partial=None, head_size=size("qk_rope_head_dim"), interleaved=True),
        },
        requires={
            "norm_topk_prob": (False, None),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy", None),
            "moe_layer_freq": (1, None),
        },
        names=_DEEPSEEK_NAMES,
    ),
    "deepseek_v3": Family(
        examples="DeepSeek-V3, R1",
        special="latent attention, sigmoid router with a bias for the choice",
        facts=_DEEPSEEK_FACTS
        | {
            "latent": latent(q_rank=1536),
            "rope": rope(
                partial=None,
                head_size=size("qk_rope_head_dim"),
                interleaved=flag("rope_interleave", True),
            ),
        },
        requires={
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc", None),
            "moe_layer_freq": (1, None),
        },
        names=_DEEPSEEK_NAMES,
    ),
}
