"""One rank of a team of bench/parallel.py, started by torchrun; a JSON object names its work.

Rank 0 loads the model with the others, then reads orders from its input and answers each with a
line of JSON. When its input ends, so do all ranks.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from gptfast.checkpoint import inspect
from gptfast.commands.contest import Gptfast
from gptfast.device import peak_memory
from gptfast.follower import follow
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.parallel import Group, finish, start
from gptfast.quantization import quant_plan
from gptfast.together import together

PR_SET_PDEATHSIG = 1  # see prctl(2)
WARM_TOKENS = 4
REPEATS = 30  # of a step's collectives, alone
ORDERS = ("prefill", "decode", "exchange")


def main() -> int:
    if sys.platform == "linux":  # nothing outlives the agent that started it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    group = start()
    try:
        if group.rank == 0:
            _lead(group, task)
        else:
            follow(group)
    finally:
        finish()
    return 0


def _lead(group: Group, task: dict[str, Any]) -> None:
    group = replace(group, by_expert=task["by_expert"])
    before, told = json.loads(memory(group)), []
    contestant = Gptfast(
        lambda: load_share(
            group, task["folder"], task["dtype"], task["device"], task["quant"], told=told
        ),
        num_rows=1,
        max_seq_len=task["max_seq_len"],
        compile=task["compile"],
    )
    loaded = json.loads(memory(group))
    contestant.run([[1] * 8], WARM_TOKENS)
    _say(
        {
            "shared_memory": group.shared >= 0,
            "has_fused_step": contestant.engine.runner.main.step is not None,
            "load_s": contestant.load_s,
            "idle": before,
            "loaded": loaded,
            **dict(zip(("bytes_read", "weight_bytes"), told, strict=True)),
        }
    )
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "exchange":
            seconds = exchange_seconds(group, str(contestant.model.dtype), order["exchanges"])
            _say({"seconds": json.loads(seconds)})
        elif order["do"] == "memory":
            _say({"ranks": json.loads(memory(group))})
        else:
            trace = contestant.run([order["prompt"]], order["new"])
            _say({**trace.requests[0].as_dict(), "token_ids": trace.token_ids[0]})


# -- what every rank does --


@together
def load_share(
    group: Group,
    folder: str,
    dtype: str,
    device: str,
    quant: str | None,
    told: list[list[int]] | None = None,
) -> Transformer:
    """This rank's share of a model. `told`: of every rank the bytes that it asked of the files, and
    those that it reads for a token.
    """
    source = inspect(Path(folder))
    plan = None if quant is None else quant_plan(quant)
    model = load(source, dtype, group.device(torch.device(device)), iter, plan, group)
    found = group.all_gather(torch.tensor([source.tensors.bytes_read, model.bytes_per_step]))
    if told is not None:
        told += found.t().tolist()
    return model


@together
def memory(group: Group) -> str:
    """Of each rank: its resident bytes, how many of them are pages of files, and the most that it
    held (on CUDA: allocated).
    """
    names = ("VmRSS", "RssFile")
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [_kilobytes(lines, name) * 1024 for name in names]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = group.all_gather(torch.tensor([*found, peak_memory(device)])).tolist()
    return json.dumps(
        [dict(zip(("resident", "of_files", "peak"), each, strict=True)) for each in every]
    )


@together
def exchange_seconds(group: Group, dtype: str, exchanges: list[list[Any]]) -> str:
    """Seconds of rank 0 for each of a step's collectives (kind, count, bytes), repeated with
    nothing between.
    """
    found = []
    for kind, count, num_bytes in exchanges:
        x = _numbers(kind, num_bytes, getattr(torch, dtype.removeprefix("torch.")))
        collective = getattr(group, kind)
        for _ in range(count):
            collective(x)
        group.all_gather(x)  # so that all begin together
        begun = perf_counter()
        for _ in range(REPEATS * count):
            collective(x)
        found.append((perf_counter() - begun) / REPEATS)
    return json.dumps(found)


def _numbers(kind: str, num_bytes: int, dtype: torch.dtype) -> Tensor:
    dtype = dtype if kind == "all_reduce" else torch.uint8
    return torch.ones(num_bytes // dtype.itemsize, dtype=dtype)


def _kilobytes(lines: list[str], name: str) -> int:
    """Of a line "name: N kB"; 0 where the system has none."""
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _say(what: dict[str, Any]) -> None:
    print(json.dumps({"pid": os.getpid(), **what}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
