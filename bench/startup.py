"""How long a new process takes to its first token (eager; compiled with nothing cached; compiled a
second time; the same with quantized weights), and how much memory it takes beyond the weights.

Every figure comes from a process of its own. The weights' files are in the page cache, where the
first of them has put them; in "dropped" starts they are not. The C++ kernels, which are built once
for a machine, are there: how long building takes is a figure of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptfast.checkpoint import Checkpoint, inspect
from gptfast.commands.bench import commit, device_name
from gptfast.device import DTYPES, format_bytes, parse_device, parse_dtype
from gptfast.hub import DEFAULT_MODEL, find_model
from gptfast.loading import weight_bytes
from gptfast.quantization import quant_plan
from gptfast.shapes import shape_config, shape_dtype, write_random_checkpoint

CHILD = Path(__file__).with_name("startup_process.py")
# In this order in every round: "warm" finds what "cold" has compiled.
STARTS = ("eager", "eager_dropped", "compiled_cold", "compiled_warm")
# What the project promises of a start, in anonymous memory (mapped pages of files are not counted)
# beyond a process that has imported torch and compiled a trivial function.
ALLOWED_BESIDES = 300_000_000


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = parse_device(args.device)
    with _checkpoint(args) as folder, tempfile.TemporaryDirectory(prefix="gptfast-bench-") as work:
        source = inspect(folder)
        dtype = parse_dtype(args.dtype) or source.dtype
        starts = [start for start in STARTS if _is_wanted(start, args, device)]
        task = {
            "folder": str(folder),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": args.threads,
            "max_seq_len": args.max_seq_len,
            "prompt_ids": [i % source.config.vocab_size for i in range(1, args.prompt_tokens + 1)],
        }
        caches = Caches(Path(work))
        variants = [{**task, "quant": quant} for quant in (None, *args.quant)]
        kernels = _start("kernels", task, caches.kernels) if device.type == "cpu" else {}
        import_s = [_start("import_torch", task)["import_torch_s"] for _ in range(args.rounds)]
        rounds = [
            [_round(variant, starts, caches, folder) for variant in variants]
            for _ in range(args.rounds)
        ]
        # On CUDA the weights are elsewhere, and a driver's own memory is most of a process's.
        on_cpu = device.type == "cpu"
        memory = [
            _memory(each, starts, caches, source, dtype) if on_cpu else None for each in variants
        ]
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
        "import_torch_s": median(import_s),
        "kernels_s": kernels.get("kernels_s", 0.0),
        "variants": {
            variant["quant"] or "as stored": {
                **{start: _medians([each[at][start] for each in rounds]) for start in starts},
                "memory": memory[at],
                "per_round": [each[at] for each in rounds],
            }
            for at, variant in enumerate(variants)
        },
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
    parser.add_argument(
        "--quant",
        action="append",
        default=[],
        metavar="FORMAT",
        help="also with weights rounded while loading; may be given several times",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--max-seq-len", type=int, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--eager-only", action="store_true", help="leave compiled starts out")
    parser.add_argument(
        "--drop", action="store_true", help="also with the weights' files not in the page cache"
    )
    parser.add_argument("--dir", type=Path, help="where --shape is written; default: temporary")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser


def _is_wanted(start: str, args: argparse.Namespace, device: torch.device) -> bool:
    if start == "eager_dropped":
        return args.drop and hasattr(os, "posix_fadvise")
    return start == "eager" or not args.eager_only


@contextmanager
def _checkpoint(args: argparse.Namespace) -> Iterator[Path]:
    """The model's folder, or one with random weights for as long as it is needed."""
    if not args.shape:
        yield find_model(args.model)
        return
    with tempfile.TemporaryDirectory(prefix="gptfast-bench-", dir=args.dir) as folder:
        raw, dtype = shape_config(args.shape), shape_dtype(parse_dtype(args.dtype))
        write_random_checkpoint(raw, Path(folder), dtype)
        yield Path(folder)


class Caches:
    """Folders of compiled things: one with the C++ kernels alone, and fresh copies of it."""

    def __init__(self, work: Path) -> None:
        self.kernels, self._work, self._number = work / "kernels", work, 0
        self.kernels.mkdir(mode=0o700)

    def fresh(self) -> Path:
        self._number += 1
        folder = self._work / f"cache-{self._number}"
        shutil.copytree(self.kernels, folder)
        return folder


# -- time --


def _round(
    task: dict[str, Any], starts: list[str], caches: Caches, folder: Path
) -> dict[str, dict[str, float]]:
    """Each kind of start once; compiled ones share a cache without graphs at first."""
    times, cache = {}, caches.fresh()
    for start in starts:
        if start == "eager_dropped":
            _drop(folder)
        times[start] = _start("first_token", {**task, "compile": start.startswith("comp")}, cache)
    shutil.rmtree(cache)
    return times


