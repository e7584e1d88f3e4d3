"""`gptfast bench`: the speed of prefill and decode, memory and bandwidth, of a checkpoint or of
random weights in a named shape; with --peer, of another engine at the same work in the same run.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gptfast
from gptfast.checkpoint import inspect
from gptfast.commands.contest import (
    Gptfast,
    Result,
    Traffic,
    Work,
    enter,
    hold_rounds,
    resident_memory,
)
from gptfast.commands.options import (
    add_model_options,
    add_run_options,
    chosen_group,
    chosen_quant,
    note,
    progress_bar,
    set_threads,
)
from gptfast.commands.peers import PEERS
from gptfast.config import ModelConfig
from gptfast.device import format_bytes, parse_device, parse_dtype
from gptfast.families import model_config
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.joint import load_model, random_shape
from gptfast.launch import num_ranks
from gptfast.loading import check_plan
from gptfast.model import Transformer
from gptfast.shapes import SHAPES, shape_config, shape_dtype, write_random_checkpoint
from gptfast.stats import read_bandwidth

DEFAULT_PREFILL_TOKENS, DEFAULT_NEW_TOKENS = 512, 128
# Column of the table: key of a result, factor, digits.
COLUMNS = {
    "decode tok/s": ("decode_tok_s", 1.0, 2),
    "prefill tok/s": ("prefill_tok_s", 1.0, 1),
    "first ms": ("ttft_s", 1e3, 1),
    "p50 ms": ("itl_p50_ms", 1.0, 2),
    "p99 ms": ("itl_p99_ms", 1.0, 2),
    "GB/s": ("bandwidth_gb_s", 1.0, 2),
    "of read %": ("bandwidth_fraction", 1e2, 1),
    "peak MB": ("peak_memory_bytes", 1e-6, 0),
    "load s": ("load_s", 1.0, 2),
    "compile s": ("compile_s", 1.0, 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A round reads one long prompt, then decodes from a short one. Figures are medians of the "
        "rounds, after an unmeasured one. Decode holds no prefill and no compilation."
    )
    add_model_options(parser)
    add_run_options(parser)
    group = parser.add_argument_group("work")
    group.add_argument(
        "--shape",
        metavar="NAME",
        help=f"random weights instead of a model, bf16 by default: {', '.join(SHAPES)}",
    )
    for name, default, text in (
        ("num-layers", None, "with --shape: only the first so many layers of it"),
        ("prompt-tokens", 8, "length of the short prompt; default: %(default)s"),
        ("prefill-tokens", None, f"length of the long prompt; default: {DEFAULT_PREFILL_TOKENS}"),
        ("new-tokens", None, f"tokens decoded; default: {DEFAULT_NEW_TOKENS}"),
        ("batch-size", 1, "short prompts decoded together; default: %(default)s"),
        ("rounds", 5, "default: %(default)s"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        choices=list(PEERS),
        help="another engine, interleaved: same weights, dtype, prompts, greedy; with --compile "
        "also compiled",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object, no table")


def run(args: argparse.Namespace) -> int:
    if args.shape and args.model != DEFAULT_MODEL:
        raise ValueError("--model and --shape cannot be given together")
    if args.peer and num_ranks() > 1:
        raise ValueError("--peer runs beside one process; start it without torchrun")
    if args.num_layers and not args.shape:
        raise ValueError("--num-layers shortens a --shape; a model has the layers that it has")
    set_threads(args)
    device = parse_device(args.device)
    with _subject(args, device) as subject:
        work = _work(args, subject.config)
        results = _measure(args, subject, work, device)
    figures = {result.contestant.name: result.as_dict() for result in results}
    for result in results[1:]:
        figures[result.contestant.name]["equal_tokens"] = _equal_tokens(result, results[0])
    header = _header(args, subject, work, device)
    if not args.json:
        print("\n".join(_table(header, figures)), flush=True)
    own = figures.pop(results[0].contestant.name)
    print(json.dumps({**header, **own, "peers": figures}))
    return 0


@dataclass(frozen=True)
class _Subject:
    """What is measured: its facts, how this engine gets it, and the folder it lies in, if any."""

    name: str
    config: ModelConfig
    dtype: torch.dtype
    load: Callable[[], Transformer]
    folder: Path | None


@contextmanager
def _subject(args: argparse.Namespace, device: torch.device) -> Iterator[_Subject]:
    """A checkpoint; or random weights, made in memory, or in a folder for as long as peers want to
    read the same ones.
    """
    asked, quant = parse_dtype(args.dtype), chosen_quant(args)
    group = chosen_group(args)
    if not args.shape:
        folder = find_model(args.model, args.revision)
        source = inspect(folder)
        check_plan(source, quant)
        dtype = asked or source.dtype
        make = partial(load_model, group, source, dtype, device, progress_bar, quant)
        yield _Subject(folder.name, source.config, dtype, make, folder)
        return
    raw, dtype = shape_config(args.shape, args.num_layers), shape_dtype(asked)
    config = model_config(raw)
    name = args.shape if args.num_layers is None else f"{args.shape}, {args.num_layers} layers"
    if not args.peer:
        make = partial(random_shape, group, args.shape, args.num_layers, dtype, device, quant)
        yield _Subject(name, config, dtype, make, None)
        return
    with tempfile.TemporaryDirectory(prefix="gptfast-bench-") as temporary:
        note(f"Writing random weights to {temporary}, for all engines to read")
        folder = Path(temporary)
        write_random_checkpoint(raw, folder, dtype)
        make = partial(load_model, group, inspect(folder), dtype, device, progress_bar, quant)
        yield _Subject(name, config, dtype, make, folder)


def _work(args: argparse.Namespace, config: ModelConfig) -> Work:
    """The tokens of a round; lengths that were not asked for shrink to a small model's context."""
    asked = (args.prompt_tokens, args.prefill_tokens, args.new_tokens, args.batch_size, args.rounds)
    if min(number for number in asked if number is not None) < 1:
        raise ValueError("numbers of tokens, rows and rounds must be at least 1")
    context = args.max_seq_len or config.max_seq_len
    prefill = args.prefill_tokens or min(DEFAULT_PREFILL_TOKENS, context - 1)
    new = args.new_tokens or max(2, min(DEFAULT_NEW_TOKENS, context - args.prompt_tokens))
    if new < 2:
        raise ValueError("--new-tokens is 1; a decoding speed needs at least 2")
    needed = max(prefill + 1, args.prompt_tokens + new)
    if needed > context:
        raise ValueError(
            f"the work takes {needed} tokens of context and there are {context}; "
            "lower --prefill-tokens, --prompt-tokens or --new-tokens"
        )
    return Work.random(config.vocab_size, prefill, args.batch_size, args.prompt_tokens, new)


