"""`gptfast info`: what a checkpoint is, what it needs, and whether this version runs it. Reads no
weights. `gptfast info --families`: which models run at all.
"""

import argparse
import json
from collections import Counter
from dataclasses import MISSING, asdict, fields
from typing import Any

from gptfast.cache import KV_CACHE_DTYPES, cache_bytes_per_token, parse_kv_cache_dtype
from gptfast.capacity import check_sizes
from gptfast.chat import find_template
from gptfast.checkpoint import inspect, suggested_sampling
from gptfast.commands.options import add_quant_options, chosen_quant
from gptfast.config import ModelConfig, RopeConfig
from gptfast.device import DTYPES, format_bytes, free_memory, parse_device, parse_dtype
from gptfast.families import FAMILIES
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.loading import weight_bytes
from gptfast.quantization import PLAIN, QuantPlan
from gptfast.sharding import possible_sizes
from gptfast.tokenizer import load_tokenizer

# Lines that are only printed where there is something to say.
OCCASIONAL = (
    "active_parameters experts window_layers latent_cache rope local_rope quantized kv_cache_dtype "
    "suggested_sampling left_out tensor_parallel_sizes"
).split()
MOST_RANKS = 16  # that are looked at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, Hugging Face id or bundled name"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    add_quant_options(parser)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=list(KV_CACHE_DTYPES))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-seq-len", type=int, metavar="TOKENS", help="context to plan for")
    parser.add_argument("--batch-size", type=int, default=1, metavar="ROWS")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--families",
        action="store_true",
        help="print the table of supported families instead, in Markdown",
    )


def run(args: argparse.Namespace) -> int:
    if args.families:
        print(families_table())
        return 0
    facts = describe(args)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if value is not None or key not in OCCASIONAL:
            print(f"{key:<22} {_in_words(key, value)}")
    return 0


def families_table() -> str:
    """FAMILIES as a Markdown table; a test holds the one in README.md against it."""
    lines = ["| `model_type` | models | special | proved by |", "|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        proof = f"`pytest tests/test_parity.py -k {proof_selector(model_type)}`"
        lines.append(f"| `{model_type}` | {family.examples} | {family.special} | {proof} |")
    return "\n".join(lines)


def proof_selector(model_type: str) -> str:
    """What selects the tests of one family: their ids begin with its name and a hyphen."""
    return f"{model_type}-"


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Everything printed, as one dictionary; ValueError where the checkpoint cannot be run."""
    folder = find_model(args.model, args.revision)
    checkpoint = inspect(folder)
    config, dtype = checkpoint.config, parse_dtype(args.dtype) or checkpoint.dtype
    check_sizes(config, args.batch_size, args.max_seq_len)
    context = args.max_seq_len or config.max_seq_len
    device = parse_device(args.device)
    quant = chosen_quant(args)
    weights = weight_bytes(checkpoint, dtype, device, quant)
    parse_kv_cache_dtype(args.kv_cache_dtype, device)
    per_token = cache_bytes_per_token(config, dtype, args.kv_cache_dtype)
    cache = args.batch_size * context * per_token
    free = free_memory(device)
    tokenizer = load_tokenizer(folder)
    apart = ("model_type", "rope", "local_rope")
    kept = checkpoint.formats if quant != PLAIN else {}
    return {
        "model": folder.name,
        "family": f"{config.model_type} ({FAMILIES[config.model_type].examples})",
        "parameters": config.num_parameters,
        "active_parameters": config.num_active_parameters if config.experts else None,
        "experts": _experts(config),
        "window_layers": _window_layers(config),
        "latent_cache": _latent_cache(config),
        "facts": {key: value for key, value in asdict(config).items() if key not in apart},
        "rope": asdict(config.rope) if config.rope else None,
        "local_rope": asdict(config.local_rope) if config.local_rope else None,
        "dtype": str(dtype).removeprefix("torch."),
        "quantized": checkpoint.quantized_as
        or (quant.name if isinstance(quant, QuantPlan) else None),
        "kv_cache_dtype": None if args.kv_cache_dtype == "auto" else args.kv_cache_dtype,
        "tokenizer": f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens"
        if tokenizer
        else None,
        "chat_template": find_template(folder) is not None,
        "suggested_sampling": suggested_sampling(folder) or None,
        "left_out": checkpoint.left_out or None,
        "context": context,
        "weights_bytes": weights,
        "cache_bytes": cache,
        "needed_bytes": weights + cache,
        "free_bytes": free,
        "tensor_parallel_sizes": possible_sizes(config, MOST_RANKS, formats=kept) or None,
        "fits": free is None or weights + cache <= free,
        "supported": True,
    }


def _experts(config: ModelConfig) -> str | None:
    if (experts := config.experts) is None:
        return None
    num_sparse = sum(map(config.has_experts, range(config.num_layers)))
    shared = (
        f" and a shared one of {experts.shared_hidden_dim}" if experts.shared_hidden_dim else ""
    )
    return (
        f"{experts.num_active} of {experts.num_experts} active for a token, each of "
        f"{experts.hidden_dim} units{shared}, in {num_sparse} of {config.num_layers} layers"
    )


def _window_layers(config: ModelConfig) -> str | None:
    counts = Counter(window for window in config.windows if window is not None)
    words = [f"{num} see the latest {width} tokens" for width, num in counts.items()]
    return f"of {config.num_layers} layers {', '.join(words)}" if words else None


def _latent_cache(config: ModelConfig) -> str | None:
    if config.latent is None:
        return None
    per_head = config.latent.nope_dim + config.latent.rope_dim + config.latent.value_dim
    return (
        f"{sum(config.cache_shape[1:])} numbers a token and layer; keys and values of "
        f"{config.num_heads} heads would be {config.num_heads * per_head}"
    )


def _in_words(key: str, value: Any) -> str:
    if key == "facts":
        return _telling(ModelConfig, value)
    if key == "tensor_parallel_sizes":
        return ", ".join(map(str, value)) + " processes can share it"
    if key in ("rope", "local_rope"):
        return _telling(RopeConfig, value)
    if key == "suggested_sampling":
        return ", ".join(f"{name} {item}" for name, item in value.items()) + " (never applied)"
    if key.endswith("parameters"):
        return f"{value:,}"
    if key.endswith("_bytes") and value is not None:
        return f"{format_bytes(value)} ({value:,})"
    return str(value)


def _telling(kind: type[ModelConfig] | type[RopeConfig], values: dict[str, Any]) -> str:
    """Facts that every model has, and those of the others that are not the neutral ones. What has
    a line of its own, or a number for each layer or head, is left to --json.
    """
    words = []
    for field in fields(kind):
        value = values.get(field.name, field.default)
        is_always_told = field.default is MISSING or field.name in ("theta", "eos_token_ids")
        is_telling = value != field.default and not isinstance(value, dict | tuple)
        if field.name in values and (is_always_told or is_telling):
            words.append(f"{field.name} {value}")
    return ", ".join(words)
