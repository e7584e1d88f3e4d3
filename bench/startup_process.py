"""One fresh process of bench/startup.py, which says what to do in a JSON argument. Prints JSON.

Imports only what it is there to measure. Times are on the monotonic clock, which processes share.
"""

import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def first_token(task: dict[str, Any]) -> None:
    """From the start of the process to the first token of a prompt, and when each stage ended."""
    import torch

    ends = {"import_torch": monotonic()}
    from gptfast.llm import LLM
    from gptfast.sampling import SamplingParams

    ends["import_gptfast"] = monotonic()
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    names = ("device", "dtype", "quant", "compile", "max_seq_len")
    llm = LLM(task["folder"], **{name: task[name] for name in names})
    ends["load"] = monotonic()
    params = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
    next(iter(llm.stream(task["prompt_ids"], params)))
    ends["first_token"] = monotonic()
    layers = llm.engine.runner.cache.layers
    report = {
        "ends": ends,
        "compile_s": llm.engine.runner.compile_s,
        "cache_bytes": sum(tensor.nbytes for layer in layers for tensor in layer.tensors),
    }
    print(json.dumps(report))


def import_torch(task: dict[str, Any]) -> None:
    """The part of every start that is not ours."""
    import torch

    assert torch
    print(json.dumps({"ends": {"import_torch": monotonic()}}))


def kernels(task: dict[str, Any]) -> None:
    """The C++ kernels for the CPU, compiled where they are not in the cache."""
    import torch

    ends = {"import_torch": monotonic()}
    from gptfast.kernels.cpu_step import STEP
    from quantize.kernels.build import LINEAR

    assert torch
    found = {library.name: library.load() is not None for library in (LINEAR, STEP)}
    print(json.dumps({"ends": {**ends, "kernels": monotonic()}, "loaded": found}))


def trivial(task: dict[str, Any]) -> None:
    """Imports torch and compiles a trivial function; then waits, for someone to look at its
    memory.
    """
    import torch

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    torch.compile(_add_one)(torch.ones(16, device=task["device"]))
    print("compiled", flush=True)
    sys.stdin.readline()


def _add_one(x: Any) -> Any:
    return x + 1


if __name__ == "__main__":
    tasks = (first_token, import_torch, kernels, trivial)
    {task.__name__: task for task in tasks}[sys.argv[1]](json.loads(sys.argv[2]))
