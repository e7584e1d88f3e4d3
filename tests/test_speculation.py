"""Speculative decoding: whatever drafts, at whatever length, the text is that of plain decoding,
and where it is drawn, its distribution.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, write_checkpoint
from test_engine import (
    GREEDY,
    LONGROPE,
    Result,
    finish,
    lively_gpt2,
    lively_llama,
    random_prompt,
    run,
    take,
)
from tiny import tiny_llama
from torch import Tensor

from gptfast.engine import Engine
from gptfast.llm import LLM
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.runner import ModelRunner
from gptfast.sampling import (
    PURPOSE_SAMPLE,
    SamplingParams,
    SamplingState,
    draw,
    probabilities,
    uniform,
)
from gptfast.speculation.accept import PURPOSE_DRAFT
from gptfast.speculation.drafts import Draft, NgramDrafter, Text
from gptfast.speculation.speculator import Speculator

PROMPTS = [
    "Once upon a time",
    "The little dog wanted to",
    "Lily and Tom went to the park. Lily said",
    "Ben had a red ball. Ben had a",
]
STORY = SamplingParams(temperature=0, max_new_tokens=40)


MIXED = [
    SamplingParams(temperature=0.8, seed=3, max_new_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0.0, max_new_tokens=25, ignore_eos=True),
    SamplingParams(
        temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=5, max_new_tokens=25, top_k=20
    ),
    SamplingParams(temperature=0.0, frequency_penalty=0.7, max_new_tokens=25, ignore_eos=True),
]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled engines run their graphs as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def ids_of(llm: LLM, prompts: list[Any], params: Any) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, params)]


# -- temperature 0: the same tokens --

# Every value of a column stands beside most values of the others.
STORYTELLER = [
    # draft, k, rows, dtype, target, cache, compile
    ("storyteller-draft", 1, 1, "fp32", None, "auto", False),
    ("storyteller-draft", 2, 4, "bf16", "int4", "auto", False),
    ("storyteller-draft", 5, 1, "bf16", None, "int8", True),
    ("storyteller-draft", 8, 4, "fp32", "int8", "auto", True),
    ("storyteller-draft", None, 1, "bf16", "int8-dynamic", "auto", False),
    ("ngram", 1, 4, "bf16", "int8", "int8", True),
    ("ngram", 3, 1, "fp32", "int4", "auto", True),
    ("ngram", 8, 1, "bf16", None, "auto", False),
    ("ngram", None, 4, "fp32", None, "auto", False),
    ("int4", 4, 1, "bf16", None, "auto", True),
    ("int4", 7, 1, "fp32", "int8", "int8", False),
    ("int4-dynamic", 3, 4, "bf16", None, "auto", False),
    ("int8", None, 1, "bf16", None, "auto", False),
    ("layers:1", 2, 1, "bf16", "int4", "int8", False),
    ("layers:2", 6, 1, "bf16", "int8", "auto", True),
    ("layers:3", 3, 4, "fp32", None, "auto", False),
    ("storyteller", 15, 1, "bf16", None, "auto", False),
]


@pytest.mark.parametrize("case", STORYTELLER, ids=lambda case: "-".join(map(str, case)))
def test_storyteller_says_what_it_says_without_a_draft(
    case: tuple[Any, ...], no_compiler: None
) -> None:
    draft, k, rows, dtype, quant, cache, compile = case
    facts = {"dtype": dtype, "quant": quant, "kv_cache_dtype": cache, "batch_size": rows}
    expected = ids_of(LLM("storyteller", **facts), PROMPTS, STORY)
    llm = LLM("storyteller", **facts, compile=compile, draft=draft, speculate_k=k)
    assert ids_of(llm, PROMPTS, STORY) == expected
    stats = llm.engine.speculation
    assert stats is not None
    numbers = stats.as_dict()
    assert numbers["accepted"] <= numbers["drafted"]
    if k is not None and draft != "ngram":
        assert numbers["accepted"] > 0
    if draft == "storyteller":
        assert numbers["accepted"] == numbers["drafted"] > 0, "it says what the target says"


def test_golden_stories(shared_data: Path) -> None:
    folder = shared_data / "checkpoints"
    golden = json.loads((folder / "stories260K-golden" / "golden_greedy.json").read_text())
    cases = golden["cases"]
    params = [
        replace(STORY, max_new_tokens=len(case["token_ids"]) - len(case["prompt_ids"]))
        for case in cases
    ]
    for draft, k in (("ngram", 4), ("layers:3", 3), ("int4", 5)):
        model = folder / "stories260K-hf"
        llm = LLM(model, device="cpu", dtype="fp32", draft=draft, speculate_k=k)
        outputs = llm.generate([case["prompt"] for case in cases], params)
        assert [o.prompt + o.text for o in outputs] == [case["text"] for case in cases]


# Whatever parts a model has: some have no fused step (experts, latents), some windows or slopes.
FAMILIES = [
    ("gpt2-", "layers:1", 3, 2),
    ("gemma2-", "ngram", 4, 1),
    ("gemma3_text-", "layers:1", 5, 1),
    ("qwen3_moe-", "layers:1", 2, 3),
    ("mixtral-", "ngram", 8, 2),
    ("deepseek_v3-", "layers:2", 4, 1),
    ("gpt_oss-", "layers:1", 7, 1),
    ("bloom-", "ngram", 2, 4),
    ("falcon-", "layers:1", 1, 2),
    ("olmo2-", "int4-g16", 6, 1),
    ("mpt-", "int8", 3, 1),
]


@pytest.mark.parametrize(("family", "draft", "k", "rows"), FAMILIES)
def test_every_kind_of_model(
    tmp_path: Path, family: str, draft: str, k: int, rows: int, no_compiler: None
) -> None:
    name = next(name for name in CASES if name.startswith(family))
    folder = write_checkpoint(tmp_path, name)
    prompts = [random_prompt(length) for length in (9, 3, 20, 1)]
    params = replace(GREEDY, max_new_tokens=20)
    expected = ids_of(LLM(folder, dtype="fp32", batch_size=rows), prompts, params)
    for compile in (False, True):
        llm = LLM(
            folder, dtype="fp32", batch_size=rows, compile=compile, draft=draft, speculate_k=k
        )
        assert ids_of(llm, prompts, params) == expected


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Draft]:
    """A random target, and a random draft that is nearly always wrong, with a shorter context."""
    folder = tmp_path_factory.mktemp("pair")
    target = lively_llama(folder / "target")
    draft = lively_llama(folder / "draft", context=600, num_hidden_layers=1, hidden_size=16)
    return target, Draft("wrong", draft)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_a_batch_of_prompts_with_a_draft_that_is_wrong(
    pair: tuple[Transformer, Draft], lag: int, k: int | None
) -> None:
    """Long and short prompts, rows that end at different times and are filled again, beyond the
    draft's context too. With a lag of 1 the host reads one step behind, as it does on CUDA.
    """
    target, draft = pair
    work = [
        (random_prompt(length), replace(GREEDY, max_new_tokens=1 + 7 * number % 23))
        for number, length in enumerate((1, 2, 40, 513, 590, 700, 1100, 3))
    ]
    expected = [result.token_ids for result in run(Engine(target, 3), *work)]
    engine = Engine(target, 3, draft=draft, speculate_k=k)
    engine._lag = lag
    for _ in range(2):  # the second time, prefixes are in both caches
        results = run(engine, *work)
        assert [result.token_ids for result in results] == expected
        assert all(len(r.stats.token_times) == len(r.token_ids) for r in results if r.stats)
    assert not engine.has_work


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", ["same", "layers", "ngram"])
def test_runs_that_are_accepted_whole(llama: Transformer, kind: str, lag: int) -> None:
    """A draft that is always right, and text that repeats itself for ever."""
    drafts = {"same": Draft("same", llama), "layers": Draft("all", llama, shares_cache=True)}
    draft = drafts.get(kind, Draft("ngram", None))
    params = replace(GREEDY, max_new_tokens=45)
    if kind == "ngram":
        params = replace(params, logit_bias={7: 90.0})
    work = [(random_prompt(length), params) for length in (5, 17, 2)]
    expected = [result.token_ids for result in run(Engine(llama, 3), *work)]
    engine = Engine(llama, 3, draft=draft, speculate_k=4)
    engine._lag = lag
    assert [result.token_ids for result in run(engine, *work)] == expected
    assert engine.speculation is not None
    numbers = engine.speculation.as_dict()
    assert numbers["accepted"] > 0.8 * numbers["drafted"]
    assert numbers["mean_accepted_length"] > 3.5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return lively_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def right(llama: Transformer) -> Draft:
    return Draft("right", llama)


def test_a_draft_of_another_kind_of_model(tmp_path: Path, llama: Transformer) -> None:
    """GPT-2 drafts for Llama: what they share is the vocabulary."""
    draft = Draft("gpt2", lively_gpt2(tmp_path))
    work = (random_prompt(30), replace(GREEDY, max_new_tokens=30))
    [expected] = run(Engine(llama), work)
    [result] = run(Engine(llama, draft=draft, speculate_k=3), work)
    assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("size", [80, 128])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_whose_vocabulary_is_of_another_size(
    tmp_path: Path, llama: Transformer, size: int, temperature: float
) -> None:
    """Models of one family round the size of their one tokenizer up to different numbers."""
    draft = Draft("other", lively_llama(tmp_path, vocab_size=size))
    params = replace(GREEDY, max_new_tokens=30, temperature=temperature, seed=1)
    prompt = [token for token in random_prompt(30) if token < 80]
    [result] = run(Engine(llama, draft=draft, speculate_k=3), (prompt, params))
    assert len(result.token_ids) == 30 and max(result.token_ids) < 96
    if temperature == 0:
        [expected] = run(Engine(llama), (prompt, params))
        assert result.token_ids == expected.token_ids


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps as CUDA graphs run them: what a key's function was when it was first called is called
    again, and its results lie where they lay then. Returns the keys.
    """
    keys: list[Any] = []

    def replay(self: ModelRunner, key: Any, function: Callable[[], Any], group: Any = None) -> Any:
        graphs = self.__dict__.setdefault("graphs", {})
        if key not in graphs:
            keys.append(key)
            graphs[key] = function, function()
        else:
            for old, new in zip(graphs[key][1], graphs[key][0](), strict=True):
                if old is not None:
                    old.copy_(new)
        results = graphs[key][1]
        # What the host reads was copied to it before the next step.
        return results if key[0] == "draft" else tuple(each.clone() for each in results)

    monkeypatch.setattr(ModelRunner, "replay", replay)
    return keys


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", ["wrong", "right", "layers", "ngram"])
def test_rounds_that_are_replayed(
    llama: Transformer, pair: tuple[Transformer, Draft], captured: list[Any], kind: str, lag: int
) -> None:
    """Nothing of a round but its plan, its length and the bound of a cache stays in its graph."""
    drafts = {
        "wrong": pair[1],
        "right": Draft("right", llama),
        "layers": Draft("all", llama, shares_cache=True),
        "ngram": Draft("ngram", None),
    }
    work = [(random_prompt(7 + 60 * number), replace(p, seed=1)) for number, p in enumerate(MIXED)]
    work += [(random_prompt(300), replace(GREEDY, max_new_tokens=40, logprobs=1))]
    engine = Engine(llama, 2, draft=drafts[kind], speculate_k=3)
    expected = [result.token_ids for result in run(engine, *work)]
    first = list(captured)
    again = Engine(llama, 2, draft=drafts[kind], speculate_k=3)
    again._lag = lag
    assert [result.token_ids for result in run(again, *work)] == expected
    plain = [result.token_ids for result in run(Engine(llama, 2), *work)]
    assert [expected[n] for n in (1, 3, 4)] == [plain[n] for n in (1, 3, 4)]
    assert len(set(first)) == len(first) and {key[0] for key in first} >= {"verify"}


