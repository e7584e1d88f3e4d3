"""Tensor parallel: what several ranks say is what one process says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, VOCAB, raw_config, write_checkpoint
from parallel_worker import run_job
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor

from gptfast import LLM
from gptfast.commands import main
from gptfast.families import model_config
from gptfast.hub import find_model
from gptfast.sharding import possible_sizes

WORKER = str(Path(__file__).parent / "parallel_worker.py")
# One of each class that the work of ranks differs for, through gloo itself.
CLASSES = (
    "llama-",
    "gpt2-",
    "gpt_neox-",
    "mixtral-",
    "qwen3_moe-",
    "gemma2-",
    "falcon-",
    "deepseek_v2-",
    "olmo2-",
)
IDS = [(7 * place + 3) % (VOCAB - 3) + 3 for place in range(21)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
Job = dict[str, Any]


def run(folder: Path, size: int, jobs: dict[str, Job], **env: str) -> dict[str, Any]:
    """What rank 0 of so many found of each job; under "ranks", the facts of every rank."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    for rank, said in enumerate(run_ranks(size, [WORKER, str(folder)], timeout=240, env=env)):
        assert said.returncode == 0, f"rank {rank}: {said.stderr}"
        assert rank == 0 or said.stdout == ""
    results = torch.load(folder / "results.pt", weights_only=False)
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    for fact in facts:
        assert fact["calls"] == facts[0]["calls"]
        assert fact["held"] <= 8  # of all the models and caches that were made: the latest
    return results | {"ranks": facts}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    written: dict[str, str] = {}

    def checkpoint(name: str) -> str:
        if name not in written:
            folder = tmp_path_factory.mktemp("parallel") / name
            written[name] = str(write_checkpoint(folder, name))
        return written[name]

    return checkpoint


def sizes_of(name: str) -> list[int]:
    return possible_sizes(model_config(raw_config(name)), most=4)


# -- every family --


@pytest.fixture(scope="module", params=[2, 4])
def families(
    request: pytest.FixtureRequest,
    checkpoints: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, dict[str, Any]]:
    """All families that so many ranks can share, through common memory."""
    size = request.param
    jobs = {
        name: {
            "model": checkpoints(name),
            "llm": {"dtype": "fp32"},
            "logits": IDS,
            "generate": [[IDS[:5], IDS[5:7]], [GREEDY, GREEDY]],
        }
        for name in CASES
        if size in sizes_of(name)
    }
    return size, run(tmp_path_factory.mktemp("families"), size, jobs)


def test_every_family_can_be_shared(families: tuple[int, dict[str, Any]]) -> None:
    size, found = families
    shared = {name.split("-")[0] for name in found}
    missing = {name.split("-")[0] for name in CASES} - shared
    assert missing <= set(), f"{size} ranks"


@pytest.mark.parametrize("name", CASES)
def test_families(
    families: tuple[int, dict[str, Any]], checkpoints: Callable[[str], str], name: str
) -> None:
    """Logits but for the order of sums, and greedy tokens; a batch of two rows, decoded by the
    fused step where the family has it.
    """
    size, found = families
    if size not in sizes_of(name):
        pytest.skip(f"{size} ranks cannot share its heads or hidden units")
    job: Job = {"model": checkpoints(name), "llm": {"dtype": "fp32"}, "logits": IDS}
    job["generate"] = [[IDS[:5], IDS[5:7]], [GREEDY, GREEDY]]
    alone = run_job(job)
    torch.testing.assert_close(found[name]["logits"], alone["logits"], atol=2e-5, rtol=1e-4)
    assert found[name]["outputs"] == alone["outputs"]
    assert found[name]["has_step"] == alone["has_step"]


