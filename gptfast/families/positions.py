"""Readers of config.json for all that has to do with places in a text: windows, rotation, ALiBi,
latent attention. (The others: readers.py.)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from gptfast.config import LatentConfig, RopeConfig
from gptfast.families.readers import (
    Fact,
    Raw,
    head_dim,
    size,
)

# -- layers --


def windows(
    is_local: Callable[[Raw, int], bool] | None = None,
    default: int | None = None,
    enabled: Fact = lambda raw: True,
) -> Fact:
    """Each layer's attention window: `sliding_window` where `layer_types`, or else `is_local`, says
    so; without `is_local` everywhere, whatever `layer_types` says.
    """

    def read(raw: Raw) -> tuple[int | None, ...]:
        if raw.get("sliding_window", default) is None or not enabled(raw):
            return ()
        width, layers = size("sliding_window", default=default)(raw), range(_num_layers(raw))
        if is_local is None:
            local = [True] * len(layers)
        elif raw.get("layer_types") is None:
            local = [is_local(raw, layer) for layer in layers]
        else:
            local = [kind == "sliding_attention" for kind in _layer_types(raw)]
        return tuple(width if here else None for here in local) if any(local) else ()

    return read


def everywhere(raw: Raw, layer: int) -> bool:
    return True


def _num_layers(raw: Raw) -> int:
    return size("num_hidden_layers")(raw)


def _layer_types(raw: Raw) -> list[str]:
    num_layers, known = _num_layers(raw), ("sliding_attention", "full_attention")
    types = raw["layer_types"] if isinstance(raw["layer_types"], list) else [raw["layer_types"]]
    unknown = sorted({repr(kind) for kind in types if kind not in known})
    if unknown or len(types) < num_layers:
        raise ValueError(
            f"config.json: layer_types has {len(types)} entries"
            + "".join(f", {kind} among them" for kind in unknown)
            + f"; 'sliding_attention' or 'full_attention' for each of {num_layers} layers is needed"
        )
    return types[:num_layers]


# -- rotary positions --


def rope_parameters(raw: Raw, layer_type: str = "full_attention") -> dict[str, Any]:
    """`rope_theta` + `rope_scaling` (until transformers 4) and `rope_parameters` (since 5, perhaps
    one for each type of layer), as one dict.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(scaling, Mapping) and isinstance(scaling.get(layer_type), Mapping):
        scaling = scaling[layer_type]
    if not isinstance(scaling, Mapping):
        raise ValueError(
            f"config.json: rope scaling {scaling!r} is not an object with a 'rope_type'"
        )
    merged = {"rope_theta": raw.get("rope_theta"), **scaling}
    if raw.get("original_max_position_embeddings") is not None:  # transformers prefers this one
        merged["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    # Before transformers 4.45 the rule's name stood under "type".
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    if merged["rope_type"] == "mrope":  # of text alone, its three positions are one
        merged["rope_type"] = "default"
    return merged


def rope(
    *,
    theta: float = 10000.0,
    partial: float | None = 1.0,
    head_size: Fact = head_dim,
    interleaved: bool | Fact = False,
    layer_type: str = "full_attention",
) -> Fact:
    """RopeConfig by the definitions of transformers' modeling_rope_utils.

    `partial` is the share of a head that is rotated where config.json does not say (None: it may
    not say so).
    """

    def read(raw: Raw) -> RopeConfig:
        parameters = rope_parameters(raw, layer_type)
        neighbours = interleaved(raw) if callable(interleaved) else interleaved
        settings: dict[str, Any] = {
            "theta": _rope_number(parameters, "rope_theta", theta),
            "dim": _rotated(raw, parameters, partial, head_size(raw)),
            "interleaved": neighbours,
        }
        kind = parameters["rope_type"]
        if kind == "default":
            return RopeConfig(**settings)
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise ValueError(
                f"config.json: rope scaling {kind!r} is not supported "
                f"(supported: {', '.join(SCALINGS)})"
            )
        return RopeConfig(**settings | {"scaling": kind}, **SCALINGS[kind](raw, parameters))

    return read


def _rotated(raw: Raw, parameters: Raw, partial: float | None, head_size: int) -> int | None:
    """Rotated numbers of a head, None for all of them."""
    share = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial is None and share not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor = {share!r} is not supported here")
    share = (partial or 1.0) if share is None else share
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"config.json: partial_rotary_factor = {share!r}; 0 to 1 is needed")
    rotated = int(head_size * share)
    return None if rotated == head_size else rotated


def _linear(raw: Raw, parameters: Raw) -> dict[str, Any]:
    return {"factor": _rope_number(parameters, "factor")}


def _dynamic(raw: Raw, parameters: Raw) -> dict[str, Any]:
    trained = size("max_position_embeddings")(raw)
    return {"factor": _rope_number(parameters, "factor"), "original_max_seq_len": trained}


def _llama3(raw: Raw, parameters: Raw) -> dict[str, Any]:
    return {
        "factor": _rope_number(parameters, "factor"),
        "original_max_seq_len": original_context(raw, parameters),
        "low_freq_factor": _rope_number(parameters, "low_freq_factor"),
        "high_freq_factor": _rope_number(parameters, "high_freq_factor"),
    }


