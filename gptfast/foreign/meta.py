"""Meta's layout of Llama: model.pth of Meta and gpt-fast, llama2.c's .bin (its legacy layout)."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptfast.foreign.tensors import ForeignTensors, Raw
from gptfast.tensor_files import some

# Meta's and gpt-fast's names -> those of Hugging Face.
META_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# What the weights do not tell: key of a Hugging Face config.json -> the names it has anywhere.
META_FACTS = {
    "num_attention_heads": ("num_attention_heads", "n_heads", "n_head"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "rope_theta": ("rope_theta", "rope_base"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len", "block_size"),
}
# Follow from the facts.
META_BUFFERS = r"(.*\.)?(rope\.freqs|freqs_(cis|cos|sin)|(causal_)?mask)"
# Facts of params.json that change what is computed.
META_UNREAD = ("use_scaled_rope", "rope_scaling", "quantization_args", "moe")
LLAMA2C_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_len")
LLAMA2C_MAGIC = 0x616B3432  # of its later layouts, which have versions


def read_meta(path: Path, known: Raw, tensors: Mapping[str, Tensor]) -> tuple[Raw, ForeignTensors]:
    """Llama with Meta's names, also with gpt-fast's fused wqkv. `known` is what the tensors do not
    tell: a config.json, or some facts as Meta or gpt-fast spell them.
    """
    is_complete = "model_type" in known
    found = {
        key: next((known[name] for name in names if known.get(name) is not None), None)
        for key, names in META_FACTS.items()
    }
    needed = ["num_attention_heads"] if is_complete else list(META_FACTS)
    if missing := [f"{key} ({META_FACTS[key][1]})" for key in needed if found[key] is None]:
        raise ValueError(
            f"{path}: the file does not say {', '.join(missing)}; give a json file that does with "
            "--config: Hugging Face's config.json, or params.json"
        )
    if stretched := [key for key in META_UNREAD if not is_complete and known.get(key)]:
        raise ValueError(
            f"{path}: {stretched[0]} is not read from params.json; give Hugging Face's config.json "
            "with --config"
        )
    num_heads = found["num_attention_heads"]
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"{path}: num_attention_heads is {num_heads!r}; a whole number is needed")
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(META_BUFFERS, n)}
    if single := [
        name for name, tensor in tensors.items() if not (tensor.dim() and tensor.numel())
    ]:
        raise ValueError(f"{path}: vectors and matrices are needed, found others: {some(single)}")
    renamed, paired = {}, {}
    for name, tensor in _split_qkv(path, tensors, num_heads):
        renamed[_published(name)] = tensor
        if match := re.fullmatch(r"(layers\.\d+\.attention\.)w[qk]\.(weight|bias)", name):
            head_dim = _q_rows(path, tensors, match[1], num_heads) // num_heads
            paired[_published(name)] = tensor.size(0) // head_dim
    raw = known if is_complete else _llama_config(path, known, found, renamed)
    return raw, ForeignTensors(path.parent, renamed, paired)


def _published(name: str) -> str:
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in META_NAMES:
        return name
    layer = f"model.{match[1]}" if match[1] else ""
    return f"{layer}{META_NAMES[match[2]]}.{match[3]}"


def _split_qkv(
    path: Path, tensors: Mapping[str, Tensor], num_heads: int
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        before, fused, kind = name.partition("wqkv.")
        if not fused:
            yield name, tensor
            continue
        q_rows = _q_rows(path, tensors, before, num_heads)
        kv_rows = (tensor.size(0) - q_rows) // 2
        if kv_rows <= 0 or tensor.size(0) != q_rows + 2 * kv_rows:
            raise ValueError(
                f"{path}: {name} has {tensor.size(0)} rows, which do not fit {num_heads} heads of "
                f"{q_rows // num_heads}"
            )
        for part, rows in zip("qkv", tensor.split((q_rows, kv_rows, kv_rows)), strict=True):
            yield f"{before}w{part}.{kind}", rows


def _q_rows(path: Path, tensors: Mapping[str, Tensor], before: str, num_heads: int) -> int:
    """How many numbers all query heads of a layer have: what its output projection reads."""
    out = tensors.get(f"{before}wo.weight")
    if out is None or out.dim() != 2 or out.size(1) % num_heads:
        found = "missing" if out is None else f"of shape {list(out.shape)}"
        raise ValueError(f"{path}: {before}wo.weight is {found}; {num_heads} heads are needed")
    return out.size(1)


def _llama_config(path: Path, known: Raw, found: Raw, tensors: Mapping[str, Tensor]) -> Raw:
    """config.json of a Llama: sizes are those of the tensors."""
    layers = {int(m[1]) for n in tensors if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    first = "model.layers.0."
    names = [f"{first}self_attn.q_proj", f"{first}self_attn.k_proj", f"{first}mlp.gate_proj"]
    names += ["model.embed_tokens"]
    shapes = [tensors[n].shape for name in names if (n := f"{name}.weight") in tensors]
    if len(shapes) < len(names) or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{path}: matrices are needed for {some(names)} (in Meta's names)")
    (q_rows, _), (kv_rows, _), (hidden, _), (vocab, dim) = shapes
    head_dim = max(1, q_rows // found["num_attention_heads"])
    stated = {"dim": dim, "n_layers": len(layers), "n_kv_heads": kv_rows // head_dim}
    stated |= {"vocab_size": vocab, "head_dim": head_dim}
    whole = {"head_dim": dim // found["num_attention_heads"], **known}
    for key, size in stated.items():
        # Meta writes -1 for a vocabulary that is the tokenizer's.
        if whole.get(key) not in (None, -1, size):
            raise ValueError(
                f"{path}: the tensors have {key} {size}, and {whole[key]} was to be expected; "
                "part of a model-parallel checkpoint? Parts are not joined: convert its Hugging "
                "Face version"
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": kv_rows // head_dim,
        "head_dim": head_dim,
        "intermediate_size": hidden,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": known.get("bos_token_id"),
        "eos_token_id": known.get("eos_token_id"),
        **found,
    }


# -- llama2.c --


def read_llama2c(path: Path) -> tuple[Raw, ForeignTensors]:
    """A header of seven int32, then float32 weights, layer by layer within each kind. Its engine
    fixes the rest: epsilon 1e-5, rotary base 10000; a text ends at token 1 or 2.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        data = file.read(28)
    numbers = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, 28, 4)]
    facts = dict(zip(LLAMA2C_HEADER, numbers, strict=True))
    if numbers[0] == LLAMA2C_MAGIC:
        raise ValueError(
            f"{path}: llama2.c's layout version {numbers[1]}; only the first one (legacy, version "
            "0) is read: export the model again with --version 0"
        )
    shared, vocab = facts["vocab_size"] > 0, abs(facts["vocab_size"])
    dim, hidden, num_layers, heads, kv_heads = numbers[:5]
    plausible = size >= 28 and vocab and all(0 < number < 1 << 24 for number in numbers[:5])
    if not plausible or not 0 < numbers[6] < 1 << 24 or dim % heads or heads % kv_heads:
        raise ValueError(
            f"{path}: neither a file of torch.save nor a llama2.c model (legacy layout); of a "
            "Hugging Face model give the folder"
        )
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    parts: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab, dim)}
    parts |= {name: (num_layers, *shape) for name, shape in layer.items()}
    parts |= {"norm": (dim,), "rotations": (facts["max_len"], head_dim)}  # cosines and sines
    if not shared:
        parts["output"] = (vocab, dim)
    counts = [torch.Size(shape).numel() for shape in parts.values()]
    if size != 28 + 4 * sum(counts):
        raise ValueError(
            f"{path}: {size:,} bytes found; a llama2.c model (legacy layout) with its header has "
            f"{28 + 4 * sum(counts):,}"
        )
    floats = torch.from_file(str(path), size=size // 4, dtype=torch.float32)[7:]
    pieces = dict(zip(parts, floats.split(counts), strict=True))
    tensors: dict[str, Tensor] = {}
    for name, shape in parts.items():
        piece = pieces[name].view(shape)
        if name in layer:
            tensors |= {f"layers.{i}.{name}.weight": piece[i] for i in range(num_layers)}
        elif name != "rotations":
            tensors[f"{name}.weight"] = piece
    known = {
        "n_heads": heads,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_seq_len": facts["max_len"],
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
    }
    return read_meta(path, known, tensors)
