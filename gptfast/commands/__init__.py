"""The command line: finds the command, reads its options, turns errors into one line.

A command is an entry in COMMANDS and a module with `add_arguments(parser)` and
`run(arguments) -> int`. Modules are imported when their command runs, so that `gptfast --help`
answers without importing torch. What a command does and prints is the command's own business.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from gptfast import __version__
from gptfast.launch import num_ranks

# name: (module, one line of help)
COMMANDS = {
    "generate": ("gptfast.commands.generate", "complete prompts with a model"),
    "chat": ("gptfast.commands.chat", "talk with a model over several turns"),
    "bench": ("gptfast.commands.bench", "measure decoding speed, memory and bandwidth"),
    "eval": ("gptfast.commands.eval", "measure perplexity, KL divergence from a reference, tasks"),
    "download": ("gptfast.commands.download", "fetch a Hugging Face model, only what is needed"),
    "convert": ("gptfast.commands.convert", "write a model anew: faster to load, merged, as HF"),
    "quantize": ("gptfast.commands.quantize", "write a smaller model: round to nearest, GPTQ, AWQ"),
    "info": ("gptfast.commands.info", "show a model's facts, size and memory needs"),
    "cache": ("gptfast.commands.cache", "what is compiled: show, save to a file, load, clear"),
}
# Those that torchrun may start several processes of.
PARALLEL = ("generate", "chat", "bench", "eval")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gptfast ARGV` (default: the process's own arguments) and return its exit code.

    A ValueError, OSError or MemoryError is the user's, and so is torch running out of memory: one
    line on stderr and exit code 2, or the traceback where GPTFAST_TRACEBACK=1. Every other
    exception is a defect and passes through.

    Of several processes that torchrun has started, that of rank 0 does all this; the others do what
    it needs of them, and print nothing.
    """
    try:
        try:
            return _as_rank(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is met inside this try
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left. Python flushes stdout once more at exit: let it succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        defect = isinstance(error, RuntimeError) and not _is_out_of_memory(error)
        if defect or os.environ.get("GPTFAST_TRACEBACK") == "1":
            raise
        print(f"gptfast: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _as_rank(arguments: list[str]) -> int:
    if num_ranks() == 1:
        return _dispatch(arguments)
    from gptfast.follower import follow  # imports torch
    from gptfast.parallel import finish, start

    group = start()
    try:
        if group.rank == 0:
            return _dispatch(arguments)
        follow(group)
        return 0
    finally:
        finish()


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_overview(), file=sys.stderr)
        return EXIT_USER_ERROR
    name, *options = arguments
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"gptfast {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; use one of: {', '.join(COMMANDS)}")
    if name not in PARALLEL and num_ranks() > 1:
        raise ValueError(f"{name} runs in one process; start it without torchrun")
    module_name, description = COMMANDS[name]
    parser = _Parser(prog=f"gptfast {name}", description=description, allow_abbrev=False)
    module = importlib.import_module(module_name)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(hyphenate(options)))
    return code


def hyphenate(options: list[str]) -> list[str]:
    """`--max_new_tokens=a_b` becomes `--max-new-tokens=a_b`: names only, and none after `--`."""
    end = options.index("--") if "--" in options else len(options)
    return [_hyphenate_name(option) for option in options[:end]] + options[end:]


def _hyphenate_name(option: str) -> str:
    name, equals, value = option.partition("=")
    # A value may begin with two hyphens when it holds a space: `--prompt "--my_flag does this"`.
    if re.fullmatch(r"--[A-Za-z][\w-]*", name):
        name = name.replace("_", "-")
    return name + equals + value


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line; sub-parsers inherit this."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"gptfast: error: {message}; see `{self.prog} --help`\n")


def _overview() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: gptfast COMMAND [OPTIONS]

commands:
{commands}

options:
  --help     show this message; `gptfast COMMAND --help` shows a command's options
  --version  show the version"""


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own complaint, which says how much was asked for; CUDA's type, or a CPU's words."""
    words = ("CUDA out of memory", "not enough memory", "can't allocate memory")
    return any(word in str(error) for word in words)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    lines = (line.strip() for line in str(error).splitlines())
    message = " ".join(line for line in lines if line)
    return message or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