def _drop(folder: Path) -> None:
    """Out of the page cache, as far as the system does what it is asked."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _start(kind: str, task: dict[str, Any], cache: Path | None = None) -> dict[str, float]:
    """Runs a process and returns how many seconds each of its stages took, and all together."""
    start, command = monotonic(), _command(kind, task)
    output = subprocess.run(command, env=_environment(cache), stdout=subprocess.PIPE, text=True)
    report = _report(command, output.returncode, output.stdout)
    seconds, last = {}, start
    for stage, end in report["ends"].items():
        seconds[f"{stage}_s"] = end - last
        last = end
    if "compile_s" in report:
        # Compilation happens on the way to the first token.
        seconds["compile_s"] = report["compile_s"]
        seconds["first_token_s"] -= report["compile_s"]
    return {**seconds, "total_s": last - start}


def _command(kind: str, task: dict[str, Any]) -> list[str]:
    return [sys.executable, str(CHILD), kind, json.dumps(task)]


def _environment(cache: Path | None) -> dict[str, str]:
    """Compiled things lie in `cache`, and nowhere else."""
    places = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in places}
    if cache is None:
        return environment
    own = {"GPTFAST_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "graphs" / "triton")}
    return {**environment, **own}


def _report(command: list[str], code: int, output: str) -> dict[str, Any]:
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    report: dict[str, Any] = json.loads(output)
    return report


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(each[key] for each in times) for key in times[0]}


# -- memory --


def _memory(
    task: dict[str, Any],
    starts: list[str],
    caches: Caches,
    source: Checkpoint,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The peak of each kind of start, and what is allowed."""
    quant = None if task["quant"] is None else quant_plan(task["quant"])
    weights = weight_bytes(source, dtype, torch.device("cpu"), quant)
    cache = caches.fresh()
    baseline = _trivial_memory(task, cache)
    peaks, cache_bytes = {}, 0
    for start in (start for start in starts if start != "eager_dropped"):
        peak, report = _peak("first_token", {**task, "compile": start.startswith("comp")}, cache)
        peaks[start] = max(0, peak - baseline)
        cache_bytes = report["cache_bytes"]
    shutil.rmtree(cache)
    allowed = weights + cache_bytes + ALLOWED_BESIDES
    return {
        "weights_bytes": weights,
        "cache_bytes": cache_bytes,
        "baseline_bytes": baseline,
        "peak_bytes": peaks,
        "allowed_bytes": allowed,
        "within": max(peaks.values()) <= allowed,
    }


def _trivial_memory(task: dict[str, Any], cache: Path) -> int:
    """Anonymous bytes of a process that has imported torch and compiled a trivial function."""
    environment = {
        **_environment(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "trivial"),
        # Ten seconds of other processes' work, which this one's memory does not show.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
    command, pipe = _command("trivial", task), subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        line = process.stdout.readline()
        if line.strip() != "compiled":
            raise RuntimeError(f"the trivial process said {line!r}")
        return anonymous_memory(process.pid)


def _peak(kind: str, task: dict[str, Any], cache: Path) -> tuple[int, dict[str, Any]]:
    """The largest anonymous memory of a process, looking every millisecond, and its report."""
    command, peak = _command(kind, task), 0
    with subprocess.Popen(
        command, env=_environment(cache), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            sleep(0.001)
        return peak, _report(command, process.returncode, process.stdout.read())


def anonymous_memory(pid: int) -> int:
    """Resident bytes that belong to no file (RssAnon: all resident pages less the shared ones); 0
    of a process that has ended.
    """
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")


# -- printing --


def _table(result: dict[str, Any]) -> list[str]:
    rows = [
        f"{result['model']} ({result['weights']} weights, {result['parameters']:,} parameters), "
        f"{result['dtype']}",
        f"{result['device_name']}, {result['threads']} threads, torch {result['torch']}, "
        f"commit {result['commit']}; medians of {result['rounds']} rounds",
        f"import torch takes {result['import_torch_s']:.2f} s; C++ kernels are built, once, in "
        f"{result['kernels_s']:.1f} s",
        f"{'seconds':28}{'import torch':>14}{'import gptfast':>16}{'load':>8}{'compile':>10}"
        f"{'first token':>13}{'all':>8}",
    ]
    for variant, found in result["variants"].items():
        for name in STARTS:
            if name in found:
                cells = (
                    f"{found[name][f'{stage}_s']:{width}.2f}"
                    for stage, width in (
                        *(("import_torch", 14), ("import_gptfast", 16), ("load", 8)),
                        *(("compile", 10), ("first_token", 13), ("total", 8)),
                    )
                )
                rows.append(f"{variant}, {name.replace('_', ' ')}".ljust(28) + "".join(cells))
    for variant, found in result["variants"].items():
        memory = found["memory"]
        if memory is None:
            continue
        peaks = (f"{name} {format_bytes(peak)}" for name, peak in memory["peak_bytes"].items())
        rows.append(
            f"{variant}: anonymous memory at its peak, above the "
            f"{format_bytes(memory['baseline_bytes'])} of a process that has compiled a trivial "
            f"function: {', '.join(peaks)}; allowed {format_bytes(memory['allowed_bytes'])} "
            f"(weights {format_bytes(memory['weights_bytes'])}, cache "
            f"{format_bytes(memory['cache_bytes'])}, {format_bytes(ALLOWED_BESIDES)}): "
            + ("within" if memory["within"] else "EXCEEDED")
        )
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError) as error:
        print(f"startup.py: error: {error}", file=sys.stderr)
        sys.exit(2)
