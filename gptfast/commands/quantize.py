"""`gptfast quantize`: a smaller checkpoint whose numbers were found with care, and the proof."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from gptfast.calibrated import Awq, Gptq, Method
from gptfast.calibration import (
    DEFAULT_NUM_SAMPLES,
    DEFAULT_SEQ_LEN,
    SEPARATOR,
    calibration_ids,
    read_documents,
)
from gptfast.checkpoint import inspect, read_config
from gptfast.commands.eval import read_text
from gptfast.device import DTYPES, format_bytes, parse_device
from gptfast.evaluation import (
    Comparison,
    Perplexity,
    Window,
    check_windows,
    compare,
    documents,
    strided,
)
from gptfast.hub import find_model
from gptfast.loading import check_plan, load
from gptfast.new_folder import check_places
from gptfast.quantization import QuantPlan, quant_plan
from gptfast.quantize_checkpoint import Quantized, quantize_checkpoint
from gptfast.tokenizer import Tokenizer, load_tokenizer

EVAL_WINDOW = 1024


def _gptq(args: argparse.Namespace) -> Method:
    damping = Gptq.damping if args.damping is None else args.damping
    return Gptq(act_order=not args.no_act_order, damping=damping)


def _awq(args: argparse.Namespace) -> Method:
    return Awq()


# None: each weight by itself.
METHODS: dict[str, Callable[[argparse.Namespace], Method] | None] = {
    "rtn": None,
    "gptq": _gptq,
    "awq": _awq,
}
CALIBRATION_OPTIONS = ("calibration", "num_samples", "seq_len")
# By their names in `args`; an option of another method would be given in vain.
OPTIONS: dict[str, tuple[str, ...]] = {
    "rtn": (),
    "gptq": (*CALIBRATION_OPTIONS, "no_act_order", "damping"),
    "awq": CALIBRATION_OPTIONS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Methods: rtn rounds each weight by itself, with a search for the best scales: seconds. gptq rounds
columns one after the other and lets those to come make up for the errors, awq scales the channels
that matter; both look at what the model computes on a text, and take minutes for each billion of
weights. A run that is interrupted goes on where it was when the same command is given again; its
finished blocks wait in a hidden folder beside OUT."""
    parser.add_argument("source", metavar="SRC", help="folder, Hugging Face id or bundled name")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--method", choices=list(METHODS), default="gptq", help="default: %(default)s"
    )
    _add_format_options(parser)
    _add_calibration_options(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of what is not quantized; default: what the checkpoint says",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--eval",
        metavar="TEXT",
        help="file to measure perplexity and KL divergence on, before and after (both models are "
        "in memory then); where it has <|endoftext|> each document is scored by itself",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")


def _add_format_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("format")
    group.add_argument("--bits", type=int, metavar="N", help="2, 3, 4 or 8; default: 4")
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale; default: 32, at 8 bits the whole row, as with -1",
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help="instead: int4-g64-asym, int8-dynamic, fp8 ... as in --quant of other commands",
    )
    group.add_argument("--head", metavar="NAME", help="of the head; default: int8; or none")
    group.add_argument("--embedding", metavar="NAME", help="of the embedding; default: none")
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help='parts that stay plain: "blocks.0.*", "mlp.down"; may be given several times',
    )


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration (gptq, awq)")
    group.add_argument(
        "--calibration",
        metavar="TEXT",
        help="file, folder of .txt and .md files, or - for stdin; <|endoftext|> ends a document; "
        "default: bundled children's stories",
    )
    group.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help=f"default: {DEFAULT_NUM_SAMPLES}",
    )
    group.add_argument(
        "--seq-len",
        type=int,
        metavar="TOKENS",
        help=f"of a sample; default: {DEFAULT_SEQ_LEN}, or what the context holds",
    )
    group.add_argument(
        "--no-act-order",
        action="store_true",
        help="gptq: columns as they stand, not the most used first",
    )
    group.add_argument(
        "--damping",
        type=float,
        metavar="X",
        help=f"gptq: share of its mean added to the Hessian's diagonal; default: {Gptq.damping}",
    )


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    plan, make = _plan(args), METHODS[args.method]
    method = None if make is None else make(args)
    source, device = find_model(args.source, args.revision), parse_device(args.device)
    # Before a text is read, perhaps from stdin.
    check_places(source, Path(os.path.abspath(os.path.expanduser(args.out))), (), args.force)
    check_plan(inspect(source), plan)
    tokenizer = load_tokenizer(source)
    windows = None if args.eval is None else _windows(args, source, tokenizer)
    ids = None if method is None else _calibration(args, source, tokenizer)
    out = Path(os.path.expanduser(args.out))
    settings: dict[str, Any] = {"dtype": args.dtype, "device": device, "overwrite": args.force}
    try:
        result = quantize_checkpoint(
            source, out, plan, method, ids, **settings, note=_note, progress=_progress_bar
        )
    except KeyboardInterrupt:
        kept = "; the same command goes on with what is done" if method is not None else ""
        _note(f"Interrupted: {out} was not written{kept}")
        raise
    _print_result(result, plan, args.method)
    if windows is not None:
        after, before = (load(folder, args.dtype, device) for folder in (out, source))
        _print_comparison(compare(after, before, windows, progress=_eval_bar))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    for name in OPTIONS["gptq"]:
        is_given = getattr(args, name) is not None and getattr(args, name) is not False
        if is_given and name not in OPTIONS[args.method]:
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing with --method {args.method}"
            )


