"""One contestant of bench/peers.py in a process of its own: builds it, says when its first token
was there, then does what each line asks until the lines end. Lines and answers are JSON.

Imports only the engine that it is told to run: the others' memory and starting time are not its.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

# A contestant from the task of a worker. An engine is imported only where it runs.


def _ours(task: dict[str, Any]) -> Any:
    from peer_torch import Ours

    return Ours(Path(task["path"]), task["threads"], task["max_seq_len"], task["compile"])


def _theirs(task: dict[str, Any]) -> Any:
    from peer_torch import Theirs

    return Theirs(Path(task["path"]), task["threads"], task["compile"])


def _llama(task: dict[str, Any]) -> Any:
    from peer_llama import LlamaCpp

    return LlamaCpp(Path(task["path"]), task["threads"], task["max_seq_len"])


def _openvino(task: dict[str, Any]) -> Any:
    from peer_openvino import OpenVino

    return OpenVino(Path(task["path"]), task["threads"])


ENGINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gptfast": _ours,
    "transformers": _theirs,
    "llama.cpp": _llama,
    "openvino": _openvino,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    task = json.loads(sys.argv[1])
    try:
        contestant = ENGINES[task["engine"]](task)
        contestant.run(range(1, 1 + task["prompt_tokens"]), 1)
        answer(
            first_token_at=monotonic(),
            version=contestant.version,
            step_bytes=getattr(contestant, "step_bytes", None),
        )
        for line in sys.stdin:
            answer(**_do(contestant, task["vocab_size"], **json.loads(line)))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def _do(
    contestant: Any,
    vocab_size: int,
    do: str,
    new: int = 0,
    length: int = 0,
    room: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """`length` tokens are drawn from `seed`: the same for every contestant."""
    prompt = random.Random(seed).choices(range(vocab_size), k=length)
    if do == "hold":
        contestant.hold(prompt, room)
        return {}
    tokens, times = contestant.run(prompt, new) if do == "run" else contestant.resume(new)
    return {"tokens": tokens, "times": times}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
