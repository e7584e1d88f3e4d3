"""Tiny random models as Hugging Face folders, written without transformers.

Names and shapes are spelled out here once more, not asked of gptfast, so that an error there shows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
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
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(folder: Path, **overrides: Any) -> Path:
    """Writes a random Llama (LLAMA with keys of config.json replaced) and returns its folder."""
    raw = LLAMA | overrides
    return write_folder(folder, raw, llama_tensors(raw))


def tiny_gpt2(folder: Path, prefix: str = "transformer.", **overrides: Any) -> Path:
    """Writes a random GPT-2; `prefix` stands before all of its names but the head's."""
    raw = GPT2 | overrides
    return write_folder(folder, raw, gpt2_tensors(raw, prefix))


def write_folder(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], num_shards: int = 1
) -> Path:
    """A Hugging Face folder: config.json, and one model.safetensors or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::num_shards]}
        save_file(part, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def llama_tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    return random_tensors(llama_shapes(raw), seed)


def gpt2_tensors(
    raw: Mapping[str, Any], prefix: str = "transformer.", seed: int = 0
) -> dict[str, Tensor]:
    return random_tensors(gpt2_shapes(raw, prefix), seed)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers large enough that attention is sharp and every part moves the logits visibly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: 1 + 0.2 * tensor if _is_norm(name) else 0.2 * tensor
        for name, tensor in tensors.items()
    }


def _is_norm(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_"))


def llama_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, hidden, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    num_heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or dim // num_heads
    q_rows, kv_rows = num_heads * head_dim, raw["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (q_rows, dim),
            "self_attn.k_proj": (kv_rows, dim),
            "self_attn.v_proj": (kv_rows, dim),
            "self_attn.o_proj": (dim, q_rows),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if raw.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (dim,)
    shapes["model.norm.weight"] = (dim,)
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, dim)
    return shapes


def gpt2_shapes(raw: Mapping[str, Any], prefix: str = "transformer.") -> dict[str, tuple[int, ...]]:
    dim, vocab = raw["n_embd"], raw["vocab_size"]
    hidden = raw.get("n_inner") or 4 * dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}wte.weight": (vocab, dim),
        f"{prefix}wpe.weight": (raw["n_positions"], dim),
    }
    linears = {  # stored [in, out]
        "attn.c_attn": (dim, 3 * dim),
        "attn.c_proj": (dim, dim),
        "mlp.c_fc": (dim, hidden),
        "mlp.c_proj": (hidden, dim),
    }
    norms = {"ln_1": (dim,), "ln_2": (dim,)}
    for layer in range(raw["n_layer"]):
        for name, shape in (linears | norms).items():
            shapes[f"{prefix}h.{layer}.{name}.weight"] = shape
            shapes[f"{prefix}h.{layer}.{name}.bias"] = shape[-1:]
    shapes |= {f"{prefix}ln_f.weight": (dim,), f"{prefix}ln_f.bias": (dim,)}
    if not raw.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, dim)
    return shapes
