"""Tensor parallel: the speed of one process beside teams of ranks that share the same model, each
started by torchrun, in turns.

    python bench/parallel.py --shape tinyllama-1.1b --ranks 1,2
    python bench/parallel.py --model storyteller --ranks 1,2,4

On a CPU each number of ranks runs with one thread a rank and with all cores between them, and
several ranks also through gloo instead of shared memory. A team's speed is set beside that of one
process with as many threads in all (its gain: what sharing itself costs or brings) and with as many
as a rank has (its efficiency).

Beside what was measured stands what the model of scaling (scaling.py) says, from the bytes of each
rank, the speed of one process with as many threads, and the step's collectives measured alone.
Random weights of a shape are written once, for all teams to read. Prints a table, then one JSON
line, which it also writes.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from parallel_costs import exchanges_of
from parallel_race import Figures, Line, figures, race, race_exchanges, teams
from scaling import Exchange, Link, Machine, Share, efficiency, step_seconds

from gptfast.cache import cache_bytes_per_token
from gptfast.checkpoint import Checkpoint, inspect
from gptfast.commands.bench import commit, device_name
from gptfast.commands.contest import Work
from gptfast.device import parse_device, parse_dtype
from gptfast.hub import find_model
from gptfast.parallel import Group
from gptfast.shapes import SHAPES, shape_config, shape_dtype, write_random_checkpoint
from gptfast.sharding import local_config
from gptfast.stats import read_bandwidth

RESULTS = Path(__file__).with_name("results")
WORK_DIR = Path.home() / ".cache" / "gptfast" / "parallel"
PROBE_SECONDS = 0.1
NO_LINK = Link(0.0, 1.0)  # what is exchanged is measured here


@dataclass(frozen=True)
class Subject:
    """A model: what a rank's cache has for each token, by number of ranks, and its layers. Decoding
    is behind `context` tokens.
    """

    cache_bytes_per_token: dict[int, int]
    num_layers: int
    context: int

    def share(self, found: Figures) -> Share:
        """What a rank of a team reads for a token: that which has most."""
        cache_bytes = self.cache_bytes_per_token[len(found["weight_bytes"])]
        return Share(max(found["weight_bytes"]), cache_bytes_per_token=cache_bytes)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        device = parse_device(args.device)
        source = inspect(_folder(args))
        dtype = parse_dtype(args.dtype) or source.dtype
        if min(*args.ranks, args.cores) < 1:
            raise ValueError("--ranks and --cores are at least 1")
        lines, subject = _lines(args.ranks, args.cores, device), _subject(args, source, dtype)
        if min(args.rounds, args.prefill_tokens, args.prompt_tokens, args.new_tokens - 1) < 1:
            raise ValueError("rounds and tokens are at least 1, new tokens 2")
    except ValueError as error:
        parser.error(str(error))
    work = Work.random(
        source.config.vocab_size, args.prefill_tokens, 1, args.prompt_tokens, args.new_tokens
    )
    task = {
        "folder": str(source.folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "quant": args.quant,
        "compile": args.compile,
        "by_expert": args.expert_parallel,
        "max_seq_len": work.max_seq_len,
    }

    def probe(num_threads: int) -> float:
        torch.set_num_threads(min(num_threads, args.cores))
        return read_bandwidth(device, PROBE_SECONDS)

    exchanges = {line.name: _exchanges(source, line, dtype) for line in lines}
    with tempfile.TemporaryDirectory() as logs, teams(lines, task, Path(logs)) as racers:
        short = work.short_prompts[0]
        _note(f"{args.rounds} rounds of {', '.join(line.name for line in lines)}")
        race(racers, work.long_prompt, short, args.new_tokens, args.rounds, probe)
        race_exchanges(racers, exchanges)
        found = {team.line.name: figures(team, racers[0]) for team in racers}
    for line in lines:
        own = found[line.name]
        own |= beside_model(line, found, args.cores, subject)
        own |= _exchanged(exchanges[line.name], own, dtype)
    result = {
        "benchmark": "parallel",
        "model": source.folder.name if args.model else args.shape,
        "weights": "checkpoint" if args.model else "random",
        "parameters": source.config.num_parameters,
        "layers": source.config.num_layers,
        "quant": args.quant or source.quantized_as or None,
        **{key: task[key] for key in ("dtype", "compile", "by_expert")},
        "rounds": args.rounds,
        "prompt_tokens": args.prompt_tokens,
        "prefill_tokens": args.prefill_tokens,
        "new_tokens": args.new_tokens,
        "device_name": device_name(device),
        "cores": args.cores,
        "torch": torch.__version__,
        "commit": commit(),
        "teams": found,
    }
    print("\n".join(table(result)), flush=True)
    form = args.quant or result["dtype"]
    name = f"{datetime.now(UTC):%Y-%m-%d}-{device.type}-{result['model']}-{form}"
    output = args.out or RESULTS / f"{name}-parallel.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", default="tinyllama-1.1b", help=f"one of {', '.join(SHAPES)}")
    what.add_argument("--model", help="a folder, a hub id or a bundled name, instead of a shape")
    parser.add_argument("--num-layers", type=int, metavar="N", help="only the first of a shape")
    parser.add_argument("--dtype", default="auto", help="default: the model's; of a shape bf16")
    parser.add_argument("--quant", help="rounded while loading: int8, int4, ...")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts a rank")
    parser.add_argument(
        "--ranks",
        type=lambda text: [int(number) for number in text.split(",")],
        default=[1, 2],
        metavar="A,B",
        help="default: 1,2",
    )
    parser.add_argument("--device", default="cpu")
    for name, default, text in (
        ("cores", os.cpu_count(), "of a CPU, for each team; default: %(default)s"),
        ("rounds", 3, "default: %(default)s"),
        ("prompt-tokens", 8, "of the short prompt; default: %(default)s"),
        ("prefill-tokens", 256, "of the long prompt; default: %(default)s"),
        ("new-tokens", 64, "decoded behind the short prompt; default: %(default)s"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: in bench/results")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        metavar="DIR",
        help="where random weights stay for the next run; default: %(default)s",
    )
    return parser


def _folder(args: argparse.Namespace) -> Path:
    """The model; random weights are written where they are not there yet."""
    if args.model:
        return find_model(args.model)
    raw, dtype = shape_config(args.shape, args.num_layers), shape_dtype(parse_dtype(args.dtype))
    layers = "" if args.num_layers is None else f"-{args.num_layers}-layers"
    folder: Path = args.work_dir / f"{args.shape}{layers}-{str(dtype).removeprefix('torch.')}"
    if not folder.is_dir():
        _note(f"Writing random weights to {folder}")
        begun = folder.with_name(f"{folder.name}.part")
        begun.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(raw, begun, dtype)
        begun.rename(folder)
    return folder


def _lines(sizes: Sequence[int], cores: int, device: torch.device) -> list[Line]:
    """Every number of ranks with every number of threads that is worth a row."""
    if device.type == "cuda":
        return [Line(size, 1) for size in sizes]
    found = [Line(size, each) for size in sizes for each in (1, max(1, cores // size))]
    found += [Line(size, max(1, cores // size), shared=False) for size in sizes if size > 1]
    return list(dict.fromkeys(found))


def _exchanges(source: Checkpoint, line: Line, dtype: torch.dtype) -> list[Exchange]:
    return exchanges_of(source.config, line.num_ranks, dtype.itemsize)


def _subject(args: argparse.Namespace, source: Checkpoint, dtype: torch.dtype) -> Subject:
    configs = {size: local_config(source.config, Group(0, size)) for size in {1, *args.ranks}}
    cache_bytes = {
        size: cache_bytes_per_token(config, dtype, "auto") for size, config in configs.items()
    }
    context = args.prompt_tokens + args.new_tokens // 2
    return Subject(cache_bytes, source.config.num_layers, context)


def _exchanged(exchanges: Sequence[Exchange], found: Figures, dtype: torch.dtype) -> Figures:
    """How often a step's ranks talk, and how much: through gloo sums are of float32."""
    wide = found["collectives_through"] == "process group" and dtype != torch.float32
    factor = 4 // dtype.itemsize if wide else 1
    sizes = [
        each.count * each.num_bytes * (factor if each.kind == "all_reduce" else 1)
        for each in exchanges
    ]
    return {
        "collectives_a_step": sum(each.count for each in exchanges),
        "exchanged_bytes_a_step": sum(sizes),
        "exchanges": {
            each.what: {"count": each.count, "bytes": size, "seconds": seconds}
            for each, size, seconds in zip(exchanges, sizes, found["exchange_s"], strict=True)
        },
    }


