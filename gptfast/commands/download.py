"""`gptfast download`: the files of a Hugging Face id that gptfast reads, and no others."""

import argparse
import sys
from pathlib import Path

from gptfast.device import format_bytes
from gptfast.hub import download


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Fetches safetensors, json, tokenizer and template files. A download that broke off goes "
        "on where it stopped when the same command is given again."
    )
    parser.add_argument("model", metavar="ID", help="Hugging Face id, owner/name")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: the cache that all commands look into"
    )


def run(args: argparse.Namespace) -> int:
    result = download(args.model, args.revision, args.out, _note)
    for name, size in sorted(result.files.items()):
        print(f"{format_bytes(size):>10}  {name}")
    print(f"{format_bytes(sum(result.files.values())):>10}  in {result.folder}")
    return 0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
