"""FAMILIES: model_type -> how a Hugging Face config.json becomes facts, and where our weights find
theirs.

A family is one dict literal and one entry in tests/family_cases.py (docs/adding-a-family.md).
Nothing is guessed: an unknown model_type, or a key whose value would change the mathematics and is
not supported, is a ValueError that names it.
"""

from collections.abc import Mapping
from typing import Any

from gptfast.config import ModelConfig
from gptfast.families.expert_line import EXPERT_LINE
from gptfast.families.family import Family
from gptfast.families.gpt_line import GPT_LINE
from gptfast.families.llama_line import LLAMA_LINE
from gptfast.families.readers import Raw

__all__ = ["FAMILIES", "Family", "Raw", "find_family", "language_part", "model_config"]

FAMILIES: dict[str, Family] = LLAMA_LINE | EXPERT_LINE | GPT_LINE

# Asked for often, and not decoder-only transformers.
OTHER_KINDS: dict[str, str] = {
    **dict.fromkeys(
        "t5 mt5 umt5 longt5 ul2 t5gemma switch_transformers bart mbart pegasus blenderbot marian "
        "m2m_100 encoder_decoder".split(),
        "has an encoder and a decoder",
    ),
    **dict.fromkeys(
        "rwkv rwkv5 rwkv6 rwkv7 mamba mamba2 falcon_mamba xlstm".split(),
        "is a recurrent network without attention",
    ),
    **dict.fromkeys(
        "bert roberta distilbert albert electra deberta modernbert xlm-roberta".split(),
        "is an encoder that generates no text",
    ),
}


def model_config(raw: Raw, generation: Raw | None = None) -> ModelConfig:
    """The facts in a parsed config.json; stop tokens of generation_config.json win where it names
    any.
    """
    raw = language_part(raw)
    family = find_family(raw)
    for key, values in family.requires.items():
        if key in raw and raw[key] not in values:
            supported = ", ".join(repr(value) for value in values)
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} changes what a {raw['model_type']!r} model "
                f"computes and is not supported (supported: {supported})"
            )
    eos = (generation or {}).get("eos_token_id")
    eos = raw.get("eos_token_id") if eos in (None, []) else eos
    try:
        return ModelConfig(
            model_type=raw["model_type"],
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            **{name: fact(raw) for name, fact in family.facts.items()},
        )
    except KeyError as error:
        raise ValueError(
            f"config.json: {error.args[0]!r} is missing; {raw['model_type']!r} models need it"
        ) from None
    except ValueError as error:  # of facts that do not fit together
        words = str(error)
        raise ValueError(
            words if words.startswith("config.json") else f"config.json: {words}"
        ) from None


def language_part(raw: Raw) -> Raw:
    """The config of the language model: `text_config` of a multimodal one, with what stands beside
    it where it says nothing itself. Whether the head is tied is said outside (as in transformers).
    """
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping) or raw.get("model_type") in FAMILIES:
        return raw
    shared = "bos_token_id eos_token_id torch_dtype dtype quantization_config".split()
    outer: dict[str, Any] = {key: raw[key] for key in shared if raw.get(key) is not None}
    tied = raw.get("tie_word_embeddings")
    return {**outer, **inner, **({} if tied is None else {"tie_word_embeddings": tied})}


def find_family(raw: Raw) -> Family:
    model_type = language_part(raw).get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if isinstance(model_type, str) and model_type in OTHER_KINDS:
        raise ValueError(
            f"config.json: a {model_type!r} model {OTHER_KINDS[model_type]}; only decoder-only "
            f"transformers run here ({known})"
        )
    raise ValueError(
        f"config.json: model_type {model_type!r} is not supported (supported: {known})"
    )
