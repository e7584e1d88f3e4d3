"""Speculative decoding beside plain decoding, at real sizes and with real acceptance: the bundled
storyteller and its draft, grown to large shapes (see grow.py), in turns over the same prompts.

    python bench/speculation.py --target tinyllama-1.1b --draft 60m,ngram --threads 2
    python bench/speculation.py --quant int8 --draft 60m --speculate-k adaptive,1,2,4,8
    python bench/speculation.py --target llama-3.1-8b --draft 160m --device cuda --compile

A draft is a shape to grow the storyteller's draft to, `ngram`, a format such as `int4`, or
`layers:N`. The works:

- stories: openings of stories that neither model learned from, continued greedily.
- sampled: the same at temperature 0.8 and top-p 0.95.
- repeats: a story that the model wrote stands before its own beginning, and the model writes much
  of it again: what summaries, corrections and quotations do to prompt lookup.

Every round each engine takes its turn at each work; all of them run over one copy of the target's
weights. Figures are medians over the rounds, each turn beside the plain one of its round: with one
draft a run these are neighbours, which matters where the memory's speed drifts. Greedy tokens are
compared with those of plain decoding. Prints a table and then one JSON line, which it also writes.
"""

import argparse
import json
import shutil
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from grow import ALIASES, DRAFT_SHAPES, grow, grown_shape
from spec_race import PLAIN, Racer, Work, figures, race

from gptfast.checkpoint import inspect
from gptfast.commands.bench import commit, device_name
from gptfast.convert import convert
from gptfast.device import parse_device, parse_dtype
from gptfast.engine import Engine
from gptfast.hub import find_model
from gptfast.llm import LLM
from gptfast.loading import load
from gptfast.quantization import quant_plan
from gptfast.sampling import SamplingParams
from gptfast.shapes import SHAPES
from gptfast.speculation.sources import find_draft
from gptfast.stats import read_bandwidth
from gptfast.tokenizer import load_tokenizer