def beside_model(line: Line, found: dict[str, Figures], cores: int, subject: Subject) -> Figures:
    """What of the memory's bandwidth it reaches, its gain over one process of as many threads in
    all, efficiency beside one of a rank's threads, and the speed that the formula predicts: medians
    over the rounds, each beside the same round of others. None where that process did not run.
    """
    own, total = found[line.name], min(line.num_ranks * line.num_threads, cores)
    alone = found.get(Line(1, total).name)
    same = found.get(Line(1, line.num_threads).name)
    result: Figures = dict.fromkeys(("gain", "efficiency", "predicted_tok_s", "error"))
    result["reached"] = reached(own, subject)
    if same is not None:
        result["efficiency"] = median(
            efficiency(speed, line.num_ranks, one)
            for speed, one in zip(_speeds(own), _speeds(same), strict=True)
        )
    if alone is None:
        return result
    pairs = zip(_speeds(own), _speeds(alone), strict=True)
    result["gain"] = median(speed / one for speed, one in pairs)
    if line.num_ranks > 1:
        predicted = [predicted_tok_s(own, alone, turn, subject) for turn in own["per_round"]]
        errors = (said / speed - 1 for said, speed in zip(predicted, _speeds(own), strict=True))
        result |= {"predicted_tok_s": median(predicted), "error": median(errors)}
    return result