@pytest.mark.parametrize("size", [2, 4])
def test_through_gloo(checkpoints: Callable[[str], str], tmp_path: Path, size: int) -> None:
    """The same without common memory, as on several hosts: sums go through gloo."""
    names = [next(n for n in CASES if n.startswith(c) and size in sizes_of(n)) for c in CLASSES]
    jobs: dict[str, Job] = {
        name: {
            "model": checkpoints(name),
            "llm": {"dtype": "fp32"},
            "logits": IDS,
            "generate": [[IDS[:5]], [GREEDY]],
        }
        for name in names
    }
    found = run(tmp_path, size, jobs, GPTFAST_NO_SHARED_MEMORY="1")
    assert not any(rank["shared"] for rank in found["ranks"])
    for name, job in jobs.items():
        alone = run_job(job)
        torch.testing.assert_close(found[name]["logits"], alone["logits"], atol=2e-5, rtol=1e-4)
        assert found[name]["outputs"] == alone["outputs"]


# -- every feature --

STORY = "storyteller"
LONG = {"temperature": 0.0, "max_new_tokens": 40}
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 30}
PROMPTS = ["Once upon a time", "One day, a little cat", "The dog and the ball"]


def story(*params: Job, **llm: Any) -> Job:
    prompts = PROMPTS[: len(params)]
    return {"model": STORY, "llm": {"dtype": "fp32", **llm}, "generate": [prompts, list(params)]}


FEATURES: dict[str, Job] = {
    "greedy": story(LONG),
    "rows": story(LONG, LONG, LONG),
    "rows in turns": story(LONG, LONG, LONG, batch_size=2),
    "sampled": story({**SAMPLED, "seed": 5}, {**SAMPLED, "seed": 6}, LONG),
    "logprobs": story({**LONG, "logprobs": 3}, LONG),
    "stops": story({**LONG, "stop": ["."]}, {**LONG, "stop": [" big"]}),
    "int8 cache": story(LONG, kv_cache_dtype="int8"),
    "two samples": story({**SAMPLED, "seed": 3, "n": 2}),
    "long prompt": {
        "model": STORY,
        "llm": {"dtype": "fp32", "max_seq_len": 500},
        "generate": [[[(7 * i) % 2000 + 5 for i in range(470)]], [{**LONG, "ignore_eos": True}]],
    },
    "left": story(LONG) | {"close_after": 5},
    "score": {"model": STORY, "llm": {"dtype": "fp32"}, "score": list(range(5, 100))},
    "ngram": story(LONG, LONG, draft="ngram", speculate_k=3),
    "draft": story(LONG, LONG, draft="storyteller-draft", speculate_k=4),
    "adaptive": story(LONG, draft="storyteller-draft"),
    "layers": story(LONG, LONG, draft="layers:2", speculate_k=2),
    "coarser": story(LONG, draft="int4", speculate_k=5),
    "drawn draft": story({**SAMPLED, "seed": 5}, draft="storyteller-draft", speculate_k=3),
}
# Speculation says what plain decoding does; of what is drawn from drafts only the odds are equal.
SAME_AS = {"ngram": "rows", "draft": "rows", "adaptive": "greedy", "layers": "rows"} | {
    "coarser": "greedy"
}