def _yarn(raw: Raw, parameters: Raw) -> dict[str, Any]:
    original = original_context(raw, parameters)
    trained = size("max_position_embeddings")(raw)
    factor = _rope_number(parameters, "factor", trained / original)
    return {
        "factor": factor,
        "original_max_seq_len": original,
        "beta_fast": _rope_number(parameters, "beta_fast", 32.0) or 32.0,
        "beta_slow": _rope_number(parameters, "beta_slow", 1.0) or 1.0,
        "truncate": bool(parameters.get("truncate", True)),
        "attention_factor": _yarn_attention_factor(parameters, factor),
    }


def _longrope(raw: Raw, parameters: Raw) -> dict[str, Any]:
    original = original_context(raw, parameters)
    trained = size("max_position_embeddings")(raw)
    factor = _rope_number(parameters, "factor", trained / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "original_max_seq_len": original,
        "attention_factor": _rope_number(parameters, "attention_factor", default),
        "short_factors": _numbers(parameters, "short_factor"),
        "long_factors": _numbers(parameters, "long_factor"),
    }


SCALINGS: dict[str, Callable[[Raw, Raw], dict[str, Any]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def yarn_magnitude(scale: float, weight: float = 1.0) -> float:
    """How much longer than trained contexts flatten attention, undone by this factor (2309.00071,
    3.4).
    """
    return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0


def _yarn_attention_factor(parameters: Raw, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _rope_number(parameters, "attention_factor")
    weight = _rope_number(parameters, "mscale", 0.0)
    weight_everywhere = _rope_number(parameters, "mscale_all_dim", 0.0)
    if weight and weight_everywhere:
        return yarn_magnitude(factor, weight) / yarn_magnitude(factor, weight_everywhere)
    return yarn_magnitude(factor)


def _rope_number(parameters: Raw, key: str, default: float | None = None) -> float:
    value = default if parameters.get(key) is None else parameters[key]
    # The comparison is also false for NaN; beyond it float32 has no numbers.
    if not isinstance(value, int | float) or not abs(value) < 3e38:
        raise ValueError(
            f"config.json: {key} = {value!r} for rope type {parameters['rope_type']!r}; "
            "a number is needed"
        )
    return float(value)


def _numbers(parameters: Raw, key: str) -> tuple[float, ...]:
    values = parameters.get(key)
    if not isinstance(values, list) or not all(
        isinstance(v, int | float) and v and abs(v) < 3e38 for v in values
    ):
        raise ValueError(
            f"config.json: {key} for rope type {parameters['rope_type']!r} must be a list of "
            "numbers other than zero"
        )
    return tuple(map(float, values))


def original_context(raw: Raw, parameters: Raw) -> int:
    """Tokens of context that the frequencies were trained for, before scaling."""
    if parameters.get("original_max_position_embeddings") is None:
        return size("max_position_embeddings")(raw)
    return size("original_max_position_embeddings")(parameters)


def context(raw: Raw) -> int:
    """Tokens of context: what config.json says, stretched by the rules that leave the stretching to
    the reader.
    """
    parameters, trained = rope_parameters(raw), size("max_position_embeddings")(raw)
    if parameters["rope_type"] in ("linear", "dynamic"):
        return int(trained * _rope_number(parameters, "factor"))
    if parameters["rope_type"] == "yarn":
        original = original_context(raw, parameters)
        return max(trained, int(original * _rope_number(parameters, "factor", 0.0)))
    return trained


# -- alibi (2108.12409) --


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The paper's slopes; between powers of two, every other one of the next power fills up."""
    closest = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * head / closest) for head in range(1, closest + 1)]
    more = [2.0 ** (-4.0 * head / closest) for head in range(1, 2 * closest, 2)]
    return tuple(slopes + more[: num_heads - closest])


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """MPT's: those of the next power of two, every second one first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    if power != num_heads:
        slopes = slopes[1::2] + slopes[::2]
    return tuple(slopes[:num_heads])


# -- latent attention --


def latent(q_rank: int | None) -> Fact:
    """`q_rank` is the rank of queries where config.json is silent; null means none."""
    return lambda raw: LatentConfig(
        kv_rank=size("kv_lora_rank")(raw),
        nope_dim=size("qk_nope_head_dim")(raw),
        rope_dim=size("qk_rope_head_dim")(raw),
        value_dim=size("v_head_dim")(raw),
        q_rank=raw.get("q_lora_rank", q_rank),
    )


def latent_head_dim(raw: Raw) -> int:
    return size("qk_nope_head_dim")(raw) + size("qk_rope_head_dim")(raw)


def latent_scale(raw: Raw) -> float:
    """1/sqrt(head size), sharpened where yarn stretches the context."""
    parameters, scale = rope_parameters(raw), latent_head_dim(raw) ** -0.5
    weight = _rope_number(parameters, "mscale_all_dim", 0.0)
    if parameters["rope_type"] == "default" or not weight:
        return scale
    return scale * yarn_magnitude(_rope_number(parameters, "factor"), weight) ** 2
