"""`gptfast convert`: a model with our own names, which loads fastest, or as Hugging Face publishes
it; from other formats too, and with LoRA adapters merged.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptfast.convert import TARGETS, convert
from gptfast.device import DTYPES, format_bytes
from gptfast.hub import find_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
SRC may be
  a Hugging Face folder or id, or a folder that this command wrote;
  a .bin of llama2.c (legacy layout, version 0);
  with --allow-pickle: a folder with pytorch_model.bin, a ckpt.pt of nanoGPT, a model.pth of
  gpt-fast or the consolidated.00.pth of a Meta model in one part, with facts beside it or in
  --config: config.json, or params.json with max_seq_len and rope_theta put in.
OUT appears when everything is on the disk, and not at all where something goes wrong.
Tokenizer, chat template and licence files beside the weights are copied. A model without them reads
and writes token ids only."""
    parser.add_argument("source", metavar="SRC", help="folder, Hugging Face id or foreign file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default=TARGETS[0],
        help="gptfast: fused weights under our own names; hf: a standard Hugging Face folder; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of the new weights; default: what the checkpoint says, as in loading",
    )
    parser.add_argument(
        "--lora",
        type=_path,
        action="append",
        default=[],
        metavar="ADAPTER",
        help="PEFT folder to merge into the weights; may be given several times",
    )
    parser.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="json file with the facts that a .pth does not say: a Hugging Face config.json, or "
        "params.json; default: the one beside it",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read .bin, .pt and .pth files of torch.save (tensors and plain values only)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def run(args: argparse.Namespace) -> int:
    source = _path(args.source)
    if not os.path.isfile(source):
        source = find_model(args.source, args.revision)
    try:
        result = convert(
            source,
            _path(args.out),
            args.to,
            args.dtype,
            args.lora,
            facts=args.config,
            allow_pickle=args.allow_pickle,
            overwrite=args.force,
            progress=_progress_bar,
        )
    except KeyboardInterrupt:
        _note("Interrupted; nothing was written")
        raise
    if result.left_out:
        _note(f"Left out: {result.left_out}")
    if not result.has_tokenizer:
        _note("No tokenizer was found beside the weights: the new model reads token ids only")
    dtype = str(result.dtype).removeprefix("torch.")
    print(
        f"{result.folder}: {result.num_parameters:,} parameters in {dtype}, "
        f"{format_bytes(result.num_bytes)}"
    )
    return 0


def _progress_bar(items: Iterable[Any]) -> Iterable[Any]:
    return tqdm(items, desc="Converting weights", unit="tensor", delay=1.0, leave=False)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
