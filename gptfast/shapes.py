"""Named shapes: what published models look like, and random weights for them. For benchmarks and
tests, which need sizes and speed, not sense.

Knows the facts of a model and where its weights go; never reads or downloads one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.device import DTYPES, check_fits
from gptfast.families import Raw, find_family, model_config
from gptfast.model import Transformer, fused_rows, keeps_float32
from gptfast.parallel import ALONE, Group
from gptfast.quantization import QuantPlan, fill, rounded
from gptfast.sharding import local_config
from gptfast.shards import Stored, write_tensors
from quantize.packing import pack_linears

# The random numbers that all weights repeat. A prime: no width divides it, so no two rows of a
# weight are equal.
BLOCK_SIZE = 1_048_573


def shape_config(name: str, num_layers: int | None = None) -> dict[str, Any]:
    """The config.json of a named shape, or of its first `num_layers` layers; ValueError with the
    names there are.
    """
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown; use one of: {', '.join(SHAPES)}")
    raw = dict(SHAPES[name])
    if num_layers is not None:
        [key] = {"num_hidden_layers", "n_layer"} & raw.keys()
        if not 1 <= num_layers <= raw[key]:
            raise ValueError(f"num_layers is {num_layers}; shape {name} has 1 to {raw[key]}")
        raw[key] = num_layers
    return raw


def random_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    quant: QuantPlan | None = None,
    group: Group = ALONE,
) -> Transformer:
    """A model with random weights, each made directly in its final dtype and place, or rounded to
    the formats of a plan as it is made; in a group of several ranks a share of that size.

    The same seed gives the same numbers on every device. MemoryError says how much was needed.
    """
    device = torch.device(device)
    sharers = group.local_size if device.type == "cpu" else 1  # of its memory
    check_fits(
        config.num_parameters * dtype.itemsize * sharers // group.size,
        device,
        f"{config.num_parameters:,} random weights in {dtype}",
        "use a smaller dtype or shape",
    )
    with torch.device("meta"):
        model = Transformer(local_config(config, group), group)
    weights = random_weights(model, dtype, device, seed)
    formats = {} if quant is None else quant.formats(model)
    fill(model, rounded(weights, formats, config.tied_head, search=False), dtype)
    model.tie_head()
    pack_linears(model, dtype)
    return model.to(device).eval()


def random_weights(
    model: Transformer, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values for the parameters of `model`, whose own values are not looked at.

    A weight of K columns has deviation 1/sqrt(K), so that activations keep their size through any
    number of layers; norms are one, biases small. Drawing 10^9 numbers takes many seconds, so one
    block of them is drawn, and each weight repeats it from another place on: as fast as memory.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK_SIZE, generator=generator).to(device).repeat(2)
    for name, parameter in list(model.named_parameters()):
        kept = torch.float32 if keeps_float32(name) else dtype
        tensor = torch.empty(parameter.shape, dtype=kept, device=device)
        if tensor.dim() == 1 and name.endswith(".weight"):
            tensor.fill_(1.0)
        else:
            scale = 0.02 if tensor.dim() == 1 else tensor.size(-1) ** -0.5
            start = int(torch.randint(BLOCK_SIZE, (), generator=generator))
            _tile(tensor, (block[start : start + BLOCK_SIZE] * scale).to(dtype))
        yield name, tensor


def _tile(tensor: Tensor, numbers: Tensor) -> None:
    """Fills `tensor` with `numbers` over and over."""
    flat = tensor.view(-1)
    whole = flat.numel() // numbers.numel()
    if whole:
        tiles = flat[: whole * numbers.numel()].view(whole, -1)
        tiles.copy_(numbers.expand_as(tiles))
    rest = flat[whole * numbers.numel() :]
    rest.copy_(numbers[: rest.numel()])


def write_random_checkpoint(raw: Raw, folder: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """A Hugging Face folder (config.json, shards and their index) with the weights that
    `random_model` makes. It has no tokenizer.
    """
    config, family = model_config(raw), find_family(raw)
    with torch.device("meta"):
        model = Transformer(config)
    named = {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**raw, **named}))
    places = {name: family.sources(name)[0] for name, _ in model.named_parameters()}
    stored = {
        theirs: Stored(torch.float32 if keeps_float32(name) else dtype, shape)
        for name, parameter in model.named_parameters()
        for theirs, shape in places[name]
        .shapes(tuple(parameter.shape), fused_rows(config, name))
        .items()
    }
    weights = random_weights(model, dtype, torch.device("cpu"), seed)
    theirs = (
        entry
        for name, tensor in weights
        for entry in places[name].write(tensor, config, fused_rows(config, name))
    )
    write_tensors(folder, stored, theirs)


def shape_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that was asked for; a shape's "auto" is bfloat16, whatever its model was trained
    in.
    """
    return DTYPES["bf16"] if dtype is None else dtype