@torch.no_grad()
@pytest.mark.parametrize("changing", [False, True])
def test_a_draft_holds_the_keys_of_the_text(llama: Transformer, changing: bool) -> None:
    """Also where a long prompt is read while another row decodes plainly, and where rounds that
    draft and plain steps alternate: the draft is the target, so their keys are the same.
    """
    engine = Engine(llama, 2, draft=Draft("right", llama))
    assert engine._speculator is not None
    controller, turns = engine._speculator._controller, itertools.count()
    k_of_round = (lambda: 4 * (next(turns) % 2)) if changing else (lambda: 4)
    results: dict[int, Result] = {}
    engine.submit(random_prompt(5), replace(GREEDY, max_new_tokens=60))
    take(engine, results)
    controller.choose = lambda kinds: 0  # type: ignore[method-assign]
    long = engine.submit(random_prompt(900), replace(GREEDY, max_new_tokens=40))
    take(engine, results)
    controller.choose = lambda kinds: k_of_round()  # type: ignore[method-assign]
    finish(engine, results)
    drafter: Any = engine._speculator._drafter
    text = random_prompt(900) + results[long].token_ids
    row = next(row for row, ids in enumerate(drafter._ids) if ids[:900] == text[:900])
    held = drafter._ids[row]
    assert len(held) > 930 and held == text[: len(held)]
    for ours, theirs in zip(engine.runner.cache.layers, drafter.model.cache.layers, strict=True):
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            used = slice(0, len(held))
            torch.testing.assert_close(mine[row, :, used], other[row, :, used])


