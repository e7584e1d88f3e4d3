"""gptfast beside other engines on the same random weights, in one run: transformers (eager; static
cache and compiled), llama.cpp and OpenVINO GenAI, each where it is installed.

For each precision, ours and theirs take turns: a prompt of 512 tokens to its first new one, 128
decoded after a short prompt, then some behind contexts of 2,048 and 8,192. Every contestant has a
process of its own, whose start and memory are measured too. Prints a table and then one JSON line,
which it also writes, with a plot beside it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peer_files import MIN_POSITIONS, Files, missing, step_bytes
from peer_race import Entry, Racer, Work, race
from peer_report import equal_tokens, over_best_peer, plot, table

from gptfast.commands.bench import commit, device_name
from gptfast.stats import read_bandwidth
from quantize.formats import Format

CPU = torch.device("cpu")
PROBE_SECONDS = 0.1
RESULTS = Path(__file__).with_name("results")
PRECISIONS = ["bf16", "int8", "int8-dynamic", "int4", "int4-dynamic"]
WORK_DIR = Path.home() / ".cache" / "gptfast" / "peers"
COMPILED = "compiled"
# What each peer runs beside our formats of so many bits.
PEERS: dict[str, dict[str, list[str]]] = {
    "transformers": {"bf16": ["eager", COMPILED]},
    "llama.cpp": {"bf16": ["bf16"], "int8": ["Q8_0"], "int4": ["Q4_0", "Q4_K_M"]},
    "openvino": {"bf16": ["bf16"], "int8": ["int8"], "int4": ["int4"]},
}
# What to import for each, and as what to install it.
PACKAGES = {
    "transformers": {"transformers": "transformers"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "openvino": {
        "openvino_genai": "openvino-genai",
        "optimum.intel": "optimum-intel",
        "nncf": "nncf",
    },
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    precisions = _groups(args.precisions)
    if args.threads:
        torch.set_num_threads(args.threads)
    files = Files(args.work_dir, args.shape, torch.get_num_threads(), _note)
    work = Work(
        vocab_size=files.raw["vocab_size"],
        prompt_tokens=args.prompt_tokens,
        prefill_tokens=args.prefill_tokens,
        new_tokens=args.new_tokens,
        contexts=args.contexts,
        context_tokens=args.context_tokens,
    )
    peers = [peer for peer in args.peers if _is_installed(peer)]
    fields = {
        group: [
            *_ours(files, ours, not args.eager),
            *_theirs(files, group, peers, not args.eager),
        ]
        for group, ours in precisions.items()
    }
    groups = {group: _compare(args, work, entries) for group, entries in fields.items()}
    result = {
        "benchmark": "peers",
        "model": args.shape,
        "weights": "random",
        "compile": not args.eager,
        "rounds": args.rounds,
        "prompt_tokens": work.prompt_tokens,
        "prefill_tokens": work.prefill_tokens,
        "new_tokens": work.new_tokens,
        "contexts": work.contexts,
        "context_tokens": work.context_tokens,
        "device_name": device_name(CPU),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "over_best_peer": {group: over_best_peer(each) for group, each in groups.items()},
        "groups": groups,
    }
    print("\n".join(table(result)), flush=True)
    out = args.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-cpu-{args.shape}-peers.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    if not args.no_plot:
        plot(result, out.with_suffix(".png"))
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", default="tinyllama-1.1b", help="default: %(default)s")
    parser.add_argument("--peers", type=_names, default=list(PEERS), metavar="A,B", help="who else")
    parser.add_argument(
        "--precisions",
        type=_names,
        default=PRECISIONS,
        metavar="A,B",
        help=f"ours, as --quant of `gptfast generate` has them; default: {','.join(PRECISIONS)}",
    )
    parser.add_argument(
        "--contexts",
        type=lambda text: [int(length) for length in _names(text)],
        default=[2048, 8192],
        metavar="A,B",
        help="tokens to decode behind; default: 2048,8192",
    )
    for name, default, text in (
        ("rounds", 3, "default: %(default)s"),
        ("starts", 2, "processes started of each; the last counts; default: %(default)s"),
        ("tries", 3, "of a turn that other work disturbs; default: %(default)s"),
        ("threads", None, "of every engine; default: as torch has them"),
        ("prompt-tokens", 8, "length of the short prompt; default: %(default)s"),
        ("prefill-tokens", 512, "length of the long prompt; default: %(default)s"),
        ("new-tokens", 128, "tokens decoded after the short prompt; default: %(default)s"),
        ("context-tokens", 16, "tokens decoded behind each context; default: %(default)s"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--eager", action="store_true", help="nothing compiled, ours and theirs")
    parser.add_argument("--no-plot", action="store_true", help="write no PNG")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: in bench/results")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        metavar="DIR",
        help="where everyone's checkpoints stay for the next run; default: %(default)s",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check(args: argparse.Namespace) -> None:
    """ValueError for what cannot be measured, before anything is written or started."""
    for peer in args.peers:
        if peer not in PEERS:
            raise ValueError(f"peer {peer!r} is unknown; use some of: {', '.join(PEERS)}")
    if not args.precisions:
        raise ValueError("--precisions names none; use some of: " + ", ".join(PRECISIONS))
    for name in ("rounds", "starts", "tries", "prompt_tokens", "prefill_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 1 is the least")
    for name in ("new_tokens", "context_tokens"):
        if getattr(args, name) < 2:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; a speed needs at least 2"
            )
    longest = max([0, *args.contexts]) + args.context_tokens
    if min([1, *args.contexts]) < 1 or longest > MIN_POSITIONS - 2:
        raise ValueError(
            f"--contexts are {args.contexts}; with --context-tokens they must stay within 1 to "
            f"{MIN_POSITIONS - 2}"
        )
    if not args.no_plot and missing("matplotlib"):
        raise ValueError("the plot needs matplotlib: pip install 'gptfast[bench]', or --no-plot")


def _is_installed(peer: str) -> bool:
    """Whether a peer can run here; a line says what to install where it cannot."""
    absent = missing(*PACKAGES[peer])
    if absent:
        names = " ".join(PACKAGES[peer][name] for name in absent)
        _note(f"Without {peer}: pip install {names}")
    return not absent


def _groups(precisions: list[str]) -> dict[str, list[str]]:
    """Our precisions by what they are compared with: bf16, int8, int4."""
    groups: dict[str, list[str]] = {}
    for precision in precisions:
        group = "bf16" if precision == "bf16" else f"int{Format.parse(precision).bits}"
        groups.setdefault(group, []).append(precision)
    return groups


def _ours(files: Files, precisions: list[str], compile: bool) -> Iterator[Entry]:
    for precision in precisions:
        yield Entry("gptfast", precision, files.gptfast(precision), compile)


def _theirs(files: Files, group: str, peers: list[str], compile: bool) -> Iterator[Entry]:
    """Peers of a precision; a line says why one is left out whose files cannot be made."""
    paths = {
        "transformers": lambda form: files.hf(),
        "llama.cpp": files.gguf,
        "openvino": files.openvino,
    }
    for peer in peers:
        for form in PEERS[peer].get(group, []):
            compiled = form == COMPILED
            if compiled and not compile:
                continue
            try:
                path = paths[peer](form)
                yield Entry(peer, form, path, compiled, step_bytes(path, files.raw))
            except Exception as error:  # whatever a foreign package raises
                _note(f"Without {peer} {form}: {type(error).__name__}: {error}".splitlines()[0])


def _compare(
    args: argparse.Namespace, work: Work, entries: list[Entry]
) -> dict[str, dict[str, Any]]:
    """Figures of all entries by name, ours first. RuntimeError where one of ours fails."""
    racers: list[Racer] = []
    try:
        for entry in entries:
            _note(f"Starting {entry.name}")
            log = args.work_dir / args.shape / f"{entry.name.replace(' ', '-')}.log"
            try:
                threads = torch.get_num_threads()
                racers.append(Racer.start(entry, work, threads, args.starts, log))
            except RuntimeError as error:
                _leave_out(entry, str(error))
        _note(f"{args.rounds} rounds of {len(racers)}")
        race(racers, work, args.rounds, partial(read_bandwidth, CPU, PROBE_SECONDS), args.tries)
    finally:
        for racer in racers:
            racer.end()
    for racer in racers:
        if racer.failure is not None:
            _leave_out(racer.entry, racer.failure)
    figures = {racer.entry.name: racer.as_dict() for racer in racers if racer.failure is None}
    own = racers[0].token_ids
    for racer in racers:
        if racer.failure is None:
            figures[racer.entry.name]["equal_tokens"] = equal_tokens(racer.token_ids, own)
    return figures


def _leave_out(entry: Entry, why: str) -> None:
    """One line; RuntimeError where there would be nothing left to compare with."""
    if entry.engine == "gptfast":
        raise RuntimeError(f"{entry.name} failed: {why}")
    _note(f"Without {entry.name}: {why}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"peers.py: error: {error}", file=sys.stderr)
        sys.exit(2)
