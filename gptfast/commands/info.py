"""`gptfast info`: what a checkpoint is, what it needs, and whether this version runs it. Reads no
weights.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from gptfast.chat import find_template
from gptfast.checkpoint import inspect
from gptfast.device import DTYPES, format_bytes, free_memory, parse_device, parse_dtype
from gptfast.engine import check_sizes
from gptfast.families import FAMILIES
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, Hugging Face id or bundled name"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-seq-len", type=int, metavar="TOKENS", help="context to plan for")
    parser.add_argument("--batch-size", type=int, default=1, metavar="ROWS")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = describe(args)
    if args.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        if key.endswith("_bytes") and value is not None:
            value = f"{format_bytes(value)} ({value:,})"
        print(f"{key:<22} {value}")
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Everything printed, as one dictionary; ValueError where the checkpoint cannot be run."""
    folder = find_model(args.model, args.revision)
    checkpoint = inspect(folder)
    config, dtype = checkpoint.config, parse_dtype(args.dtype) or checkpoint.dtype
    check_sizes(config, args.batch_size, args.max_seq_len)
    context = args.max_seq_len or config.max_seq_len
    weights = config.num_parameters * dtype.itemsize
    cache = args.batch_size * context * config.cache_bytes_per_token(dtype.itemsize)
    device = parse_device(args.device)
    free = free_memory(device)
    tokenizer = load_tokenizer(folder)
    return {
        "model": folder.name,
        "family": f"{config.model_type} ({FAMILIES[config.model_type].examples})",
        "parameters": config.num_parameters,
        "facts": {k: v for k, v in asdict(config).items() if k not in ("model_type", "rope")},
        "rope": asdict(config.rope) if config.rope else None,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens"
        if tokenizer
        else None,
        "chat_template": find_template(folder) is not None,
        "context": context,
        "weights_bytes": weights,
        "cache_bytes": cache,
        "needed_bytes": weights + cache,
        "free_bytes": free,
        "fits": free is None or weights + cache <= free,
        "supported": True,
    }