def _measure(
    args: argparse.Namespace, subject: _Subject, work: Work, device: torch.device
) -> list[Result]:
    """This engine, then its peers, through all rounds."""
    idle_bytes = resident_memory(device)
    max_seq_len = args.max_seq_len or work.max_seq_len
    note(f"Model: {subject.name}, {subject.config.num_parameters:,} parameters")
    size, how = (args.batch_size, max_seq_len), (args.compile, args.kv_cache_dtype)
    own = partial(Gptfast, subject.load, *size, *how)
    results = [enter(own, work, device, idle_bytes)]
    note("Prepared gptfast")
    for build in (build for peer in args.peer for build in PEERS[peer](args.compile)):
        peer = partial(build, subject.folder, subject.dtype, device)
        results.append(enter(peer, work, device, idle_bytes))
        note(f"Prepared {results[-1].contestant.name}")
    first = results[0].contestant
    assert isinstance(first, Gptfast)
    probe = partial(read_bandwidth, device)
    hold_rounds(results, work, Traffic.of(first.engine), args.rounds, probe)
    return results


def _equal_tokens(result: Result, own: Result) -> float:
    """Share of the decoded tokens before the first one that differs from ours, over all rows."""
    same = 0
    for theirs, ours in zip(result.token_ids, own.token_ids, strict=True):
        pairs = enumerate(zip(theirs, ours, strict=True))
        same += next((at for at, (a, b) in pairs if a != b), len(ours))
    return same / sum(map(len, own.token_ids))


def _header(
    args: argparse.Namespace, subject: _Subject, work: Work, device: torch.device
) -> dict[str, Any]:
    """What the figures need to be understood and measured again."""
    return {
        "benchmark": "decode",
        "model": subject.name,
        "weights": "random" if args.shape else "checkpoint",
        "parameters": subject.config.num_parameters,
        "active_parameters": subject.config.num_active_parameters,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "kv_cache_dtype": args.kv_cache_dtype,
        "quant": args.quant,
        "compile": args.compile,
        "batch_size": args.batch_size,
        "prompt_tokens": args.prompt_tokens,
        "prefill_tokens": len(work.long_prompt),
        "new_tokens": work.num_new_tokens,
        "rounds": args.rounds,
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": num_ranks(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def _table(header: dict[str, Any], figures: dict[str, dict[str, Any]]) -> list[str]:
    widths = {title: max(8, len(title)) for title in COLUMNS}
    ranks = f"{header['ranks']} ranks of " if header["ranks"] > 1 else ""
    first = max(map(len, figures))
    cache = header["kv_cache_dtype"]
    rows = [
        f"{header['model']} ({header['weights']} weights, {header['parameters']:,} parameters), "
        f"{header['dtype']}, {'compiled' if header['compile'] else 'eager'}"
        f"{'' if cache == 'auto' else f', keys and values {cache}'}",
        f"{header['device_name']}, {ranks}{header['threads']} threads, torch {header['torch']}, "
        f"commit {header['commit']}",
        f"{header['batch_size']} x {header['new_tokens']} tokens after {header['prompt_tokens']}, "
        f"prefill of {header['prefill_tokens']}; medians of {header['rounds']} rounds",
        " ".join([" " * first, *(title.rjust(widths[title]) for title in COLUMNS)]),
    ]
    for name, figure in figures.items():
        cells = (
            f"{figure[key] * factor:{widths[title]}.{digits}f}"
            for title, (key, factor, digits) in COLUMNS.items()
        )
        rows.append(" ".join([name.ljust(first), *cells]))
    own = figures["gptfast"]
    rows.append(
        f"{format_bytes(own['bytes_per_token'])} read per token"
        f"{' by each rank' if ranks else ''}; "
        f"{'one rank alone' if ranks else 'the device'} reads "
        f"{own['read_bandwidth_gb_s']:.1f} GB/s"
    )
    return rows


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} CPUs"


def commit() -> str | None:
    """The commit of the clone that this runs from, "-dirty" where files differ from it; None for
    an installed package.
    """
    root = Path(gptfast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
