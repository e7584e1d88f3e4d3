"""nanoGPT's ckpt.pt."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.foreign.tensors import ForeignTensors, Raw

GPT2_EOS = 50256


def read_nanogpt(
    path: Path, arguments: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Raw, ForeignTensors]:
    """A GPT-2 whose linears are stored [out, in], biases or none (then zeros are), exact GELU."""
    needed = "n_layer n_head n_embd block_size vocab_size".split()
    if missing := [key for key in needed if not isinstance(arguments.get(key), int)]:
        raise ValueError(f"{path}: model_args has no {', '.join(missing)}")
    vocab = arguments["vocab_size"]
    eos = GPT2_EOS if vocab > GPT2_EOS else None  # else characters, which have none
    raw = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": arguments["n_layer"],
        "n_head": arguments["n_head"],
        "n_embd": arguments["n_embd"],
        "n_positions": arguments["block_size"],
        "vocab_size": vocab,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": eos,
        "eos_token_id": eos,
    }
    found = {}
    for name, tensor in tensors.items():
        is_linear = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
        found[name] = tensor.transpose(0, -1) if is_linear and tensor.dim() else tensor
    for name in [name for name in found if re.search(r"\.(c_\w+|ln_\w+)\.weight$", name)]:
        bias = name.removesuffix("weight") + "bias"
        found.setdefault(bias, torch.zeros(found[name].shape[-1:], dtype=found[name].dtype))
    return raw, ForeignTensors(path.parent, found)
