"""What the ranks of tests/test_parallel.py run: jobs from a file, their results to a file.

Also imported by the tests, which do the same jobs in one process: `run_job`.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import LLM, SamplingParams, capacity, parallel, together
from gptfast.cached import CachedModel
from gptfast.follower import follow
from gptfast.parallel import Group

FIELDS = ("token_ids", "text", "finish_reason")
kept: list[LLM] = []


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"model": .., "llm": {..}, "logits": ids, "generate": [prompts, params], ..} -> what came of
    each; "error" where the model could not be had.
    """
    try:
        llm = LLM(job["model"], **job.get("llm", {}))
    except (ValueError, MemoryError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {}
    if "logits" in job:
        found["logits"] = llm.logits(job["logits"])
    if "generate" in job:
        prompts, params = job["generate"]
        outputs = llm.generate(prompts, [SamplingParams(**each) for each in params])
        found["outputs"] = [{name: getattr(o, name) for name in FIELDS} for o in outputs]
        found["logprobs"] = [
            None if o.logprobs is None else [vars(item) for item in o.logprobs] for o in outputs
        ]
        speculation = llm.engine.speculation
        found["accepted"] = None if speculation is None else speculation.accepted
        found["has_step"] = llm.engine.runner.main.step is not None
    if "close_after" in job:  # a stream that its reader leaves
        prompts, params = job["generate"]
        stream = llm.stream(prompts[0], SamplingParams(**params[0]))
        found["left"] = [next(stream).token_ids for _ in range(job["close_after"])]
        stream.close()
        found["again"] = llm.generate(prompts[0], SamplingParams(**params[0]))[0].token_ids
    if "score" in job:
        from gptfast.evaluation import measure_perplexity, strided

        windows = strided(job["score"], 32, 16)
        found["nats"] = measure_perplexity(llm.model, windows).nats_per_token
    if "chat" in job:
        messages = [{"role": "user", "content": job["chat"]}]
        found["answer"] = llm.chat(messages, SamplingParams(**job["params"])).text
    found["peak"] = llm.run_stats([]).peak_memory_bytes
    found["bytes"], found["context"] = llm.model.bytes_per_step, llm.engine.max_seq_len
    if job.get("keep"):
        kept.append(llm)
    return found


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Record:
    """What a rank reads: tokens and positions of every step and piece."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any], list[Any]]] = []
        for name in ("_step", "_read"):
            setattr(CachedModel, name, self._recorded(name, getattr(CachedModel, name)))

    def _recorded(self, name: str, method: Any) -> Any:
        def call(model: CachedModel, tokens: Tensor, positions: Tensor, *rest: Any) -> Any:
            if not model.group.is_alone:
                self.calls.append((name, tokens.tolist(), positions.tolist()))
            return method(model, tokens, positions, *rest)

        return call


def disturb(group: Group) -> None:
    """Sums that differ from rank to rank by some per cent, and ranks that are late at random."""
    exact, chance = Group.all_reduce, random.Random(group.rank)
    generator = torch.Generator().manual_seed(group.rank)

    def all_reduce(self: Group, x: Tensor) -> Tensor:
        time.sleep(chance.random() * 0.003)
        noise = torch.randn(x.shape, generator=generator) * 0.05
        return exact(self, x) * (1 + noise)

    Group.all_reduce = all_reduce  # type: ignore[method-assign]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    jobs = json.loads((folder / "jobs.json").read_text())
    group = parallel.start()
    record, before = Record(), anonymous_bytes()
    if (folder / "disturb").exists():
        disturb(group)
    if (folder / "poor").exists() and group.rank == 1:
        capacity.free_memory = lambda device: int((folder / "poor").read_text())
        capacity.peak_memory = lambda device: 10**15  # and it has used most
    if group.rank > 0:
        follow(group)
    else:
        results = {name: run_job(job) for name, job in jobs.items()}
        torch.save(results, folder / "results.pt")
    memory = {"before": before, "after": anonymous_bytes()}
    facts = {"calls": record.calls, "memory": memory, "shared": group.shared >= 0}
    facts["held"] = len(together._held)
    (folder / f"rank{group.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