@pytest.fixture(scope="module", params=[2, 4])
def features(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("features"), request.param, FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_features(features: dict[str, Any], name: str) -> None:
    found, alone = features[name], run_job(FEATURES[name])
    if "nats" in alone:
        assert found["nats"] == pytest.approx(alone["nats"], abs=1e-5)
        return
    if "logprobs" in FEATURES[name]["generate"][1][0]:
        for ours, theirs in zip(found["logprobs"][0], alone["logprobs"][0], strict=True):
            assert ours["token_id"] == theirs["token_id"]
            assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
            assert ours["top"].keys() == theirs["top"].keys()
    assert found["outputs"] == alone["outputs"]
    assert found.get("left") == alone.get("left") and found.get("again") == alone.get("again")
    if name in SAME_AS:
        assert found["accepted"] > 0 or name == "adaptive"  # which may find that it does not pay
        plain = features[SAME_AS[name]]["outputs"][: len(found["outputs"])]
        assert found["outputs"] == plain


def test_features_together(tmp_path: Path) -> None:
    """Rows that speculate over a quantized target and 8-bit cache, compiled: the tokens of plain
    decoding of the same on as many ranks.
    """
    how = {"quant": "int8", "kv_cache_dtype": "int8"}
    draft = {"draft": "storyteller-draft", "draft_quant": "int8", "speculate_k": 3}
    jobs = {
        "plain": story(LONG, LONG, **how),
        "draft": story(LONG, LONG, **how, **draft),
        "compiled": story(LONG, LONG, **how, **draft, compile=True),
        "coarser": story(LONG, LONG, **how, draft="int4", speculate_k=3, compile=True),
    }
    found = run(tmp_path, 2, jobs)
    for name in ("draft", "compiled", "coarser"):
        assert found[name]["outputs"] == found["plain"]["outputs"]
        assert found[name]["accepted"] > 0


def test_a_draft_with_fewer_ids(tmp_path: Path) -> None:
    """Whose likeliest token is found among its own ids alone."""
    bundled, draft = find_model("storyteller-draft"), tmp_path / "draft"
    shutil.copytree(bundled, draft)
    weights = load_file(bundled / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:2041].contiguous()
    save_file(weights, draft / "model.safetensors", {"format": "pt"})
    raw = json.loads((bundled / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(raw | {"vocab_size": 2041}))
    jobs = {"plain": story(LONG, LONG), "draft": story(LONG, LONG, draft=str(draft), speculate_k=3)}
    found = run(tmp_path, 2, jobs)
    assert found["draft"]["outputs"] == found["plain"]["outputs"] and found["draft"]["accepted"] > 0


def test_of_equal_logits_the_first_wins(tmp_path: Path) -> None:
    """Those of other ranks among them, as in one process."""
    folder = tiny_llama(tmp_path / "model", **SHAPE)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    job: Job = {"model": str(folder), "llm": {"dtype": "fp32"}}
    job["generate"] = [[IDS[:5]], [GREEDY]]
    found = run(tmp_path, 2, {"job": job})
    assert set(found["job"]["outputs"][0]["token_ids"]) == {0}


def test_ranks_that_round_differently_and_are_late(tmp_path: Path) -> None:
    """Rank 0 decides alone: sums that differ by per cents from rank to rank and ranks that are late
    change what is said, not that all ranks read the same tokens at the same places (see `run`).
    """
    names = ("greedy", "sampled", "stops", "ngram", "draft", "layers", "adaptive", "left")
    tmp_path.joinpath("disturb").touch()
    found = run(tmp_path, 2, {name: FEATURES[name] for name in names})
    calls = found["ranks"][1]["calls"]
    assert len(calls) > 100
    assert found["greedy"]["outputs"] != run_job(FEATURES["greedy"])["outputs"]


# -- quantized --

SHAPE = {  # of which 2 and 4 ranks have whole groups of 32
    "vocab_size": 301,  # of which they have unequal parts
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FORMATS = ("int8", "int4", "int4-g32-asym", "int8-g32", "int8-dynamic", "fp8", "mxfp4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("quantized") / "plain", **SHAPE)


@pytest.fixture(scope="module")
def stored(plain: Path) -> dict[str, Path]:
    """The same in every format, as `gptfast quantize` writes it."""
    folders = {form: plain.parent / form for form in FORMATS}
    for form, folder in folders.items():
        assert main(["quantize", str(plain), str(folder), "--method", "rtn", "--format", form]) == 0
    return folders


@pytest.fixture(scope="module", params=[2, 4])
def quantized(
    request: pytest.FixtureRequest,
    plain: Path,
    stored: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    jobs = {}
    for form, folder in stored.items():
        jobs[form] = quantized_job(folder)
        jobs[f"{form} at load"] = quantized_job(plain, quant=form)
    return run(tmp_path_factory.mktemp("ranks"), request.param, jobs)


def quantized_job(folder: Path, **llm: Any) -> Job:
    llm = {"dtype": "fp32", **llm}
    return {"model": str(folder), "llm": llm, "logits": IDS, "generate": [[IDS[:5]], [GREEDY]]}


@pytest.mark.parametrize("form", FORMATS)
def test_stored_quantized(
    quantized: dict[str, Any], plain: Path, stored: dict[str, Path], form: str
) -> None:
    """One file for every number of ranks: the numbers of one process."""
    ours, alone = quantized[form], run_job(quantized_job(stored[form]))
    if "dynamic" not in form:
        torch.testing.assert_close(ours["logits"], alone["logits"], atol=2e-5, rtol=1e-4)
        assert ours["outputs"] == alone["outputs"]
        return
    # A rank rounds its own part of the activations, by a scale of its own.
    exact = run_job(quantized_job(plain))["logits"]
    assert 0 < rms(ours["logits"] - exact) < 1.1 * rms(alone["logits"] - exact)


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_at_load(quantized: dict[str, Any], plain: Path, form: str) -> None:
    """A scale of a whole row is one of a row and rank, so the error is no larger. Groups are those
    of one process; of two scales that are equally good the search may find the other.
    """
    ours = quantized[f"{form} at load"]["logits"]
    alone = run_job(quantized_job(plain, quant=form))["logits"]
    exact = run_job(quantized_job(plain))["logits"]
    assert 0 < rms(ours - exact) < 1.1 * rms(alone - exact)
    if "-g32" in form or form in ("int4", "mxfp4"):
        assert rms(ours - alone) < 0.05 * rms(alone - exact)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# -- experts, compilation, memory, and what cannot be done --


def test_whole_experts_on_each_rank(checkpoints: Callable[[str], str], tmp_path: Path) -> None:
    names = [next(n for n in CASES if n.startswith(c)) for c in ("mixtral-", "qwen3_moe-")]
    names += [next(n for n in CASES if n.startswith(c)) for c in ("deepseek_v2-", "gpt_oss-")]
    jobs: dict[str, Job] = {
        name: {
            "model": checkpoints(name),
            "llm": {"dtype": "fp32", "expert_parallel": True},
            "logits": IDS,
            "generate": [[IDS[:5], IDS[5:7]], [GREEDY, GREEDY]],
        }
        for name in names
    }
    found = run(tmp_path, 2, jobs)
    for name, job in jobs.items():
        alone = run_job(job)
        torch.testing.assert_close(found[name]["logits"], alone["logits"], atol=2e-5, rtol=1e-4)
        assert found[name]["outputs"] == alone["outputs"]


@pytest.mark.parametrize("shared", [True, False])
def test_compiled(checkpoints: Callable[[str], str], tmp_path: Path, shared: bool) -> None:
    """A family with a fused step, whose prompts are compiled, and one whose steps are, too."""
    jobs: dict[str, Job] = {
        f"{name} {how}": {
            "model": checkpoints(name),
            "llm": {"dtype": "fp32", "compile": how == "compiled"},
            "generate": [[IDS[:7], IDS[5:17]], [GREEDY, {**GREEDY, "logprobs": 2}]],
        }
        for name in ("llama-gqa", "olmo2-post-norm" if shared else "mixtral-top2")
        for how in ("eager", "compiled")
    }
    env = {} if shared else {"GPTFAST_NO_SHARED_MEMORY": "1"}
    found = run(tmp_path, 2, jobs, **env)
    for name in jobs:
        eager = found[name.replace("compiled", "eager")]
        assert found[name]["outputs"] == eager["outputs"]
        for ours, theirs in zip(found[name]["logprobs"][1], eager["logprobs"][1], strict=True):
            assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_memory_of_a_rank(tmp_path: Path) -> None:
    """Its share of the weights, and little else."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 2000}
    folder = tiny_llama(tmp_path / "model", **sizes, **heads)
    job: Job = {"model": str(folder), "llm": {"dtype": "bf16"}, "keep": True}
    job["generate"] = [[IDS[:5]], [GREEDY]]
    whole = run(tmp_path, 1, {"job": job})
    halves = run(tmp_path, 2, {"job": job})
    weights = whole["job"]["bytes"] + 2000 * 1024 * 2  # the embedding is not read whole
    [alone] = (rank["memory"]["after"] - rank["memory"]["before"] for rank in whole["ranks"])
    assert weights < alone < weights + 40e6
    for rank in halves["ranks"]:
        assert rank["memory"]["after"] - rank["memory"]["before"] < weights / 2 + 40e6
    assert halves["job"]["bytes"] == pytest.approx(whole["job"]["bytes"] / 2, rel=0.01)


def test_the_poorest_rank_decides_on_the_context(tmp_path: Path) -> None:
    """A slot of the storyteller takes 2 KiB of each of two ranks, the rest of a row 18 KiB. Ranks
    of a host share its memory, of which a tenth is left for other things.
    """
    tmp_path.joinpath("poor").write_text(str(2 * 320_000))
    job: Job = {"model": STORY, "llm": {"dtype": "fp32"}}
    found = run(tmp_path, 2, {"job": job, "asked": job | {"llm": {"max_seq_len": 400}}})
    assert found["job"]["context"] == (0.9 * 320_000 - 9 * 2048 - 2048) // 2048
    assert found["job"]["peak"] == 10**15
    assert "rank" not in found["asked"]["error"] and "400 tokens needs" in found["asked"]["error"]


def test_what_cannot_be_shared(checkpoints: Callable[[str], str], tmp_path: Path) -> None:
    """The ranks stay for the next model."""
    good = {"model": STORY, "llm": {"dtype": "fp32"}, "generate": [PROMPTS[:1], [GREEDY]]}
    jobs = {
        "too many": {"model": STORY, "llm": {"tensor_parallel_size": 4}},
        "heads": {"model": str(tiny_llama(tmp_path / "nine", **NINE_HEADS))},
        "context": {"model": STORY, "llm": {"max_seq_len": 100000}},
        "missing": {"model": str(tmp_path / "nowhere")},
        "good": good,
    }
    found = run(tmp_path, 2, jobs)
    errors = {name: found[name]["error"] for name in jobs if name != "good"}
    assert "tensor_parallel_size is 4, and there are 2 processes" in errors["too many"]
    assert "2 ranks cannot share 9 query heads" in errors["heads"]
    assert "3" in errors["heads"] and "max_seq_len is 100000" in errors["context"]
    assert found["good"]["outputs"] == run_job(good)["outputs"]


NINE_HEADS = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}


def test_more_processes_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"there are 1 processes; start 2 with torchrun"):
        LLM(STORY, tensor_parallel_size=2)


@pytest.mark.parametrize("size", [2, 4])
def test_golden_stories(shared_data: Path, tmp_path: Path, size: int) -> None:
    """Tokens that another implementation has written down; plain, and speculating."""
    folder = shared_data / "checkpoints"
    golden = json.loads((folder / "stories260K-golden" / "golden_greedy.json").read_text())["cases"]
    counts = [len(case["token_ids"]) - len(case["prompt_ids"]) for case in golden]
    params = [{**GREEDY, "max_new_tokens": count} for count in counts]
    job: Job = {"model": str(folder / "stories260K-hf"), "llm": {"dtype": "fp32"}}
    job["generate"] = [[case["prompt"] for case in golden], params]
    ngram = {"dtype": "fp32", "draft": "ngram", "speculate_k": 4}
    found = run(tmp_path, size, {"plain": job, "ngram": job | {"llm": ngram}})
    for name in ("plain", "ngram"):
        for output, case in zip(found[name]["outputs"], golden, strict=True):
            assert case["prompt_ids"] + output["token_ids"] == case["token_ids"]
