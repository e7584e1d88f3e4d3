"""`gptfast eval`: perplexity of a text, and how far a model is from a reference; or the tasks of
lm-evaluation-harness.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptfast.calibration import SEPARATOR
from gptfast.checkpoint import inspect, read_config
from gptfast.commands.harness import Answers, Tasks
from gptfast.commands.options import (
    add_model_options,
    add_run_options,
    load_llm,
    note,
    note_loaded,
    progress_bar,
)
from gptfast.config import ModelConfig
from gptfast.device import DTYPES
from gptfast.evaluation import (
    DEFAULT_BATCH_SIZE,
    Comparison,
    Perplexity,
    Window,
    beginning_of,
    check_comparable,
    check_windows,
    compare,
    documents,
    measure_perplexity,
    second_halves,
    strided,
    token_lengths,
)
from gptfast.hub import find_model
from gptfast.joint import load_model
from gptfast.llm import LLM
from gptfast.model import Transformer
from gptfast.tokenizer import Tokenizer, load_tokenizer

# The longest window that is chosen without being asked for: those of GPT-2 in Hugging Face's guide,
# and of llama.cpp.
DEFAULT_WINDOWS = {"strided": 1024, "windows": 512, "split": 1024}
DEFAULT_TASK_CONTEXT = 4096
# Options that say something of one kind of work only, by their names in `args`.
TEXT_OPTIONS = "method window stride split max_tokens reference reference_dtype".split()
TASK_OPTIONS = "num_fewshot limit task_path max_seq_len compile".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Methods of perplexity: "strided" moves a window by a stride and scores what it shows for the first
time, as in Hugging Face's guide; "windows" scores the second half of windows that do not overlap,
each begun with BOS where the tokenizer adds one, as llama.cpp. Figures of another method, window or
text cannot be compared. Bits per byte count the bytes of the scored tokens."""
    work = parser.add_argument_group("text")
    work.add_argument(
        "--text", metavar="FILE", help="a file, a folder (its .txt files), or - for standard input"
    )
    work.add_argument("--method", choices=["strided", "windows"], help="default: strided")
    work.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help=f"default: {DEFAULT_WINDOWS['strided']} (strided) or {DEFAULT_WINDOWS['windows']} "
        "(windows), at most the model's context",
    )
    work.add_argument(
        "--stride", type=int, metavar="TOKENS", help="of strided; default: half a window"
    )
    work.add_argument(
        "--split",
        metavar="MARK",
        help="instead of a method: the text is documents with this mark between them; each is "
        "scored alone, its first window of tokens",
    )
    work.add_argument("--max-tokens", type=int, metavar="N", help="read only the first N tokens")
    work.add_argument(
        "--reference", metavar="MODEL", help="also the distance from this model, of the same tokens"
    )
    work.add_argument(
        "--reference-dtype",
        choices=["auto", *DTYPES],
        help="of the reference; without --reference: the same model, as its files have it",
    )
    tasks = parser.add_argument_group(
        "tasks of lm-evaluation-harness (pip install 'gptfast[eval]')"
    )
    tasks.add_argument("--tasks", metavar="NAMES", help="names with commas between them")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N of each task")
    tasks.add_argument("--task-path", type=Path, metavar="DIR", help="folder with more tasks")
    add_model_options(parser)
    add_run_options(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="ROWS",
        help="windows or requests that run together; default: %(default)s",
    )
    results.add_argument("--json", action="store_true", help="print one JSON object, no table")


def run(args: argparse.Namespace) -> int:
    if (args.text is None) == (args.tasks is None):
        raise ValueError(
            "give --text FILE (perplexity) or --tasks NAMES (lm-evaluation-harness), one of them"
        )
    given, others = ("text", TASK_OPTIONS) if args.tasks is None else ("tasks", TEXT_OPTIONS)
    for name in others:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} means nothing with --{given}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; at least 1 is needed")
    return _run_text(args) if args.tasks is None else _run_tasks(args)


# --- text ---