def test_prompts_are_read_in_turns_by_the_draft_too(llama: Transformer) -> None:
    """At most a largest piece each, so that rows that decode wait a bounded time; and forgotten."""
    engine = Engine(llama, 2, draft=Draft("right", llama), speculate_k=2)
    assert engine._speculator is not None
    drafter: Any = engine._speculator._drafter
    engine.submit(random_prompt(1400), replace(GREEDY, max_new_tokens=4))
    for expected in (512, 1024, 1399):
        engine.step()
        assert len(drafter._ids[0]) + len(drafter._ids[1]) == expected
    finish(engine)
    engine.forget()
    assert drafter._ids == [[], []]


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_models_without_a_fused_step_with_the_host_one_round_behind(
    llama: Transformer, pair: tuple[Transformer, Draft], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the host says how far slots are used: texts that cross the bounds of 256 and 512."""
    monkeypatch.setattr("gptfast.cached.fused_step", lambda model, cache: None)
    draft = pair[1] if kind == "wrong" else Draft("right", llama)
    work = [
        (random_prompt(length), replace(GREEDY, max_new_tokens=20)) for length in (245, 500, 250)
    ]
    expected = [result.token_ids for result in run(Engine(llama, 2), *work)]
    engine = Engine(llama, 2, draft=draft, speculate_k=6)
    engine._lag = 1
    assert [result.token_ids for result in run(engine, *work)] == expected


# -- where texts end --


@pytest.mark.parametrize("lag", [0, 1])
def test_an_end_within_an_accepted_run(llama: Transformer, right: Draft, lag: int) -> None:
    """Nothing behind it is reported, and the next text in this row is not disturbed by it."""
    work = (random_prompt(6), replace(GREEDY, max_new_tokens=30))
    [whole] = run(Engine(llama), work)
    engine = Engine(llama, draft=right, speculate_k=6)
    engine._lag = lag
    for number in range(1, 16):
        first = whole.token_ids.index(whole.token_ids[number])
        stops = replace(work[1], stop_token_ids=[whole.token_ids[number]])
        [result] = run(engine, (work[0], stops))
        assert result.token_ids == whole.token_ids[: first + 1] and result.reason == "stop"
        assert result.stats is not None and result.stats.num_new_tokens == first + 1
    for number in range(1, 16):
        [result] = run(engine, (work[0], replace(work[1], max_new_tokens=number)))
        assert result.token_ids == whole.token_ids[:number] and result.reason == "length"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("draft", ["right", "wrong", "ngram", "layers"])
def test_the_end_of_the_context_within_a_run(
    llama: Transformer, pair: tuple[Transformer, Draft], draft: str, lag: int
) -> None:
    drafts = {
        "right": Draft("right", llama),
        "wrong": pair[1],
        "ngram": Draft("ngram", None),
        "layers": Draft("all", llama, shares_cache=True),
    }
    for context in (19, 20, 21, 22, 23):
        work = [(random_prompt(n), replace(GREEDY, max_new_tokens=None)) for n in (9, 17, context)]
        expected = run(Engine(llama, 2, context), *work)
        engine = Engine(llama, 2, context, draft=drafts[draft], speculate_k=5)
        engine._lag = lag
        for _ in range(2):
            results = run(engine, *work)
            assert [r.token_ids for r in results] == [r.token_ids for r in expected]
            assert [r.reason for r in results] == ["length"] * 3


def test_a_stop_string_within_an_accepted_run() -> None:
    """Tokens, text and statistics end where they end without a draft."""
    plain = LLM("storyteller")
    [whole] = plain.generate(PROMPTS[0], STORY)
    llm = LLM("storyteller", draft="storyteller", speculate_k=7)
    words = [word for word in whole.text.split(" ") if len(word) > 2][:12]
    for word in words:
        params = replace(STORY, stop=word)
        [expected], [output] = (each.generate(PROMPTS[0], params) for each in (plain, llm))
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert output.finish_reason == expected.finish_reason == "stop"
        assert output.stats.num_new_tokens == len(output.token_ids)
        assert not llm.engine.has_work


def test_a_stream_that_is_left_counts_what_it_gave() -> None:
    llm = LLM("storyteller", draft="storyteller", speculate_k=7)
    chunks = llm.stream(PROMPTS[0], STORY)
    taken = [next(chunks) for _ in range(3)]
    chunks.close()
    assert taken[0].stats.num_new_tokens == 3 and not llm.engine.has_work
    assert llm.engine.counters.num_tokens == 2  # the first came with the prompt
    [output] = llm.generate(PROMPTS[0], STORY)
    assert output.stats.num_new_tokens == len(output.token_ids) == 40


def test_cancelling_in_the_middle(llama: Transformer, right: Draft) -> None:
    engine = Engine(llama, 2, draft=right, speculate_k=4)
    params = replace(GREEDY, max_new_tokens=30)
    [expected] = run(Engine(llama), (random_prompt(8), params))
    first = engine.submit(random_prompt(8), params)
    second = engine.submit(random_prompt(11), params)
    results: dict[int, Result] = {}
    for _ in range(3):
        take(engine, results)
    engine.cancel(second)
    finish(engine, results)
    assert results[first].token_ids == expected.token_ids
    [again] = run(engine, (random_prompt(8), params))
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", ["right", "wrong", "layers", "ngram"])
def test_rotation_that_depends_on_the_length(
    tmp_path: Path, pair: tuple[Transformer, Draft], kind: str, lag: int
) -> None:
    """Where the rotation of a text changes, nothing is verified together; so it is plain decoding
    on the other side. (A row under way may have come less far than it could.)
    """
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    for name, context, scaling in (("longrope", 1200, LONGROPE), ("dynamic", 40, dynamic)):
        model = lively_llama(tmp_path / name, context=context, rope_scaling=scaling)
        assert model.config.max_reusable_length == 40 and model.config.max_seq_len >= 80
        drafts = {
            "right": Draft("right", model),
            "wrong": pair[1],
            "layers": Draft("all", model, shares_cache=True),
            "ngram": Draft("ngram", None),
        }
        work = [
            (random_prompt(length), replace(GREEDY, max_new_tokens=16))
            for length in (20, 26, 30, 33, 36, 38, 39, 40, 41, 60)
        ]
        for rows in (1, 3):
            expected = [result.token_ids for result in run(Engine(model, rows), *work)]
            engine = Engine(model, rows, draft=drafts[kind], speculate_k=4)
            engine._lag = lag
            assert [result.token_ids for result in run(engine, *work)] == expected


def test_the_memory_that_is_free_holds_the_cache_of_a_draft_too(
    llama: Transformer, right: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("capacity", "device"):
        monkeypatch.setattr(f"gptfast.{module}.free_memory", lambda device: 100_000)
    plain = Engine(llama).max_seq_len
    assert Engine(llama, draft=right).max_seq_len == pytest.approx(plain / 2, rel=0.01)
    shared = Draft("all", llama, shares_cache=True)
    assert Engine(llama, draft=shared).max_seq_len == plain


# -- what is reported --


def test_logprobs_are_those_of_plain_decoding(llama: Transformer, right: Draft) -> None:
    params = replace(GREEDY, max_new_tokens=20, logprobs=3)
    work = [(random_prompt(7), params), (random_prompt(12), replace(params, logprobs=None))]
    [expected, _] = run(Engine(llama, 2), *work)
    [result, other] = run(Engine(llama, 2, draft=right, speculate_k=3), *work)
    assert not other.logprobs and len(result.logprobs) == 20
    for ours, theirs in zip(result.logprobs, expected.logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert list(ours.top) == list(theirs.top)


def test_counters_count_tokens_and_rounds(llama: Transformer, right: Draft) -> None:
    engine = Engine(llama, draft=right, speculate_k=4)
    engine.warm_up([GREEDY])
    engine.reset_counters()
    [result] = run(engine, (random_prompt(7), replace(GREEDY, max_new_tokens=21)))
    assert len(result.token_ids) == 21
    assert engine.counters.num_tokens == 20 and engine.counters.num_steps == 4
    assert engine.speculation is not None
    numbers = engine.speculation.as_dict()
    assert (numbers["rounds"], numbers["drafted"], numbers["accepted"]) == (4, 16, 16)
    assert numbers["acceptance"] == 1 and numbers["acceptance_by_position"] == [1, 1, 1, 1]
    assert numbers["mean_accepted_length"] == 5
    assert numbers["draft_s"] > 0 and numbers["verify_s"] > 0 and numbers["speedup"] > 0


def test_tokens_beyond_the_budget_count_neither_for_nor_against_a_draft(
    llama: Transformer, right: Draft
) -> None:
    engine = Engine(llama, draft=right, speculate_k=6)
    run(engine, (random_prompt(7), replace(GREEDY, max_new_tokens=5)))
    assert engine.speculation is not None
    assert engine.speculation.as_dict()["acceptance"] == 1


# -- sampled: the same distribution --

SMALL = 6
DRAWS = 20_000
SAMPLED = {
    "plain": SamplingParams(temperature=1.2),
    "top_p and penalties": SamplingParams(
        temperature=0.9, top_p=0.85, repetition_penalty=1.4, frequency_penalty=0.3
    ),
    "all": SamplingParams(
        temperature=1.5,
        top_k=5,
        min_p=0.02,
        presence_penalty=0.6,
        logit_bias={1: 0.5, 4: -1.0},
    ),
}
PROMPT = [3, 1, 4, 1, 5, 2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Transformer]:
    """A target and a draft with so few tokens that texts of three can be counted."""
    folder = tmp_path_factory.mktemp("small")
    facts = {"vocab_size": SMALL, "bos_token_id": 1, "eos_token_id": 2}
    target = load(tiny_llama(folder / "target", **facts))
    draft = load(tiny_llama(folder / "draft", num_hidden_layers=1, **facts))
    return target, draft


class Adversary:
    """Proposes by distributions that have nothing to do with the target's: `choose` [B, V] -> the
    distribution of a place, from random numbers, or the target's own.
    """

    bytes_per_step, is_lookup = 0, False

    def __init__(self, runner: ModelRunner, choose: Callable[[int], Tensor]) -> None:
        self.runner, self.choose = runner, choose

    def start_row(self, row: int, prompt_ids: list[int]) -> None: ...
    def prefill(self, row: int, prompt_ids: list[int], num_read: int) -> None: ...
    def forget(self, row: int) -> None: ...
    def wants_texts(self, rows: Iterable[int]) -> bool:
        return False

    def look(self, texts: dict[int, Text], most: int) -> dict[int, tuple[int, int]]:
        return dict.fromkeys(texts, (0, most))

    def read(self, texts: dict[int, Text]) -> None: ...
    def rest(self) -> None: ...
    def draft(self, num_tokens: int, plan: str, num_used: int) -> tuple[Tensor, Tensor]:
        state, last = self.runner.sampling, self.runner.positions[:, 0]
        odds = torch.stack([self.choose(step) for step in range(num_tokens)])
        odds = odds[:, None].expand(-1, len(last), -1)
        drafted = [
            draw(each, uniform(state.seed, last + 1 + step, PURPOSE_DRAFT))
            for step, each in enumerate(odds)
        ]
        return torch.stack(drafted, dim=1), odds.transpose(0, 1).contiguous()

    warm_up = draft


def always_last(step: int) -> Tensor:
    return torch.eye(SMALL)[SMALL - 1]


def random_odds(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    odds = torch.rand(SMALL, generator=generator) ** 4
    return odds / odds.sum()


def expected_odds(model: Transformer, params: SamplingParams) -> Tensor:
    """[V, V, V]: the probability of each text of three tokens behind PROMPT, place by place through
    the uncached model.
    """

    def odds(prefixes: list[list[int]]) -> Tensor:
        ids = torch.tensor([PROMPT + prefix for prefix in prefixes])
        logits = model(ids, torch.arange(ids.size(1)).expand(ids.shape))[:, -1]
        state = SamplingState(len(prefixes), SMALL)
        for row, prefix in enumerate(prefixes):
            state.set_row(row, params, PROMPT, 0)
            for token in prefix:
                state.output_counts[row, token] += 1
        return probabilities(logits, state).double()

    every = range(SMALL)
    first = odds([[]])[0]
    second = odds([[a] for a in every])
    third = odds([[a, b] for a in every for b in every]).view(SMALL, SMALL, SMALL)
    return first[:, None, None] * second[:, :, None] * third


def drawn_texts(speculator: Speculator, runner: ModelRunner, params: SamplingParams) -> Tensor:
    """[rows, 3]: the first three tokens behind PROMPT of as many rows as the runner has."""
    num_rows = runner.cache.num_rows
    drafter = speculator._drafter
    for row in range(num_rows):
        runner.start_row(row, PROMPT, params, seed=drawn_texts.seed + row)
        speculator.start_row(row, PROMPT)
    drawn_texts.seed += num_rows
    runner.prefill(PROMPT[:-1], 0, 0)
    caches = [runner.cache]
    if hasattr(drafter, "model") and not drafter._shares_cache:
        drafter.model.prefill(PROMPT[:-2], 0, 0)
        drafter._ids = [PROMPT[:-2] for _ in range(num_rows)]
        drafter._follows = [True] * num_rows
        caches.append(drafter.model.cache)
    for cache in caches:
        for layer in cache.layers:
            for tensor in layer.tensors:
                tensor[1:] = tensor[:1]
    # The prompt's last token is the newest one, which no step has read.
    runner.cache.lengths.fill_(len(PROMPT) - 1)
    runner.positions.fill_(len(PROMPT) - 1)
    runner.tokens.fill_(PROMPT[-1])
    runner.previous.fill_(PROMPT[-2])
    texts: list[list[int]] = [[] for _ in range(num_rows)]
    while min(map(len, texts)) < 3:
        known: dict[int, Text] = {row: (PROMPT, text) for row, text in enumerate(texts)}
        used = len(PROMPT) + max(map(len, texts))
        ended = speculator.begin(known, used, room=50, complete=True)
        for text, packed in zip(texts, ended.packed.tolist(), strict=True):
            text += packed[1 : 1 + packed[0]] if ended.num_drafted else [packed]
    return torch.tensor([text[:3] for text in texts])


drawn_texts.seed = 0  # type: ignore[attr-defined]  # no two rows of a test share their random bits


def chi_square(counts: Tensor, odds: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare outcomes are one class."""
    expected = odds.flatten() * counts.sum()
    often = expected >= 5
    assert counts.flatten()[odds.flatten() == 0].sum() == 0, "an impossible text was drawn"
    seen = torch.cat((counts.flatten()[often], counts.flatten()[~often].sum()[None])).double()
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1


def assert_distributed(texts: Tensor, odds: Tensor) -> None:
    """p > 0.01 by Wilson and Hilferty's approximation (2.326 is the normal quantile)."""
    index = (texts * torch.tensor([SMALL**2, SMALL, 1])).sum(1)
    counts = torch.bincount(index, minlength=SMALL**3)
    statistic, freedom = chi_square(counts, odds)
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit, (statistic, limit, freedom)


KINDS = ["model", "right", "never", "random", "layers", "ngram"]


def speculator_of(
    kind: str, small: tuple[Transformer, Transformer], runner: ModelRunner, k: int
) -> Speculator:
    target, draft = small
    drafter: Any
    if kind in ("model", "right"):
        drafter = Draft(kind, draft if kind == "model" else target).drafter(runner)
    elif kind == "layers":
        drafter = Draft(kind, target, shares_cache=True).drafter(runner)
    elif kind == "ngram":
        drafter = NgramDrafter(runner)
    else:
        drafter = Adversary(runner, always_last if kind == "never" else random_odds)
    return Speculator(kind, runner, drafter, k)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "k"), [("plain", 3), ("top_p and penalties", 2), ("all", 1)])