def _plan(args: argparse.Namespace) -> QuantPlan:
    if args.bits not in (None, 2, 3, 4, 8):
        raise ValueError(f"--bits is {args.bits}; 2, 3, 4 and 8 are possible")
    if args.format is not None and (args.bits, args.group_size) != (None, None):
        raise ValueError("--format says bits and group size; leave out --bits and --group-size")
    name = args.format or f"int{4 if args.bits is None else args.bits}"
    return quant_plan(name, args.group_size, args.head, args.embedding, args.exclude)


def _calibration(args: argparse.Namespace, source: Path, tokenizer: Tokenizer | None) -> Tensor:
    config, _ = read_config(source)
    if tokenizer is None:
        raise ValueError(
            f"{source} has no tokenizer to read calibration text with; add it, or use --method rtn"
        )
    if args.calibration is None:
        _note(
            "Calibrating with the bundled stories; text of the kind that the model is for is "
            "better (--calibration)"
        )
    length = min(DEFAULT_SEQ_LEN, config.max_seq_len) if args.seq_len is None else args.seq_len
    count = DEFAULT_NUM_SAMPLES if args.num_samples is None else args.num_samples
    return calibration_ids(read_documents(args.calibration), tokenizer, count, length)


def _windows(
    args: argparse.Namespace, source: Path, tokenizer: Tokenizer | None
) -> Sequence[Window]:
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer to read --eval with; leave it out")
    config, _ = read_config(source)
    text, size = read_text(args.eval), min(EVAL_WINDOW, config.max_seq_len)
    if SEPARATOR in text:
        parts = [part.strip() for part in text.split(SEPARATOR)]
        windows = documents([tokenizer.encode(part) for part in parts if part], size)
    else:
        windows = strided(tokenizer.encode(text), size, max(1, size // 2))
    check_windows(config, windows)
    return windows


def _print_result(result: Quantized, plan: QuantPlan, method: str) -> None:
    bits = 8 * result.num_bytes / result.num_parameters
    dtype = str(result.dtype).removeprefix("torch.")
    print(
        f"{result.folder}: {method}, {plan.name}: {format_bytes(result.num_bytes)} "
        f"({bits:.2f} bits a weight) of {format_bytes(result.num_bytes_before)} in {dtype}"
    )


def _print_comparison(found: Comparison) -> None:
    for name, part in (("before", found.reference), ("after", found.model)):
        print(f"{name}: {_perplexity(part)}")
    print(
        f"difference: {found.nll_difference:+.5f} nats/token; KL divergence mean "
        f"{found.kl_mean:.5f}, median {found.kl_median:.5f}, p99 {found.kl_p99:.5f}; same "
        f"likeliest token {found.top1_agreement:.2%}"
    )


def _perplexity(part: Perplexity) -> str:
    return (
        f"perplexity {part.perplexity:.4f} ({part.nats_per_token:.5f} nats/token over "
        f"{part.num_tokens:,} tokens)"
    )


def _progress_bar(items: Iterable[Any]) -> Iterable[Any]:
    return tqdm(items, desc="Quantizing", unit="part", delay=1.0, leave=False)


def _eval_bar(items: Iterable[Any]) -> Iterable[Any]:
    return tqdm(items, desc="Evaluating", unit="batch", delay=1.0, leave=False)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