def _llama(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int, vocab: int, **others: Any
) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **others,
    }


def _gpt2(dim: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": dim,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


def _llama3(factor: float | None = None) -> dict[str, Any]:
    """What Llama 3 models share; with a factor, the stretched positions of 3.1 and 3.2."""
    common = {"bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0}
    if factor is None:
        return {**common, "max_position_embeddings": 8192}
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**common, "max_position_embeddings": 131072, "rope_scaling": scaling}


_TIED = {"tie_word_embeddings": True}
_LLAMA_2 = {"max_position_embeddings": 4096}
_SMOLLM2 = {"max_position_embeddings": 8192, "rope_theta": 100000.0, **_TIED}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6}
_QWEN3 = {**_QWEN2, "model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
_GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    **_TIED,
}
_PHI4_MINI = {
    "model_type": "phi3",
    "max_position_embeddings": 4096,  # without the lists of longrope
    "partial_rotary_factor": 0.75,
    **_TIED,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rope_theta": 150000.0,
}
_DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "max_position_embeddings": 4096,  # without the stretching of yarn
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
}

# Name: config.json, as far as it decides sizes and mathematics.
SHAPES: dict[str, Mapping[str, Any]] = {
    "smollm-135m": _llama(576, 30, 9, 3, 1536, 49152, **_TIED),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, 49152, **_SMOLLM2),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, 49152, **_SMOLLM2 | {"rope_theta": 130000.0}),
    "llama-160m": _llama(768, 12, 12, 12, 3072, 32000, rms_norm_eps=1e-6),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, 32000),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, **_LLAMA_2),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, **_LLAMA_2),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, **_LLAMA_2),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256, **_llama3()),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, **_llama3(8.0)),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, 128256, **_llama3(8.0)),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, head_dim=64, **_TIED, **_llama3(32.0)),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, head_dim=128, **_TIED, **_llama3(32.0)),
    "qwen2.5-0.5b": _llama(896, 24, 14, 2, 4864, 151936, **_QWEN2, **_TIED),
    "qwen3-0.6b": _llama(1024, 28, 16, 8, 3072, 151936, **_QWEN3, **_TIED),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, **_QWEN3),
    "qwen3-30b-a3b": _llama(2048, 48, 32, 4, 6144, 151936, **_QWEN3_MOE),
    "gemma-2-2b": _llama(2304, 26, 8, 4, 9216, 256000, **_GEMMA2),
    "phi-4-mini": _llama(3072, 32, 24, 8, 8192, 200064, **_PHI4_MINI),
    "mixtral-8x7b": _llama(4096, 32, 32, 8, 14336, 32000, **_MIXTRAL),
    "gpt-oss-20b": _llama(2880, 24, 64, 8, 2880, 201088, **_GPT_OSS),
    "deepseek-v2-lite": _llama(2048, 27, 16, 16, 10944, 102400, **_DEEPSEEK_V2_LITE),
    "pythia-1.4b": {
        **_llama(2048, 24, 16, 16, 8192, 50304),
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
    },
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
