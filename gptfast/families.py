"""FAMILIES: model_type -> how a Hugging Face config.json becomes facts, and where our weights find
theirs.

A family is one dict literal and one entry in tests/test_families.py. Nothing is guessed: an unknown
model_type, or a key whose value would change the mathematics and is not supported, is a ValueError
that names it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptfast.config import Activation, ModelConfig, RopeConfig

Raw = Mapping[str, Any]  # a parsed config.json
Fact = Callable[[Raw], Any]


@dataclass(frozen=True)
class Family:
    """`facts`: ModelConfig field -> reader of config.json. `requires`: key -> the values under
    which those facts are the whole truth. `names`: our parameter -> their tensors, stacked along
    the rows. `transposed`: ours whose source is stored [in, out]. `prefixes` may stand before every
    one of their names; `ignored` matches tensors that carry nothing.
    """

    examples: str
    facts: Mapping[str, Fact]
    names: Mapping[str, tuple[str, ...]]
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    ignored: str = r"(?!)"

    def source(self, name: str) -> tuple[str, ...]:
        """Their tensor names (without prefix) for our parameter `name`."""
        layer = re.search(r"\.(\d+)\.", name)
        template = self._template(name)
        index = layer.group(1) if layer else ""
        return tuple(theirs.replace("{i}", index) for theirs in self.names[template])

    def is_transposed(self, name: str) -> bool:
        return self._template(name) in self.transposed

    @staticmethod
    def _template(name: str) -> str:
        return re.sub(r"\.\d+\.", ".{i}.", name)


def model_config(raw: Raw, generation: Raw | None = None) -> ModelConfig:
    """The facts in a parsed config.json; stop tokens of generation_config.json win where it names
    any.
    """
    family = find_family(raw)
    for key, values in family.requires.items():
        if key in raw and raw[key] not in values:
            supported = ", ".join(repr(value) for value in values)
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} changes what a {raw['model_type']!r} model "
                f"computes and is not supported (supported: {supported})"
            )
    try:
        facts = {name: fact(raw) for name, fact in family.facts.items()}
    except KeyError as error:
        raise ValueError(
            f"config.json: {error.args[0]!r} is missing; {raw['model_type']!r} models need it"
        ) from None
    eos = (generation or {}).get("eos_token_id")
    eos = raw.get("eos_token_id") if eos in (None, []) else eos
    return ModelConfig(
        model_type=raw["model_type"],
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        **facts,
    )


def find_family(raw: Raw) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported (supported: {known})"
        )
    return FAMILIES[model_type]


def _size(*keys: str) -> Fact:
    """The first of `keys` that is there and not null; KeyError of the first otherwise."""

    def read(raw: Raw) -> int:
        for key in keys:
            value = raw.get(key)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(
                        f"config.json: {key} = {value!r}; a positive whole number is needed"
                    )
                return value
        raise KeyError(keys[0])

    return read


def _optional(key: str, default: Any) -> Fact:
    """The value of `key`; where it is absent or null, what transformers takes then."""
    return lambda raw: default if raw.get(key) is None else raw[key]


def _constant(value: Any) -> Fact:
    return lambda raw: value


def _head_dim(raw: Raw) -> int:
    if raw.get("head_dim") is not None:
        return _size("head_dim")(raw)
    return _quotient("hidden_size", "num_attention_heads")(raw)


def _quotient(dim_key: str, heads_key: str) -> Fact:
    def read(raw: Raw) -> int:
        dim, heads = _size(dim_key)(raw), _size(heads_key)(raw)
        if dim % heads:
            raise ValueError(
                f"config.json: {dim_key} {dim} is not a multiple of {heads_key} {heads}"
            )
        return dim // heads

    return read


ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def _activation(key: str, default: str) -> Fact:
    def read(raw: Raw) -> Activation:
        name = raw.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATION_NAMES:
            raise ValueError(
                f"config.json: {key} = {name!r} is not supported "
                f"(supported: {', '.join(ACTIVATION_NAMES)})"
            )
        return ACTIVATION_NAMES[name]

    return read


def _rope_parameters(raw: Raw) -> dict[str, Any]:
    """`rope_theta` + `rope_scaling` (until transformers 4) and `rope_parameters` (since 5), as one
    dict.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(
            f"config.json: rope scaling {scaling!r} is not an object with a 'rope_type'"
        )
    merged = {"rope_theta": raw.get("rope_theta"), **scaling}
    if raw.get("original_max_position_embeddings") is not None:  # transformers prefers this one
        merged["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    # Before transformers 4.45 the rule's name stood under "type".
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    return merged


def _rope(raw: Raw) -> RopeConfig:
    """RopeConfig by the definitions of transformers' modeling_rope_utils."""
    rope = _rope_parameters(raw)
    kind = rope["rope_type"]
    theta = _number(rope, "rope_theta", 10000.0)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError("config.json: rope_parameters: partial_rotary_factor is not supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"config.json: rope scaling {kind!r} is not supported "
            "(supported: linear, dynamic, llama3, yarn)"
        )
    trained = _size("max_position_embeddings")(raw)
    original = _original_context(raw, rope)
    factor = _number(rope, "factor", trained / original if kind == "yarn" else None)
    settings: dict[str, Any] = {"scaling": kind, "factor": factor}
    if kind == "dynamic":
        settings |= {"original_max_seq_len": trained}
    elif kind == "llama3":
        settings |= {
            "original_max_seq_len": original,
            "low_freq_factor": _number(rope, "low_freq_factor"),
            "high_freq_factor": _number(rope, "high_freq_factor"),
        }
    elif kind == "yarn":
        settings |= {
            "original_max_seq_len": original,
            "beta_fast": _number(rope, "beta_fast", 32.0) or 32.0,
            "beta_slow": _number(rope, "beta_slow", 1.0) or 1.0,
            "truncate": bool(rope.get("truncate", True)),
            "attention_factor": _yarn_attention_factor(rope, factor),
        }
    return RopeConfig(theta, **settings)


def _yarn_attention_factor(rope: Raw, factor: float) -> float:
    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    mscale, all_dim = _number(rope, "mscale", 0.0), _number(rope, "mscale_all_dim", 0.0)
    if mscale and all_dim:
        return magnitude(factor, mscale) / magnitude(factor, all_dim)
    return magnitude(factor)


def _number(rope: Raw, key: str, default: float | None = None) -> float:
    value = default if rope.get(key) is None else rope[key]
    # The comparison is also false for NaN; beyond it float32 has no numbers.
    if not isinstance(value, int | float) or not abs(value) < 3e38:
        raise ValueError(
            f"config.json: {key} = {value!r} for rope type {rope['rope_type']!r}; "
            "a number is needed"
        )
    return float(value)


def _original_context(raw: Raw, rope: Raw) -> int:
    """Tokens of context that the frequencies were trained for, before scaling."""
    if rope.get("original_max_position_embeddings") is None:
        return _size("max_position_embeddings")(raw)
    return _size("original_max_position_embeddings")(rope)


def _context(raw: Raw) -> int:
    """Tokens of context: what config.json says, stretched by the rules that leave the stretching to
    the reader.
    """
    rope, trained = _rope_parameters(raw), _size("max_position_embeddings")(raw)
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(trained * _number(rope, "factor"))
    if rope["rope_type"] == "yarn":
        return max(trained, int(_original_context(raw, rope) * _number(rope, "factor", 0.0)))
    return trained


FAMILIES: dict[str, Family] = {
    "llama": Family(
        examples="Llama 1, 2, 3, 3.1, 3.2, CodeLlama, TinyLlama, SmolLM, OpenLLaMA, Vicuna",
        facts={
            "vocab_size": _size("vocab_size"),
            "dim": _size("hidden_size"),
            "num_layers": _size("num_hidden_layers"),
            "num_heads": _size("num_attention_heads"),
            "num_kv_heads": _size("num_key_value_heads", "num_attention_heads"),
            "head_dim": _head_dim,
            "hidden_dim": _size("intermediate_size"),
            "max_seq_len": _context,
            "norm": _constant("rms"),
            "norm_eps": _optional("rms_norm_eps", 1e-6),
            "activation": _activation("hidden_act", "silu"),
            "gated_mlp": _constant(True),
            "rope": _rope,
            "tied_head": _optional("tie_word_embeddings", False),
            "qkv_bias": _optional("attention_bias", False),
            "out_bias": _optional("attention_bias", False),
            "mlp_bias": _optional("mlp_bias", False),
        },
        requires={"partial_rotary_factor": (1, None)},
        names={
            "embed.weight": ("model.embed_tokens.weight",),
            **{
                f"blocks.{{i}}.{ours}.{kind}": tuple(
                    f"model.layers.{{i}}.{theirs}.{kind}" for theirs in sources
                )
                for kind in ("weight", "bias")
                for ours, sources in {
                    "attention_norm": ("input_layernorm",),
                    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "attention.out": ("self_attn.o_proj",),
                    "mlp_norm": ("post_attention_layernorm",),
                    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
                    "mlp.down": ("mlp.down_proj",),
                }.items()
            },
            "norm.weight": ("model.norm.weight",),
            "head.weight": ("lm_head.weight",),
        },
        ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
    "gpt2": Family(
        examples="GPT-2, DistilGPT2, Cerebras-GPT, DLite",
        facts={
            "vocab_size": _size("vocab_size"),
            "dim": _size("n_embd"),
            "num_layers": _size("n_layer"),
            "num_heads": _size("n_head"),
            "num_kv_heads": _size("n_head"),
            "head_dim": _quotient("n_embd", "n_head"),
            "hidden_dim": lambda raw: raw.get("n_inner") or 4 * raw["n_embd"],
            "max_seq_len": _size("n_positions", "n_ctx"),
            "norm": _constant("layer"),
            "norm_eps": _optional("layer_norm_epsilon", 1e-5),
            "activation": _activation("activation_function", "gelu_new"),
            "gated_mlp": _constant(False),
            "rope": _constant(None),
            "tied_head": _optional("tie_word_embeddings", True),
            "qkv_bias": _constant(True),
            "out_bias": _constant(True),
            "mlp_bias": _constant(True),
        },
        requires={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        names={
            "embed.weight": ("wte.weight",),
            "positions.weight": ("wpe.weight",),
            **{
                f"blocks.{{i}}.{ours}.{kind}": (f"h.{{i}}.{theirs}.{kind}",)
                for kind in ("weight", "bias")
                for ours, theirs in {
                    "attention_norm": "ln_1",
                    "attention.qkv": "attn.c_attn",
                    "attention.out": "attn.c_proj",
                    "mlp_norm": "ln_2",
                    "mlp.up": "mlp.c_fc",
                    "mlp.down": "mlp.c_proj",
                }.items()
            },
            "norm.weight": ("ln_f.weight",),
            "norm.bias": ("ln_f.bias",),
            "head.weight": ("lm_head.weight",),
        },
        transposed=(
            "blocks.{i}.attention.qkv.weight",
            "blocks.{i}.attention.out.weight",
            "blocks.{i}.mlp.up.weight",
            "blocks.{i}.mlp.down.weight",
        ),
        # The first GPT-2 uploads name their tensors without the "transformer." that saving adds
        # today.
        prefixes=("", "transformer."),
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
}
