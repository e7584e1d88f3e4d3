"""The table of tiny models, by family: config.json as publishers write it, odd switches on.

What all the cases of a family share stands in FAMILY; CASES holds what each adds. Some use the
spelling of older releases of transformers, some today's. `write_checkpoint` makes folders of them,
with weights under which every part moves the logits.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 96
WINDOW = 5  # shorter than every prompt

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LAYER_NORM = {"layer_norm_eps": 1e-5, "rms_norm_eps": None}
_GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
_DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}

# What every case of a family has, beside its model_type.
FAMILY: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "ministral": _LLAMA_LIKE | {"sliding_window": WINDOW, "num_hidden_layers": 3, "head_dim": 8},
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 12},
    "qwen2_moe": _LLAMA_LIKE | _EXPERTS | {"shared_expert_intermediate_size": 28},
    "qwen3_moe": _LLAMA_LIKE | _EXPERTS | {"head_dim": 12},
    "granite": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE | {"num_hidden_layers": 4, "rope_theta": 2e6},
    "stablelm": _LLAMA_LIKE | _LAYER_NORM | {"partial_rotary_factor": 0.25, "head_dim": None},
    "starcoder2": _LLAMA_LIKE
    | {"norm_epsilon": 1e-5, "rms_norm_eps": None, "hidden_act": "gelu_pytorch_tanh"},
    "phi": _LLAMA_LIKE | _LAYER_NORM | {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "phi3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE | {"head_dim": 12, "tie_word_embeddings": True, "hidden_act": "gelu"},
    "gemma2": _LLAMA_LIKE
    | {
        "num_hidden_layers": 3,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": _LLAMA_LIKE
    | {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "tie_word_embeddings": True,
    },
    "gpt_oss": _LLAMA_LIKE
    | {
        "num_hidden_layers": 2,
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN | {"truncate": False},
        "attention_bias": True,
        "swiglu_limit": 1.5,  # near the gates' and ups' spread, so that many are clamped
    },
    "deepseek_v2": _LLAMA_LIKE | _DEEPSEEK | {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": _LLAMA_LIKE
    | _DEEPSEEK
    | {
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "gpt2": _GPT_LIKE,
    "gpt_neox": _LLAMA_LIKE
    | _LAYER_NORM
    | {
        "num_key_value_heads": None,
        "hidden_act": "gelu",
        "rope_theta": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "gptj": _GPT_LIKE | {"rotary_dim": 4},
    "gpt_bigcode": _GPT_LIKE
    | {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 32,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "bloom": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "seq_length": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 64,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mpt": {
        "vocab_size": VOCAB,
        "d_model": 36,
        "n_heads": 6,
        "n_layers": 2,
        "expansion_ratio": 4,
        "max_seq_len": 64,
        "no_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "codegen": _GPT_LIKE | {"rotary_dim": 4},
}

_LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.9],
    "long_factor": [1.2, 1.9, 3.1, 6.0],
}

# Id -> what this case adds to its family's facts; the id begins with the model_type.
CASES: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "llama-biases-tied": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "mistral-window": {"sliding_window": WINDOW},
    "mistral-nemo-head-dim": {"sliding_window": None, "head_dim": 12, "rope_theta": 1e6},
    "mistral-window-one": {"sliding_window": 1, "num_key_value_heads": 1},
    "ministral-layer-types": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral-all-sliding": {"num_hidden_layers": 2, "head_dim": 12},
    "mixtral-top2": {"sliding_window": None},
    "mixtral-window-tied": {
        "sliding_window": WINDOW,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
    },
    "qwen2-biases-tied": {
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen2-window-layers": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "num_key_value_heads": 1,
    },
    "qwen3-head-dim": {"use_sliding_window": False, "sliding_window": None},
    "qwen3-window-biases-tied": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2_moe-shared-expert": {"norm_topk_prob": False},
    "qwen2_moe-sparse-step-normalised": {
        "num_hidden_layers": 4,
        "qkv_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3_moe-normalised": {"norm_topk_prob": True},
    "qwen3_moe-dense-layers-window": {
        "num_hidden_layers": 3,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "granite-multipliers": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
    "granite-biases": {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.5,
        "residual_multiplier": 1.3,
        "logits_scaling": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "olmo2-post-norm": {},
    "olmo2-mha-biases-tied": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3-nope-layers": {"no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": True},
    "smollm3-interval-window-biases": {
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "stablelm-sequential-biases": {"use_qkv_bias": True, "use_parallel_residual": False},
    "stablelm-parallel-qk-norm": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True,
    },
    "starcoder2-biases-window": {
        "use_bias": True,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "starcoder2-no-biases": {"use_bias": False, "num_key_value_heads": 1},
    "phi-partial-rotary": {"num_key_value_heads": None},
    "phi-gqa-qk-norm": {"qk_layernorm": True, "partial_rotary_factor": 0.25},
    "phi3-fused-window": {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
    "phi3-longrope-within-original": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_scaling": _LONG_ROPE,
    },
    "phi3-longrope-beyond-original": {
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 8,
        "rope_scaling": _LONG_ROPE,
    },
    "phi3-partial-rotary-tied": {  # as in Phi-4-mini
        "head_dim": None,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 8,
        "rope_scaling": {key: v[:3] if key != "type" else v for key, v in _LONG_ROPE.items()},
        "tie_word_embeddings": True,
    },
    "gemma-mqa": {"num_key_value_heads": 1},
    "gemma-untied-gelu-tanh": {
        "tie_word_embeddings": False,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "num_key_value_heads": 4,
    },
    "gemma2-softcaps-window": {},
    "gemma2-layer-types-untied": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 6.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "gemma3_text-two-ropes-pattern": {
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text-layer-types-today": {
        "rope_theta": None,
        "rope_local_base_freq": None,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "gpt_oss-sinks-yarn": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss-layer-types-today": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "num_local_experts": 6,
        "num_experts_per_tok": 4,
        "swiglu_limit": 0.8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "deepseek_v2-lite": {
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": _DEEPSEEK_YARN,
    },
    "deepseek_v2-groups": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "attention_bias": True,
    },
    "deepseek_v3-groups-yarn": {"rope_scaling": _DEEPSEEK_YARN | {"mscale": 0.9}},
    "deepseek_v3-no-q-rank": {
        "q_lora_rank": None,
        "rope_interleave": False,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "n_shared_experts": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "gpt2-tied": {"tie_word_embeddings": True},
    "gpt2-inner-relu": {"n_inner": 40, "activation_function": "relu"},
    "gpt_neox-parallel": {"use_parallel_residual": True},
    "gpt_neox-sequential": {
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "attention_bias": True,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
    },
    "gpt_neox-no-attention-bias": {"use_parallel_residual": True, "attention_bias": False},
    "gptj-partial-rotary": {},
    "gptj-inner-rotary-all": {"n_inner": 40, "rotary_dim": 8},
    "gpt_bigcode-multi-query": {"multi_query": True},
    "gpt_bigcode-multi-head": {
        "multi_query": False,
        "n_inner": 40,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
    "opt-tied": {},
    "opt-gelu-untied": {"activation_function": "gelu", "tie_word_embeddings": False},
    "bloom-4-heads": {"n_head": 4},
    "bloom-6-heads-untied": {"n_head": 6, "hidden_size": 36, "tie_word_embeddings": False},
    "falcon-7b": {},
    "falcon-40b": {
        "new_decoder_architecture": True,
        "multi_query": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 40,
    },
    "falcon-11b": {
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "num_kv_heads": 2,
        "tie_word_embeddings": False,
        "rope_theta": 500042.0,
    },
    "falcon-rw-alibi": {
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "num_attention_heads": 8,
    },
    "falcon-parallel-alibi": {"alibi": True, "num_attention_heads": 4},
    "mpt-clip-6-heads": {"attn_config": {"alibi": True, "clip_qkv": 0.6, "attn_impl": "torch"}},
    "mpt-8-heads-scale": {
        "d_model": 32,
        "n_heads": 8,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "softmax_scale": 0.9},
    },
    "codegen-4-heads": {},
    "codegen-8-heads-tied": {
        "n_embd": 64,
        "n_head": 8,
        "n_inner": 40,
        "tie_word_embeddings": True,
    },
}


def raw_config(name: str) -> dict[str, Any]:
    """config.json of case `name`; a key that is None in the tables is left out, but where null says
    something.
    """
    model_type = name.split("-")[0]
    raw = {"model_type": model_type} | FAMILY[model_type] | CASES[name]
    telling = (
        "pad_token_id",
        "sliding_window",
        "q_lora_rank",
        "attn_logit_softcapping",
        "rope_scaling",
    )
    return {key: value for key, value in raw.items() if value is not None or key in telling}


def cases_of(model_type: str) -> list[str]:
    return [name for name in CASES if name.split("-")[0] == model_type]


def write_checkpoint(folder: Path, name: str, raw: dict[str, Any] | None = None) -> Path:
    """Case `name` (or config `raw` in its place) as transformers saves it, but for config.json,
    which stays as the table spells it.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    transformers.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(raw_config(name) if raw is None else raw)
    (folder / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, name)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    return folder


@torch.no_grad()
def randomise(model: nn.Module, name: str) -> None:
    """Transformers begins with biases, sinks and corrections of zero and norms of one, which would
    hide an error in them.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensors = dict(model.named_parameters())
    tensors |= {key: b for key, b in model.named_buffers() if key.endswith("correction_bias")}
    for key, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(_random_weight(key, noise, name.startswith("gemma")))


def _random_weight(key: str, noise: Tensor, norms_are_offsets: bool) -> Tensor:
    if key.endswith("sinks"):
        return noise
    if key.endswith("correction_bias"):
        return 0.3 * noise
    if noise.dim() == 1 and key.endswith("weight"):
        # Of either sign: with a tied head a mere one would soon repeat the same token.
        return noise + (-0.7 if norms_are_offsets else 0.3)
    table = "embed" in key or "wte" in key
    return (0.2 if noise.dim() == 1 or table else 0.3) * noise
