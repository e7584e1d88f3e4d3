"""Compiled engines: the tokens of the eager one, a few graphs, and none more once these are warm.

One engine is compiled for good (Inductor); where only the number of graphs matters, a backend that
runs them as they are counts them and saves the minutes of a C++ compiler.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, write_checkpoint
from test_engine import (
    GREEDY,
    MIXED,
    assert_greedy,
    finish,
    lively_gpt2,
    lively_llama,
    random_prompt,
    run,
    take,
    tokens_alone,
)
from torch._dynamo.utils import counters

from gptfast.engine import Engine
from gptfast.fused import why_no_step
from gptfast.llm import LLM
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.sampling import SamplingParams

PLANS = [GREEDY, SamplingParams(), SamplingParams(top_k=5)]


def num_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def num_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Graphs compiled since the test began, by a compiler that runs them as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    return lambda: len(graphs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return lively_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
def test_nothing_recompiles_once_warm(llama: Transformer) -> None:
    """Whatever the prompt's length, the rows in use, the sampling parameters or the output."""
    engine = Engine(llama, 3, compile=True)
    engine.runner.warm_up(PLANS)
    assert engine.runner.compile_s > 0
    warm = num_compiled()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((1,), (2, 17), (100, 600, 1100), (16, 512, 513, 3, 31)):
            work = [(random_prompt(n), replace(GREEDY, max_new_tokens=3 + n % 7)) for n in lengths]
            for result, (prompt, params) in zip(run(engine, *work), work, strict=True):
                assert len(result.token_ids) == params.max_new_tokens
                assert_greedy(llama, prompt, result.token_ids)
        mixed = [(random_prompt(9 + 50 * i, seed=1), params) for i, params in enumerate(MIXED)]
        mixed += [
            (random_prompt(5), replace(GREEDY, logprobs=n, max_new_tokens=2)) for n in (0, 4, 20)
        ]
        mixed += [
            (random_prompt(6), SamplingParams(seed=1, max_new_tokens=4, **{name: value}))
            for name, values in {
                "temperature": (0.1, 1.7),
                "top_k": (1, 7, 1000),
                "top_p": (0.1, 0.999),
                "min_p": (0.05, 1.0),
                "repetition_penalty": (0.5, 1.2),
                "presence_penalty": (-1, 2),
                "frequency_penalty": (-1, 2),
                "logit_bias": ({1: 1.0}, {2: -5.0, 3: 7.0}),
                "stop_token_ids": ([1], [2, 3]),
            }.items()
            for value in values
        ]
        together = [result.token_ids for result in run(engine, *mixed)]
        assert together == [run(engine, one)[0].token_ids for one in mixed]
        request_id = engine.submit(random_prompt(700), GREEDY)
        engine.step()
        engine.cancel(request_id)
        for length in (1, 513):
            list(engine.all_logits(random_prompt(length)))
    assert num_compiled() == warm


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("quant", ["int8", "int4-g16", "int4-g16-asym-dynamic", "mxfp4"])
def test_quantized_layers_share_the_graphs_of_plain_ones(
    tmp_path: Path, num_graphs: Callable[[], int], quant: str, cache: str
) -> None:
    """Weights are inputs of a graph, formats its constants: as many graphs as for plain weights,
    and none more for prompts and rows; tokens are the eager ones.
    """
    folder = write_checkpoint(tmp_path / "model", "llama-gqa")
    prompts = [random_prompt(n) for n in (1, 20, 40)]
    params = replace(GREEDY, max_new_tokens=6, ignore_eos=True)
    counts, tokens = [], []
    for compile, chosen in ((True, None), (True, quant), (False, quant)):
        before = num_graphs()
        llm = LLM(folder, dtype="fp32", quant=chosen, compile=compile, kv_cache_dtype=cache)
        with torch._dynamo.config.patch(error_on_recompile=not compile):
            found = [llm.generate([prompt], params)[0].token_ids for prompt in prompts[:1]]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [llm.generate([prompt], params)[0].token_ids for prompt in prompts[1:]]
        counts.append(num_graphs() - before)
        tokens.append(found)
    assert counts[0] == counts[1] > 0 == counts[2]
    assert tokens[1] == tokens[2]


@pytest.mark.slow
def test_golden_stories_compiled(shared_data: Path) -> None:
    """A real model: the six published continuations, alone and together, and no graph more."""
    folder = shared_data / "checkpoints"
    golden = json.loads((folder / "stories260K-golden" / "golden_greedy.json").read_text())
    for batch_size in (3, 1):
        llm = LLM(
            folder / "stories260K-hf", device="cpu", dtype="fp32", compile=True,
            batch_size=batch_size,
        )  # fmt: skip
        params = [
            SamplingParams(
                temperature=0, max_new_tokens=len(case["token_ids"]) - len(case["prompt_ids"])
            )
            for case in golden["cases"]
        ]
        llm.engine.runner.warm_up(params)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs = llm.generate([case["prompt"] for case in golden["cases"]], params)
        assert [o.prompt + o.text for o in outputs] == [case["text"] for case in golden["cases"]]


