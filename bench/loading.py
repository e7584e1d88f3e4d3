"""How long a Hugging Face folder takes to load, and how long what `gptfast convert` makes of it.

They take turns, each time in a process of its own that also runs one token twice: pages that
loading leaves unread are paid for by the first pass. "cold" rounds begin with the files dropped
from the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.commands.bench import commit, device_name
from gptfast.convert import convert
from gptfast.device import DTYPES, peak_memory
from gptfast.loading import load
from gptfast.shapes import shape_config, write_random_checkpoint

KINDS = ("hf", "gptfast")
CPU = torch.device("cpu")


def main() -> int:
    args = _parser().parse_args()
    if args.one is not None:
        print(json.dumps(load_once(args.one, args.threads)))
        return 0
    with tempfile.TemporaryDirectory(prefix="gptfast-bench-", dir=args.dir) as place:
        folders = {kind: Path(place) / kind for kind in KINDS}
        folders["hf"].mkdir()
        write_random_checkpoint(shape_config(args.shape), folders["hf"], DTYPES[args.dtype])
        convert(folders["hf"], folders["gptfast"])
        rounds: dict[str, list[dict[str, float]]] = {}
        for state in ("warm", *(["cold"] if args.cold else [])):
            for number in range(args.rounds + 1):
                for kind, folder in folders.items():
                    found = _measure(folder, args.threads, drop=state == "cold")
                    if number:  # the first round only fills the page cache
                        rounds.setdefault(f"{kind} {state}", []).append(found)
    result = {
        "benchmark": "loading",
        "shape": args.shape,
        "dtype": args.dtype,
        "threads": args.threads,
        "commit": commit(),
        "device": device_name(CPU),
        "torch": torch.__version__,
        "per_round": rounds,
    }
    print(f"{'':14} {'load s':>8} {'first s':>8} {'second s':>8} {'peak GB':>8}")
    for name, found in rounds.items():
        keys = ("load_s", "first_s", "second_s", "peak_memory_gb")
        values = (median(one[key] for one in found) for key in keys)
        print(f"{name:14} " + " ".join(f"{value:8.3f}" for value in values))
    print(json.dumps(result))
    return 0


def load_once(folder: Path, threads: int) -> dict[str, float]:
    """Seconds to load, and of a pass over one token right afterwards and again."""
    torch.set_num_threads(threads)
    times = [perf_counter()]
    model = load(folder)
    times.append(perf_counter())
    for _ in range(2):
        with torch.no_grad():
            model(torch.tensor([[1]]), torch.tensor([[0]]))
        times.append(perf_counter())
    names = ("load_s", "first_s", "second_s")
    seconds = (end - start for start, end in pairwise(times))
    return {**dict(zip(names, seconds, strict=True)), "peak_memory_gb": peak_memory(CPU) / 1e9}


def _measure(folder: Path, threads: int, drop: bool) -> dict[str, float]:
    if drop:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--one", str(folder), "--threads", str(threads)]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also with nothing in the page cache")
    parser.add_argument("--dir", type=Path, help="where the files are written; default: temporary")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