@dataclass(frozen=True)
class _Plan:
    """What is to be scored and how, before anything is loaded."""

    text: str
    method: str
    window: int
    stride: int | None
    max_tokens: int | None
    mark: str | None

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The documents of the text as ids, cut to the tokens that are to be read."""
        parts = [self.text] if self.mark is None else self.text.split(self.mark)
        texts: list[list[int]] = []
        left = sys.maxsize if self.max_tokens is None else self.max_tokens
        for part in parts:
            part = part if self.mark is None else part.strip()
            if part and left > 0:
                texts.append(tokenizer.encode(part)[:left])
                left -= len(texts[-1])
        if not texts:
            raise ValueError("the text is empty; at least 2 tokens are needed")
        return texts

    def windows(self, texts: Sequence[Sequence[int]], bos: int | None) -> list[Window]:
        if self.mark is not None:
            return documents(texts, self.window)
        if self.method == "windows":
            return second_halves(texts[0], self.window, bos)
        return strided(texts[0], self.window, self.stride or self.window)


def _plan(args: argparse.Namespace, config: ModelConfig) -> _Plan:
    if args.split is not None and (args.method or args.stride is not None):
        raise ValueError("--split is a method of its own: leave out --method and --stride")
    if args.split == "":
        raise ValueError("--split is empty; it must be the text between two documents")
    method = "split" if args.split is not None else args.method or "strided"
    window = (
        min(DEFAULT_WINDOWS[method], config.max_seq_len) if args.window is None else args.window
    )
    if not 2 <= window <= config.max_seq_len:
        raise ValueError(
            f"--window is {window}; it must be from 2 to the model's context, {config.max_seq_len}"
        )
    if args.stride is not None and method != "strided":
        raise ValueError("--stride belongs to --method strided")
    stride = None if method != "strided" else args.stride or max(1, window // 2)
    if args.stride is not None and not 1 <= args.stride <= window:
        raise ValueError(f"--stride is {args.stride}; it must be from 1 to the window, {window}")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise ValueError(f"--max-tokens is {args.max_tokens}; at least 2 are needed")
    return _Plan(read_text(args.text), method, window, stride, args.max_tokens, args.split)


def read_text(where: str) -> str:
    """The text of a file, of a folder's .txt files in the order of their names with a blank line
    between them, or of standard input ("-").
    """
    if where == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    path = Path(where).expanduser()
    if not path.is_dir():
        return _decoded(path.read_bytes(), str(path))
    files = sorted(file for file in path.glob("*.txt") if file.is_file())
    if not files:
        raise ValueError(f"{path}: there is no .txt file in this folder; name a file instead")
    return "\n\n".join(_decoded(file.read_bytes(), str(file)) for file in files)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}"
        ) from None


def _run_text(args: argparse.Namespace) -> int:
    folder = find_model(args.model, args.revision)
    config, _ = read_config(folder)
    plan = _plan(args, config)
    reference = _find_reference(args, folder)
    if reference is not None:
        check_comparable(config, read_config(reference)[0])
    if load_tokenizer(folder) is None:  # before the weights are read
        raise ValueError(f"{folder} has no tokenizer, and --text is text; add its tokenizer files")
    args.max_seq_len = plan.window
    llm = load_llm(args, batch_size=1)
    assert llm.tokenizer is not None
    texts = plan.encode(llm.tokenizer)
    windows = plan.windows(texts, beginning_of(llm.tokenizer))
    num_bytes = [length for ids in texts for length in token_lengths(llm.tokenizer, ids)]
    check_windows(config, windows)
    other = None if reference is None else _load_reference(args, reference, llm, texts)
    note_loaded(args, llm)
    _note_text(plan, texts, num_bytes, windows)
    facts = {
        "model": folder.name,
        **_numbers_of(llm.model),
        "kv_cache_dtype": args.kv_cache_dtype,
        "method": plan.method,
        "window": plan.window,
        "stride": plan.stride,
        "num_windows": len(windows),
        "text_tokens": len(num_bytes),
        "text_bytes": sum(num_bytes),
    }
    how: dict[str, Any] = {
        "batch_size": args.batch_size,
        "kv_cache_dtype": args.kv_cache_dtype,
        "progress": _progress_bar,
    }
    if reference is None or other is None:
        result = measure_perplexity(llm.model, windows, num_bytes, **how)
        lines = _table({folder.name: result})
        facts |= result.as_dict()
    else:
        comparison = compare(llm.model, other, windows, num_bytes, **how)
        rows = {folder.name: comparison.model, "reference": comparison.reference}
        lines = [*_table(rows), *_distance(comparison)]
        numbers = comparison.as_dict()
        reference_facts = {"model": reference.name, **_numbers_of(other)}
        facts |= numbers.pop("model")
        facts |= numbers | {"reference": reference_facts | numbers["reference"]}
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return 0


def _find_reference(args: argparse.Namespace, folder: Path) -> Path | None:
    if args.reference is not None:
        return find_model(args.reference)
    return None if args.reference_dtype is None else folder


def _load_reference(
    args: argparse.Namespace, folder: Path, llm: LLM, texts: Sequence[Sequence[int]]
) -> Transformer:
    """The reference on the model's device, as its files have it, once it is known to mean the same
    tokens.
    """
    tokenizer = load_tokenizer(folder)
    assert llm.tokenizer is not None
    if tokenizer is not None and any(
        tokenizer.token_bytes(token) != llm.tokenizer.token_bytes(token)
        for token in {token for ids in texts for token in ids}
    ):
        raise ValueError(
            f"{folder.name} has another tokenizer than {llm.folder.name}: the same ids are other "
            "text; only models with the same tokens can be compared"
        )
    dtype = args.reference_dtype or "auto"
    return load_model(llm.group, inspect(folder), dtype, llm.engine.device, progress_bar)


# --- what is printed ---


def _note_text(
    plan: _Plan,
    texts: Sequence[Sequence[int]],
    num_bytes: Sequence[int],
    windows: Sequence[Window],
) -> None:
    stride = "" if plan.stride is None else f", stride {plan.stride}"
    note(
        f"Text: {len(num_bytes)} tokens, {sum(num_bytes)} bytes; {plan.method}, window "
        f"{plan.window}{stride}: {len(windows)} {'window' if len(windows) == 1 else 'windows'}"
    )
    if plan.method == "strided" and len(num_bytes) < plan.window:
        note(f"The text is shorter than a window: it is scored as one window of {len(num_bytes)}")
    if plan.mark is None and (num_marks := plan.text.count(SEPARATOR)):
        note(
            f"{SEPARATOR} stands {num_marks} times in the text and is scored as a part of it; "
            f"--split '{SEPARATOR}' scores each document by itself"
        )
    if plan.mark is not None and plan.mark not in plan.text:
        note(f"The text has no {plan.mark!r}: it is one document, and its first window is scored")
    length = len(plan.text.encode())
    if plan.method != "split" and plan.max_tokens is None and sum(num_bytes) != length:
        note(
            f"The tokenizer does not keep this text as it is ({length} bytes): bits per byte count "
            "the bytes of its tokens"
        )


def _table(results: Mapping[str, Perplexity]) -> list[str]:
    rows = [("", "tokens", "nats/token", "perplexity", "bits/byte")]
    for name, result in results.items():
        bits = result.bits_per_byte
        rows.append(
            (
                name,
                f"{result.num_tokens}",
                f"{result.nats_per_token:.5f} ± {result.standard_error:.5f}",
                f"{result.perplexity:.4f} ± {result.perplexity_error:.4f}",
                "-" if bits is None else f"{bits:.5f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _distance(result: Comparison) -> list[str]:
    return [
        f"KL(reference || model), nats/token: mean {result.kl_mean:.6f} ± "
        f"{result.kl_standard_error:.6f}, median {result.kl_median:.6f}, "
        f"p99 {result.kl_p99:.6f}, max {result.kl_max:.6f}",
        f"Same likeliest token: {result.top1_agreement:.2%}",
        f"Paid above the reference, nats/token: {result.nll_difference:+.6f} ± "
        f"{result.nll_difference_error:.6f}",
    ]


def _numbers_of(model: Transformer) -> dict[str, Any]:
    """What a model computes in, and the formats of its quantized weights."""
    formats = sorted({form.name for form in model.formats.values()})
    return {"dtype": str(model.dtype).removeprefix("torch."), "formats": formats}


def _progress_bar(items: Iterable[Any]) -> Iterable[Any]:
    return tqdm(items, desc="Evaluating", unit="batch", delay=1.0, leave=False)


# --- tasks ---


def _run_tasks(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task; give names with commas between them")
    for option in ("num_fewshot", "limit"):
        value, least = getattr(args, option), 0 if option == "num_fewshot" else 1
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; at least {least} is needed")
    tasks = Tasks(names, args.task_path)
    if args.max_seq_len is None:
        config, _ = read_config(find_model(args.model, args.revision))
        args.max_seq_len = min(config.max_seq_len, DEFAULT_TASK_CONTEXT)
    llm = load_llm(args, args.batch_size)
    note_loaded(args, llm)
    answers = Answers(llm, args.batch_size, args.kv_cache_dtype, _progress_bar)
    results = tasks.run(answers, args.num_fewshot, args.limit)
    print(json.dumps(results.as_dict()) if args.json else results.text)
    return 0
