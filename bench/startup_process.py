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
    llm = LLM(task["folder"], device=task["device"], dtype=task["dtype"], compile=task["compile"])
    ends["load"] = monotonic()
    params = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
    next(iter(llm.stream(task["prompt_ids"], params)))
    ends["first_token"] = monotonic()
    print(json.dumps({"ends": ends, "compile_s": llm.engine.runner.compile_s}))


def import_torch(task: dict[str, Any]) -> None:
    """The part of every start that is not ours."""
    import torch

    assert torch
    print(json.dumps({"ends": {"import_torch": monotonic()}}))


def load(task: dict[str, Any]) -> None:
    """Loads, with a pause before and after for someone to look at this process's memory."""
    import torch

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    print("imported", flush=True)
    sys.stdin.readline()
    from gptfast.device import parse_device
    from gptfast.loading import load

    model = load(Path(task["folder"]), task["dtype"], parse_device(task["device"]))
    print("loaded", flush=True)
    sys.stdin.readline()
    del model


if __name__ == "__main__":
    {"first_token": first_token, "import_torch": import_torch, "load": load}[sys.argv[1]](
        json.loads(sys.argv[2])
    )