RESULTS = Path(__file__).with_name("results")
WORK_DIR = Path.home() / ".cache" / "gptfast" / "grown"
TARGET, DRAFT = "storyteller", "storyteller-draft"
WORKS = ("stories", "sampled", "repeats")
ADAPTIVE = "adaptive"
OPENING_WORDS = 12
STORY_END = "<|endoftext|>"  # between the stories of stories.txt
REPEATED_TOKENS = 30  # of a story's second time that are given
PROBE_SECONDS = 0.1
# Column of the table: key of a figure, digits.
COLUMNS = {
    "tok/s": ("tok_s", 1),
    "of plain": ("speedup", 2),
    "tokens a round": ("mean_accepted_length", 2),
    "draft": ("draft_cost", 3),
    "verify": ("verify_cost", 3),
    "rest": ("rest_cost", 3),
    "drafted": ("drafted_share", 2),
    "GB/s": ("read_bandwidth_gb_s", 1),
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = parse_device(args.device), parse_dtype(args.dtype) or torch.bfloat16
    target = grown(args.work_dir, TARGET, args.target)
    works = _works(args, target)
    racers = _racers(args, target, device, dtype, works)
    _note(f"{args.rounds} rounds of {len(racers)} engines")
    race(racers, works, args.rounds, partial(read_bandwidth, device, PROBE_SECONDS))
    config = racers[0].engine.model.config
    result = {
        "benchmark": "speculation",
        "model": f"storyteller grown to {args.target}",
        "parameters": config.num_parameters,
        "weight_bytes": racers[0].engine.model.bytes_per_step,
        "dtype": str(dtype).removeprefix("torch."),
        "quant": args.quant,
        "draft_quant": args.draft_quant,
        "compile": args.compile,
        "rounds": args.rounds,
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "works": {
            work.name: {racer.name: figures(racer, racers[0], work) for racer in racers}
            for work in works
        },
    }
    print("\n".join(table(result)), flush=True)
    form = result["dtype"] if args.quant == "none" else args.quant
    name = f"{datetime.now(UTC):%Y-%m-%d}-{device.type}-grown-{args.target}-speculation-{form}.json"
    (args.out or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", default="tinyllama-1.1b", help="shape; default: %(default)s")
    parser.add_argument(
        "--draft",
        type=_names,
        default=["60m", "ngram"],
        metavar="A,B",
        help=f"{', '.join([*DRAFT_SHAPES, *ALIASES])}, ngram, int4, layers:N, ...",
    )
    parser.add_argument(
        "--speculate-k",
        type=_names,
        default=[ADAPTIVE],
        metavar="A,B",
        help="tokens drafted at a time: numbers, or adaptive; each is an engine of its own",
    )
    parser.add_argument("--works", type=_names, default=list(WORKS), metavar="A,B")
    parser.add_argument("--quant", default="none", help="of the target: none, int8, int4, ...")
    parser.add_argument("--draft-quant", default="none", help="of a grown draft: the same")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    for name, default, text in (
        ("rounds", 3, "default: %(default)s"),
        ("prompts", 3, "of each work; default: %(default)s"),
        ("new-tokens", 96, "of each prompt, at most; default: %(default)s"),
        ("threads", None, "default: as torch has them"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: in bench/results")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        metavar="DIR",
        help="where grown models stay for the next run; default: %(default)s",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _check(args: argparse.Namespace) -> None:
    """ValueError for what cannot be measured, before anything is written or loaded."""
    for name in ("rounds", "prompts"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; 1 is the least")
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens is {args.new_tokens}; a speed needs at least 2")
    if unknown := [name for name in args.works if name not in WORKS]:
        raise ValueError(f"work {unknown[0]!r} is unknown; use some of: {', '.join(WORKS)}")
    for k in args.speculate_k:
        if k != ADAPTIVE and not k.isdigit():
            raise ValueError(f"--speculate-k has {k!r}; numbers or {ADAPTIVE!r} are needed")
    grown_shape(args.target)


def grown(work_dir: Path, small: str, shape: str, vocab_size: int | None = None) -> Path:
    """The folder of a bundled model grown to a shape, made now if it is not there."""
    sizes = grown_shape(shape, vocab_size)
    folder = work_dir / f"{small}-{shape}-{sizes['vocab_size']}"
    if not folder.exists():
        _note(f"Growing {folder}")
        part = folder.with_name(f"part-{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        grow(find_model(small), sizes, part)
        part.rename(folder)
    return folder


def quantized(folder: Path, quant: str) -> Path:
    """The folder of a model rounded to a format, made now if it is not there."""
    if quant == "none":
        return folder
    place = folder.with_name(f"{folder.name}-{quant}")
    if not place.exists():
        _note(f"Writing {place}")
        convert(folder, place, quant=quant_plan(quant))
    return place


def _works(args: argparse.Namespace, target: Path) -> list[Work]:
    """Prompts of stories that are in no one's training text."""
    small = LLM(TARGET, dtype="fp32")
    text = (find_model(TARGET).parent / "stories.txt").read_text()
    stories = [story for story in text.split(STORY_END) if story.strip()]
    # Evenly over the file: neighbours are of one kind no more than others.
    chosen = stories[:: max(1, len(stories) // args.prompts)][: args.prompts]
    openings = [small.encode(" ".join(story.split()[:OPENING_WORDS])) for story in chosen]
    greedy = SamplingParams(temperature=0, max_new_tokens=args.new_tokens)
    sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_new_tokens=args.new_tokens)
    works = {
        "stories": Work("stories", openings, greedy),
        "sampled": Work("sampled", openings, sampled),
    }
    if "repeats" in args.works:
        whole = SamplingParams(temperature=0, max_new_tokens=256)
        written = [small.generate([opening], whole)[0].token_ids for opening in openings]
        prompts = [
            [*opening, *story, *opening, *story[:REPEATED_TOKENS]]
            for opening, story in zip(openings, written, strict=True)
        ]
        works["repeats"] = Work("repeats", prompts, greedy)
    return [works[name] for name in args.works]


def _racers(
    args: argparse.Namespace,
    target: Path,
    device: torch.device,
    dtype: torch.dtype,
    works: list[Work],
) -> list[Racer]:
    """Plain decoding first, then each draft at each k, over one copy of the target's weights."""
    # Drafts that the target makes of itself come from its plain weights.
    source, tokenizer = inspect(target), load_tokenizer(target)
    plan = None if args.quant == "none" else quant_plan(args.quant)
    draft_plan = None if args.draft_quant == "none" else quant_plan(args.draft_quant)
    vocab_size = source.config.vocab_size
    drafts = []
    for name in args.draft:  # all are checked, and grown, before the target is loaded
        is_shape = name in DRAFT_SHAPES or name in ALIASES or name in SHAPES
        place = grown(args.work_dir, DRAFT, name, vocab_size) if is_shape else name
        found = find_draft(place, source, tokenizer, plan, draft_plan if is_shape else None)
        drafts.append((name, found))
    model = load(quantized(target, args.quant), dtype, device)
    room = max(len(prompt) for work in works for prompt in work.prompts) + args.new_tokens
    build = partial(Engine, model, 1, room, args.compile)
    racers = [Racer(PLAIN, build())]
    for name, found in drafts:
        draft = found.load(model, dtype)
        for k in args.speculate_k:
            fixed = None if k == ADAPTIVE else int(k)
            label = name if fixed is None else f"{name} k={k}"
            racers.append(Racer(label, build(draft=draft, speculate_k=fixed)))
    return racers


def table(result: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    form = result["dtype"] if result["quant"] == "none" else result["quant"]
    rows = [
        f"{result['model']} ({result['parameters']:,} parameters, "
        f"{result['weight_bytes'] / 1e9:.2f} GB a token), {form}",
        f"{result['device_name']}, {result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}",
        f"{result['prompts']} prompts, {result['new_tokens']} tokens each; medians of "
        f"{result['rounds']} rounds; draft, verify and rest of a round in plain steps",
    ]
    width = max(len(name) for work in result["works"].values() for name in work)
    for work, entries in result["works"].items():
        rows += ["", " ".join([work.ljust(width), *(title.rjust(8) for title in COLUMNS)])]
        for name, found in entries.items():
            cells = [
                _cell(found.get(key), digits).rjust(max(8, len(title)))
                for title, (key, digits) in COLUMNS.items()
            ]
            rows.append(" ".join([name.ljust(width), *cells]))
        rows += [
            f"{name}: accepted by position {_shares(found['acceptance_by_position'])}"
            f"{_equality(found)}. {found['note']}"
            for name, found in entries.items()
            if "acceptance_by_position" in found
        ]
    return rows


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _shares(values: list[float | None]) -> str:
    return " ".join("–" if value is None else f"{value:.2f}" for value in values) or "–"


def _equality(found: dict[str, Any]) -> str:
    if "equal_tokens" not in found:
        return ""
    share = found["equal_tokens"]
    return ", tokens of plain decoding" if share == 1 else f", {share:.1%} of PLAIN'S TOKENS ONLY"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"speculation.py: error: {error}", file=sys.stderr)
        sys.exit(2)
