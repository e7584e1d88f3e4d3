"""`gptfast bench` for several shapes and formats of their weights in one process, which imports the
compiler and starts the device once.

    python bench/tables.py --shapes llama-3.1-8b --formats bf16,int8,int4 --device cuda --compile

Other options are those of `gptfast bench`. Prints each one's table and JSON line as it is found,
and all of them together at the end; one that fails does not stop the next. The exit code is the
number of those that failed.
"""

import argparse
import gc
import io
import json
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.commands import main as gptfast

DTYPES = ("bf16", "fp16", "fp32")


class Tee(io.StringIO):
    """Keeps what is written, and writes it."""

    def __init__(self, target: TextIO) -> None:
        super().__init__()
        self.target = target

    def write(self, text: str) -> int:
        self.target.write(text)
        self.target.flush()
        return super().write(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--formats", default="bf16,fp8,int8,int4")
    args, rest = parser.parse_known_args()
    found: list[dict[str, Any]] = []
    failed = 0
    for shape in args.shapes.split(","):
        for form in args.formats.split(","):
            print(f"-- {shape} {form}", flush=True)
            record = run(shape, form, rest)
            failed += record is None
            found += [record] if record else []
    print(f"{'':30} decode tok/s   of read   prefill tok/s   first ms   compile s")
    for record in found:
        print(row(record))
    return failed


def run(shape: str, form: str, rest: list[str]) -> dict[str, Any] | None:
    """The record that `gptfast bench` ends with; None where it fails."""
    how = ["--dtype", form] if form in DTYPES else ["--dtype", "bf16", "--quant", form]
    output = Tee(sys.stdout)
    try:
        with redirect_stdout(output):
            code = gptfast(["bench", "--shape", shape, *how, *rest])
    except Exception:
        traceback.print_exc()
        code = 1
    torch._dynamo.reset()  # graphs hold on to the weights
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None if code else json.loads(output.getvalue().splitlines()[-1])


def row(record: dict[str, Any]) -> str:
    name, first_ms = (
        f"{record['model']} {record['quant'] or record['dtype']}",
        record["ttft_s"] * 1e3,
    )
    return (
        f"{name:30} {record['decode_tok_s']:12.1f} {record['bandwidth_fraction']:9.0%} "
        f"{record['prefill_tok_s']:15.0f} {first_ms:10.1f} {record['compile_s']:11.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