def reached(found: Figures, subject: Subject) -> float:
    """The part of the memory's bandwidth that all ranks together read with."""
    share, num_ranks = subject.share(found), len(found["weight_bytes"])
    size = share.weight_bytes + subject.context * share.cache_bytes_per_token
    turns = found["per_round"]
    return median(num_ranks * size * t["decode_tok_s"] / t["read_bandwidth"] for t in turns)


def predicted_tok_s(own: Figures, alone: Figures, turn: Figures, subject: Subject) -> float:
    """Of a team, from its ranks' bytes, what memory gave around its turn, its collectives measured
    alone, and the part of the bandwidth that one process of as many threads reaches. Ranks share
    the memory.
    """
    num_ranks = len(own["weight_bytes"])
    bandwidth = turn["read_bandwidth"] / num_ranks
    machine = Machine(bandwidth, reached(alone, subject), NO_LINK)
    share, context = subject.share(own), subject.context
    silent = step_seconds(share, [], subject.num_layers, num_ranks, machine, context)
    return 1 / (silent + sum(own["exchange_s"]))


def _speeds(found: Figures) -> list[float]:
    return [turn["decode_tok_s"] for turn in found["per_round"]]


# Column of the table: what it shows, width, format.
COLUMNS = {
    "decode tok/s": lambda own: f"{own['decode_tok_s']:.1f}",
    "equal": lambda own: f"{own['equal_tokens']:.0%}",
    "gain": lambda own: _or_dash(own["gain"], ".2f"),
    "efficiency": lambda own: _or_dash(own["efficiency"], ".0%"),
    "prefill tok/s": lambda own: f"{own['prefill_tok_s']:.0f}",
    "GB/s": lambda own: f"{own['read_bandwidth'] / 1e9:.1f}",
    "reached": lambda own: f"{own['reached']:.0%}",
    "weights MB": lambda own: f"{max(own['weight_bytes']) / 1e6:.1f}",
    "files MB": lambda own: f"{max(own['bytes_read']) / 1e6:.1f}",
    "resident MB": lambda own: f"{max(rank['resident'] for rank in own['after']) / 1e6:.0f}",
    "collectives": lambda own: f"{own['collectives_a_step']}",
    "kB": lambda own: f"{own['exchanged_bytes_a_step'] / 1e3:.1f}",
    "exchange us": lambda own: f"{sum(own['exchange_s']) * 1e6:.0f}",
    "predicted": lambda own: _or_dash(own["predicted_tok_s"], ".1f"),
    "error": lambda own: _or_dash(own["error"], "+.1%"),
}


def table(result: dict[str, Any]) -> list[str]:
    found = result["teams"]
    first = max(map(len, found))
    form = result["quant"] or result["dtype"]
    rows = [
        f"{result['model']} ({result['weights']} weights, {result['parameters']:,} parameters), "
        f"{form}, {'compiled' if result['compile'] else 'eager'}",
        f"{result['device_name']}, torch {result['torch']}, commit {result['commit']}",
        f"{result['new_tokens']} tokens after {result['prompt_tokens']}, prefill of "
        f"{result['prefill_tokens']}; medians of {result['rounds']} rounds; MB and kB are the "
        "rank's that has most",
        " ".join([" " * first, *COLUMNS]),
    ]
    for name, own in found.items():
        cells = [cell(own).rjust(len(title)) for title, cell in COLUMNS.items()]
        rows.append(" ".join([name.ljust(first), *cells]))
    return rows


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    sys.exit(main())