@pytest.mark.parametrize("make", [lively_llama, lively_gpt2])
def test_a_plan_that_is_compiled_in_the_middle_disturbs_no_row(
    num_graphs: Callable[[], int], tmp_path: Path, make: Callable[..., Transformer]
) -> None:
    """A request joins whose sampling nobody wanted before; warming up runs on padding only."""
    model = make(tmp_path)
    engine = Engine(model, 3, compile=True)
    first, second = random_prompt(20), random_prompt(530)
    params = SamplingParams(seed=3, top_k=9, max_new_tokens=12, ignore_eos=True)
    greedy = engine.submit(first, replace(GREEDY, max_new_tokens=20))
    results: dict[int, Any] = {}
    for _ in range(5):
        take(engine, results)
    before, compiled_s = num_graphs(), engine.runner.compile_s
    sampled = engine.submit(second, params)
    finish(engine, results)
    assert num_graphs() > before and engine.runner.compile_s > compiled_s > 0
    assert_greedy(model, first, results[greedy].token_ids)
    assert len(results[greedy].token_ids) == 20
    assert results[sampled].token_ids == tokens_alone(model, second, params)
    assert engine.counters.seconds < engine.runner.compile_s, "decode time contains compilation"


def num_expected(engine: Engine) -> int:
    """Graphs of an engine of two rows whose requests are greedy."""
    num_kinds = len({block.kind for block in engine.model.blocks})
    if why_no_step(engine.model, engine.num_rows) is None:
        return num_kinds  # at two tokens and more
    return 2 * num_kinds + 4  # also at one; head and sampler, for one row and for all


def test_blocks_share_their_graphs(num_graphs: Callable[[], int], tmp_path: Path) -> None:
    counts = []
    for num_layers in (2, 4):
        before = num_graphs()
        model = lively_llama(tmp_path / str(num_layers), num_hidden_layers=num_layers)
        engine = Engine(model, 2, compile=True)
        [result] = run(engine, (random_prompt(600), GREEDY))
        assert_greedy(model, random_prompt(600), result.token_ids)
        counts.append(num_graphs() - before)
    assert counts == [num_expected(engine)] * 2


def test_engines_of_one_process_do_not_push_each_other_out(
    num_graphs: Callable[[], int], tmp_path: Path
) -> None:
    """torch.compile gives up on a function that it has compiled too often; each engine counts for
    itself, so a process may hold many.
    """
    models = [lively_llama(tmp_path / "llama"), lively_gpt2(tmp_path / "gpt2")]
    models.append(lively_llama(tmp_path / "deep", num_hidden_layers=3, num_key_value_heads=4))
    with torch._dynamo.config.patch(recompile_limit=2):
        engines = [Engine(model, rows + 1, compile=True) for rows, model in enumerate(models)]
        for engine in engines:
            engine.runner.warm_up([GREEDY])
        warm = num_graphs()
        for length in (3, 40):
            for engine in engines:
                prompt = random_prompt(length, seed=1)
                [result] = run(engine, (prompt, GREEDY))
                assert_greedy(engine.model, prompt, result.token_ids)
    assert num_graphs() == warm


@pytest.mark.parametrize(
    ("family", "num_kinds"),
    [
        ("gemma2", 2),  # layers with a window and without
        ("gpt_oss", 2),
        ("smollm3", 2),  # with positions and without
        ("deepseek_v3", 2),  # the first layer without experts
        ("qwen3_moe", 1),
        ("bloom", 1),
    ],
)
def test_a_graph_for_each_kind_of_block_and_none_more(
    num_graphs: Callable[[], int], tmp_path: Path, family: str, num_kinds: int
) -> None:
    """Whatever the lengths, also where a prompt is longer than a window."""
    name = next(name for name in CASES if name.startswith(f"{family}-"))
    model = load(write_checkpoint(tmp_path, name), torch.float32)
    assert len({block.kind for block in model.blocks}) == num_kinds
    engine, before = Engine(model, 2, compile=True), num_graphs()
    engine.runner.warm_up([GREEDY])
    warm = num_graphs()
    assert warm - before == num_expected(engine)
    params = replace(GREEDY, max_new_tokens=5)
    for lengths in ((1,), (2, 17), (40, 3, 31)):
        work = [(random_prompt(length), params) for length in lengths]
        for result, (prompt, _) in zip(run(engine, *work), work, strict=True):
            assert_greedy(model, prompt, result.token_ids)
    assert num_graphs() == warm
