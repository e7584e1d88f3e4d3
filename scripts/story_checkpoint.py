"""Writes a trained storyteller as a Hugging Face folder: Llama's names and config, bf16 weights."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from story_tokens import BOS_ID, EOS_ID, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gptfast.model import Transformer


def write_checkpoint(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(hugging_face_weights(model), path, {"format": "pt"})
    path.chmod(0o644)  # it is written for its owner alone, and is meant for a package
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", facts)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": True, "temperature": 0.8},
    )
    write_tokenizer(tokenizer, folder, config.max_seq_len)


def hugging_face_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights in bf16 under the names of Hugging Face's Llama, fused ones split again."""
    config = model.config
    kv_rows = config.num_kv_heads * config.head_dim
    split = {
        "attention.qkv": (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (config.num_heads * config.head_dim, kv_rows, kv_rows),
        ),
        "attention.out": (("self_attn.o_proj",), (config.dim,)),
        "mlp.gate_up": (("mlp.gate_proj", "mlp.up_proj"), (config.hidden_dim, config.hidden_dim)),
        "mlp.down": (("mlp.down_proj",), (config.dim,)),
        "attention_norm": (("input_layernorm",), (config.dim,)),
        "mlp_norm": (("post_attention_layernorm",), (config.dim,)),
    }
    weights = {
        "model.embed_tokens.weight": model.get_parameter("embed.weight"),
        "model.norm.weight": model.get_parameter("norm.weight"),
    }
    for i, block in enumerate(model.blocks):
        for name, weight in block.named_parameters():
            names, rows = split[name.removesuffix(".weight")]
            for part, tensor in zip(names, weight.split(rows), strict=True):
                weights[f"model.layers.{i}.{part}.weight"] = tensor
    return {
        name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()
    }


def write_json(path: Path, facts: dict[str, object]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
