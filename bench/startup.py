"""How long a new process takes to its first token (eager; compiled with nothing cached; compiled a
second time), and how much memory loading takes beyond the weights.

Every figure comes from a process of its own. The weights' files are in the page cache, where the
first of them has put them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.checkpoint import inspect
from gptfast.commands.bench import commit, device_name
from gptfast.config import ModelConfig
from gptfast.device import DTYPES, format_bytes, parse_device, parse_dtype
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.model import Transformer
from gptfast.shapes import shape_config, shape_dtype, write_random_checkpoint

CHILD = Path(__file__).with_name("startup_process.py")
# In this order in every round: "warm" finds what "cold" has compiled.
STARTS = ("eager", "compiled_cold", "compiled_warm")
# What the project promises of loading, in anonymous memory (mapped pages of files are not counted).
ALLOWED_RATIO = 1.1


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = parse_device(args.device)
    with _checkpoint(args) as folder:
        source = inspect(folder)
        dtype = parse_dtype(args.dtype) or source.dtype
        task = {
            "folder": str(folder),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": args.threads,
            "prompt_ids": [i % source.config.vocab_size for i in range(1, args.prompt_tokens + 1)],
        }
        memory = measure_memory(task, source.config, dtype)
        rounds = [_round(task, args.eager_only) for _ in range(args.rounds)]
    result = {
        "benchmark": "startup",
        "model": args.shape or folder.name,
        "weights": "random" if args.shape else "checkpoint",
        "parameters": source.config.num_parameters,
        "dtype": task["dtype"],
        "prompt_tokens": args.prompt_tokens,
        "rounds": args.rounds,
        "device": str(device),
        "device_name": device_name(device),
        "threads": args.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "import_torch_s": median(each["import_torch"]["import_torch_s"] for each in rounds),
        **{
            start: _medians([each[start] for each in rounds])
            for start in STARTS
            if start in rounds[0]
        },
        "memory": memory,
    }
    if not args.json:
        print("\n".join(_table(result)), flush=True)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id or bundled name")
    parser.add_argument(
        "--shape", help="random weights in a named shape, written to a folder first"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--eager-only", action="store_true", help="leave compiled starts out")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser


@contextmanager
def _checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """The model's folder, or one with random weights for as long as it is needed."""
    if not args.shape:
        yield find_model(args.model)
        return
    with tempfile.TemporaryDirectory(prefix="gptfast-bench-") as folder:
        raw, dtype = shape_config(args.shape), shape_dtype(parse_dtype(args.dtype))
        write_random_checkpoint(raw, Path(folder), dtype)
        yield Path(folder)


# -- time --


def _round(task: dict[str, Any], eager_only: bool) -> dict[str, dict[str, float]]:
    """Each kind of start once; compiled ones share a cache that is empty at first."""
    times = {"import_torch": _start("import_torch", task), "eager": {}}
    times["eager"] = _start("first_token", {**task, "compile": False})
    if eager_only:
        return times
    with tempfile.TemporaryDirectory(prefix="gptfast-bench-") as cache:
        for start in ("compiled_cold", "compiled_warm"):
            times[start] = _start("first_token", {**task, "compile": True}, cache)
    return times


def _start(kind: str, task: dict[str, Any], cache: str | None = None) -> dict[str, float]:
    """Runs a process and returns how many seconds each of its stages took, and all together."""
    environment = dict(os.environ)
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"
        environment["TRITON_CACHE_DIR"] = f"{cache}/triton"
    start = monotonic()
    command = [sys.executable, str(CHILD), kind, json.dumps(task)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    report = json.loads(process.stdout)
    seconds, last = {}, start
    for stage, end in report["ends"].items():
        seconds[f"{stage}_s"] = end - last
        last = end
    if "compile_s" in report:
        # Compilation happens on the way to the first token.
        seconds["compile_s"] = report["compile_s"]
        seconds["first_token_s"] -= report["compile_s"]
    return {**seconds, "total_s": last - start}


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(each[key] for each in times) for key in times[0]}


# -- memory --


def measure_memory(task: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Anonymous memory of a loading process above what it has after importing torch."""
    with torch.device("meta"):
        largest = max(parameter.numel() for parameter in Transformer(config).parameters())
    weights, largest = config.num_parameters * dtype.itemsize, largest * dtype.itemsize
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(CHILD), "load", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert process.stdin and process.stdout
        _expect(process, "imported")
        baseline = anonymous_memory(process.pid)
        watch = stack.enter_context(_Watch(process.pid))
        process.stdin.write("\n")
        process.stdin.flush()
        _expect(process, "loaded")
        loaded = anonymous_memory(process.pid)
    peak, allowed = watch.peak - baseline, int(ALLOWED_RATIO * weights) + largest
    return {
        "weights_bytes": weights,
        "largest_tensor_bytes": largest,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "loaded_bytes": loaded - baseline,
        "allowed_bytes": allowed,
        "within": peak <= allowed,
    }


def _expect(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != word:
        raise RuntimeError(f"the loading process said {line!r} where {word!r} was expected")


class _Watch:
    """Notes the largest anonymous memory of another process, looking several times a
    millisecond.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0
        self._stop = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_memory(self.pid))
            sleep(0.0002)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def anonymous_memory(pid: int) -> int:
    """Resident bytes that belong to no file (RssAnon: all resident pages less the shared ones)."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")


# -- printing --


def _table(result: dict[str, Any]) -> list[str]:
    memory = {
        key: format_bytes(value) for key, value in result["memory"].items() if key != "within"
    }
    rows = [
        f"{result['model']} ({result['weights']} weights, {result['parameters']:,} parameters), "
        f"{result['dtype']}",
        f"{result['device_name']}, {result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}; medians of {result['rounds']} rounds",
        f"{'seconds':16}{'import torch':>14}{'import gptfast':>16}{'load':>8}{'compile':>10}"
        f"{'first token':>13}{'all':>8}",
        f"{'import torch':16}{result['import_torch_s']:14.2f}",
    ]
    for name in STARTS:
        if name in result:
            start = result[name]
            cells = (
                f"{start[f'{stage}_s']:{width}.2f}"
                for stage, width in (
                    *(("import_torch", 14), ("import_gptfast", 16), ("load", 8)),
                    *(("compile", 10), ("first_token", 13), ("total", 8)),
                )
            )
            rows.append(name.replace("_", " ").ljust(16) + "".join(cells))
    rows += [
        f"loading takes at most {memory['peak_bytes']} of anonymous memory, above the "
        f"{memory['baseline_bytes']} of a process with torch; {memory['loaded_bytes']} in the end",
        f"allowed are {memory['allowed_bytes']}: {ALLOWED_RATIO} x {memory['weights_bytes']} of "
        f"weights + a largest tensor of {memory['largest_tensor_bytes']}: "
        + ("within" if result["memory"]["within"] else "EXCEEDED"),
    ]
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError) as error:
        print(f"startup.py: error: {error}", file=sys.stderr)
        sys.exit(2)
