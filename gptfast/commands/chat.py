"""`gptfast chat`: a conversation over several turns; each turn reads only what is new."""

import argparse
import sys
from typing import Any

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
from gptfast.commands.report import rate_text
from gptfast.llm import LLM, Message
from gptfast.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Type /reset to start over, /exit or Ctrl-D to end; Ctrl-C stops an answer."
    parser.add_argument("--system", help="a system message before the conversation")
    parser.add_argument(
        "--no-thinking",
        action="store_true",
        help="ask a thinking model to answer at once (its template's enable_thinking=False)",
    )
    add_model_options(parser)
    add_run_options(parser)
    add_draft_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    llm = load_llm(args, batch_size=1)
    beginning: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    variables = {"enable_thinking": False} if args.no_thinking else {}
    # Says now what is missing.
    llm.encode_chat([*beginning, {"role": "user", "content": "?"}], **variables)
    note_loaded(args, llm)
    messages = list(beginning)
    while (text := _read_turn()) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            messages = list(beginning)
            continue
        if not text:
            continue
        question: Message = {"role": "user", "content": text}
        try:
            answer = _answer(llm, [*messages, question], params, variables)
        except ValueError as error:
            # Too long for the context, say. The conversation so far is kept.
            note(f"gptfast: error: {error}; /reset starts over")
            continue
        messages += [question, {"role": "assistant", "content": answer}]
    return 0


def _read_turn() -> str | None:
    """A line from the user; None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    llm: LLM, messages: list[Message], params: SamplingParams, variables: dict[str, Any]
) -> str:
    """Streams the answer, then says what it cost. Ctrl-C ends it where it stands."""
    text, stats = "", None
    try:
        for chunk in llm.stream_chat(messages, params, **variables):
            text, stats = text + chunk.text, chunk.stats
            print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        note(" (stopped)")
    print(flush=True)
    if stats is not None:
        new = stats.num_prompt_tokens - stats.num_cached_tokens
        note(
            f"[prompt {stats.num_prompt_tokens} tokens, {new} of them new; "
            f"answer {stats.num_new_tokens} tokens; {rate_text(stats)}]"
        )
    return text