def test_texts_are_distributed_as_without_a_draft(
    small: tuple[Transformer, Transformer], kind: str, name: str, k: int
) -> None:
    params, target = SAMPLED[name], small[0]
    runner = ModelRunner(target, DRAWS // 10, 32)
    speculator = speculator_of(kind, small, runner, k)
    texts = torch.cat([drawn_texts(speculator, runner, params) for _ in range(10)])
    assert len(texts) == DRAWS
    assert_distributed(texts, expected_odds(target, params))


@torch.no_grad()
def test_the_test_of_distributions_sees_a_wrong_one(small: tuple[Transformer, Transformer]) -> None:
    """Texts that the draft's model draws are not the target's."""
    params = SAMPLED["plain"]
    runner = ModelRunner(small[1], DRAWS // 10, 32)
    speculator = speculator_of("ngram", small, runner, 2)
    texts = torch.cat([drawn_texts(speculator, runner, params) for _ in range(10)])
    assert_distributed(texts, expected_odds(small[1], params))
    with pytest.raises(AssertionError):
        assert_distributed(texts, expected_odds(small[0], params))


@pytest.mark.parametrize("kind", ["wrong", "right", "layers"])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(
    llama: Transformer, pair: tuple[Transformer, Draft], kind: str
) -> None:
    drafts = {
        "wrong": pair[1],
        "right": Draft("right", llama),
        "layers": Draft("all", llama, shares_cache=True),
    }
    work = [(random_prompt(5 + 9 * number), params) for number, params in enumerate(MIXED)]
    together = run(Engine(llama, 3, draft=drafts[kind], speculate_k=3), *work)
    alone = Engine(llama, 1, draft=drafts[kind], speculate_k=3)
    assert [r.token_ids for r in together] == [run(alone, one)[0].token_ids for one in work]
    plain = run(Engine(llama, 3), *work)
    for number in (1, 3):  # greedy rows among sampled ones
        assert together[number].token_ids == plain[number].token_ids


def test_prompt_lookup_draws_the_very_text_of_plain_decoding(llama: Transformer) -> None:
    """Nothing of its draft is drawn, so that the random bits are those of plain decoding."""
    params = replace(MIXED[0], logit_bias={5: 3.0, 6: 3.0, 7: 3.0}, max_new_tokens=60)
    work = [(random_prompt(6), replace(params, seed=seed)) for seed in range(4)]
    work += [(random_prompt(5 + 9 * number), params) for number, params in enumerate(MIXED)]
    for k in (2, 6, None):
        engine = Engine(llama, 2, draft=Draft("ngram", None), speculate_k=k)
        together = run(engine, *work)
        assert [r.token_ids for r in together] == [r.token_ids for r in run(Engine(llama), *work)]
    assert engine.speculation is not None


def test_purposes_of_random_bits_differ() -> None:
    from gptfast.speculation import accept

    purposes = {PURPOSE_SAMPLE, PURPOSE_DRAFT, accept.PURPOSE_ACCEPT, accept.PURPOSE_RESIDUAL}
    assert len(purposes) == 4


# -- compiled --


def test_nothing_recompiles_once_warm(llama: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the prompts, the rows in use, the sampling parameters and what is accepted."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    monkeypatch.setattr("gptfast.cached.fused_step", lambda model, cache: None)
    work = [(random_prompt(5 + 40 * number), params) for number, params in enumerate(MIXED)]
    expected = [result.token_ids for result in run(Engine(llama, 2), *work)]
    engine = Engine(llama, 2, compile=True, draft=Draft("right", llama), speculate_k=3)
    engine.warm_up([*MIXED, SamplingParams()])
    warm = len(graphs)
    assert warm > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = run(engine, *work)
        for number in (1, 3):
            assert results[number].token_ids == expected[number]
    assert len(graphs) == warm


@pytest.mark.slow
def test_compiled_for_good_equals_plain_decoding() -> None:
    params = [STORY, replace(STORY, temperature=0.9, seed=2, top_p=0.9), STORY]
    expected = ids_of(LLM("storyteller", dtype="fp32"), PROMPTS[:3], params)
    facts = {"dtype": "fp32", "draft": "storyteller-draft", "speculate_k": 4}
    llm = LLM("storyteller", compile=True, **facts)
    found = ids_of(llm, PROMPTS[:3], params)
    assert found[0] == expected[0] and found[2] == expected[2]
    assert ids_of(LLM("storyteller", **facts), PROMPTS[:3], params) == found


# -- drafts that cannot be --


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path, shared_data: Path) -> None:
    other = shared_data / "checkpoints" / "stories260K-hf"
    with pytest.raises(ValueError, match=r"cannot draft for storyteller: its token \d+ is b'"):
        LLM("storyteller", draft=other)


def test_models_without_a_tokenizer_need_one_vocabulary(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target")
    draft = tiny_llama(tmp_path / "draft", vocab_size=80)
    with pytest.raises(ValueError, match="vocabulary of 80 tokens, and the target one of 96"):
        LLM(target, draft=draft)
    assert LLM(target, draft=tiny_llama(tmp_path / "same"), speculate_k=2).draft is not None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"draft": "layers:0"}, "has 4 layers, so its first 1 to 3 can draft"),
        ({"draft": "layers:4"}, "has 4 layers, so its first 1 to 3 can draft"),
        ({"draft": "int4", "quant": "int4"}, "would be the target itself"),
        ({"draft": "ngram", "draft_quant": "int8"}, "has no weights of its own"),
        ({"draft": "ngram", "speculate_k": 0}, "speculate_k is 0; 1 to 15 are possible"),
        ({"draft": "ngram", "speculate_k": 16}, "speculate_k is 16; 1 to 15 are possible"),
        ({"speculate_k": 4}, "there is no draft; give one"),
        ({"draft_quant": "int8"}, "there is no draft"),
        ({"draft": "no/such/model"}, "no model at"),
        ({"draft": "int5"}, "draft 'int5' is unknown; it may be ngram, layers:N"),
        ({"draft": "Ngram"}, "draft 'Ngram' is unknown"),
        ({"draft": "layers"}, "draft 'layers' is unknown"),
        ({"draft": ""}, "draft '' is unknown"),
        ({"draft": "layers:2", "draft_quant": "none"}, "has no weights of its own"),
    ],
)
def test_what_cannot_draft_is_said(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM("storyteller", **facts)


def test_self_drafts_share_what_they_can() -> None:
    llm = LLM("storyteller", draft="int4", speculate_k=2)
    assert llm.draft is not None and llm.draft.model is not None
    assert llm.draft.model.embed is llm.model.embed
    assert llm.draft.shares_cache
    layers = LLM("storyteller", draft="layers:2", speculate_k=2)
    assert layers.draft is not None and layers.draft.model is not None
    assert layers.draft.model.head is layers.model.head
    assert list(layers.draft.model.blocks) == list(layers.model.blocks)[:2]
    assert len(layers.model.blocks) == 4
    same_head = LLM("storyteller", quant="int8", draft="int4", speculate_k=2)
    assert same_head.draft is not None and same_head.draft.model is not None
    assert same_head.draft.model.head is same_head.model.head


def test_draft_weights_are_rounded_on_request() -> None:
    llm = LLM("storyteller", draft="storyteller-draft", draft_quant="int8", speculate_k=3)
    assert llm.draft is not None and llm.draft.model is not None
    assert {form.name for form in llm.draft.model.formats.values()} == {"int8"}
    plain = LLM("storyteller", draft="storyteller-draft", draft_quant="none")
    assert plain.draft is not None and plain.draft.model is not None
    assert not plain.draft.model.formats
    assert ids_of(llm, PROMPTS[:1], STORY) == ids_of(LLM("storyteller"), PROMPTS[:1], STORY)
