"""`gptfast generate`: prompts in, text and honest tokens/sec out."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from gptfast.commands.options import (
    add_draft_options,
    add_model_options,
    add_run_options,
    add_sampling_options,
    load_llm,
    note,
    note_loaded,
    sampling_params,
)
from gptfast.commands.report import result_lines, summary_lines
from gptfast.llm import LLM, Chunk, Output, OutputBuilder, Prompt
from gptfast.sampling import SamplingParams
from gptfast.stats import read_bandwidth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", help="text; - reads standard input; default: Once upon a time")
    prompts.add_argument("--prompt-ids", metavar="IDS", help="token ids instead of text: 1,403,407")
    prompts.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="a prompt per line; in a .jsonl file a text, a list of token ids, "
        'or {"prompt": either} per line',
    )
    prompts.add_argument("--num-samples", type=int, default=1, help="outputs for each prompt")
    prompts.add_argument(
        "--batch-size", type=int, default=1, metavar="ROWS", help="outputs that run together"
    )
    add_model_options(parser)
    add_run_options(parser)
    add_draft_options(parser)
    add_sampling_options(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: N likeliest alternatives per token"
    )
    results.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    results.add_argument(
        "--profile", type=Path, metavar="PATH", help="write a torch.profiler trace (Chrome format)"
    )


def run(args: argparse.Namespace) -> int:
    if args.profile is not None and (args.profile.is_dir() or not args.profile.parent.is_dir()):
        raise ValueError(f"--profile {args.profile} is not a file in a folder that exists")
    if not 1 <= args.num_samples <= 1024:  # SamplingParams would call it n
        raise ValueError(f"--num-samples is {args.num_samples}; it must be from 1 to 1024")
    prompts = read_prompts(args)
    params = sampling_params(args, n=args.num_samples, logprobs=args.logprobs)
    llm = load_llm(args, args.batch_size)
    chunks = llm.stream_many(prompts, params)  # has checked them all
    note_loaded(args, llm)
    llm.engine.warm_up([params])
    if args.compile:
        note(f"Compilation time: {llm.engine.runner.compile_s:.2f} seconds")
    outputs, interrupted = [], False
    with _profile(args.profile):
        try:
            for output in _generate(llm, chunks, prompts, params, quiet=args.json):
                outputs.append(output)
                if not args.json:
                    print("\n".join(result_lines(len(outputs), output)), flush=True)
        except _Interrupted as interruption:
            outputs, interrupted = [*outputs, *interruption.outputs], True
    requests = [output.stats for output in outputs if output.token_ids]
    stats = llm.run_stats(requests)
    if llm.group.is_alone or llm.engine.device.type == "cuda":  # ranks of a host share its memory's
        stats.device_bandwidth = read_bandwidth(llm.engine.device)
    if args.json:
        print(json.dumps({"outputs": [_as_json(o) for o in outputs], "stats": stats.as_dict()}))
    else:
        print("\n".join(summary_lines(stats)))
    return 130 if interrupted else 0


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the options name, in one of four ways."""
    given = [
        name for name in ("prompt", "prompt_ids", "prompt_file") if getattr(args, name) is not None
    ]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} cannot be given together")
    if args.prompt_file is not None:
        return _read_prompt_file(args.prompt_file)
    if args.prompt_ids is not None:
        return [_parse_ids(args.prompt_ids)]
    if args.prompt == "-":
        return [sys.stdin.read().removesuffix("\n")]
    return ["Once upon a time" if args.prompt is None else args.prompt]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--prompt-ids {text!r} is not a list of numbers like 1,403,407") from None


def _read_prompt_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line breaks
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompts; a prompt per line is needed")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_parse_prompt(line, f"{path} line {number}") for number, line in numbered]


def _parse_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if isinstance(value, dict):
        value = value.get("prompt")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise ValueError(f'{where}: a text, a list of token ids or {{"prompt": either}} is needed')


class _Interrupted(Exception):
    """Ctrl-C during generation, with what was generated until then."""

    def __init__(self, outputs: list[Output]) -> None:
        self.outputs = outputs


def _generate(
    llm: LLM,
    chunks: Iterator[Chunk],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    quiet: bool,
) -> Iterator[Output]:
    """Outputs in order. One row streams its text as it comes; several rows print each text when it
    is whole.
    """
    builders = [OutputBuilder(prompt, params) for prompt in prompts for _ in range(params.n)]
    live = not quiet and (llm.engine.num_rows == 1 or len(builders) == 1)
    done = 0
    if live:
        _print_prompt(builders[0])
    try:
        for chunk in chunks:
            builders[chunk.index].add(chunk)
            if live:
                print(chunk.text or _ids_text(llm, chunk.token_ids), end="", flush=True)
            while done < len(builders) and builders[done].finished:
                if not live and not quiet:
                    _print_prompt(builders[done])
                    whole = builders[done].output()
                    print(whole.text or _ids_text(llm, tuple(whole.token_ids)), end="")
                if not quiet:
                    print()
                yield builders[done].output()
                done += 1
                if live and done < len(builders):
                    _print_prompt(builders[done])
    except KeyboardInterrupt:
        if not quiet:
            print()
        rest = [builder.output() for builder in builders[done:] if builder.token_ids]
        raise _Interrupted(rest) from None


def _print_prompt(builder: OutputBuilder) -> None:
    if isinstance(builder.prompt, str):
        print(builder.prompt, end="", flush=True)


def _ids_text(llm: LLM, token_ids: tuple[int, ...]) -> str:
    """What stands for text where there is no tokenizer."""
    return "" if llm.tokenizer else "".join(f"{token} " for token in token_ids)


def _as_json(output: Output) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "logprobs": None if output.logprobs is None else [vars(item) for item in output.logprobs],
        "stats": output.stats.as_dict(),
    }


@contextmanager
def _profile(path: Path | None) -> Iterator[None]:
    with torch.profiler.profile() if path else nullcontext() as profiler:
        yield
    if path is not None and profiler is not None:
        profiler.export_chrome_trace(str(path))
        if not path.is_file():  # torch only logs that it could not write
            raise OSError(f"the profile could not be written to {path}")
        note(f"Profile: {path} (open in chrome://tracing or ui.perfetto.dev)")
