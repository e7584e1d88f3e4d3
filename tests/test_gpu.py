"""What only a CUDA device shows: the same tokens as the CPU, from graphs that replay.

All of it is skipped where there is no CUDA device.
"""

from pathlib import Path

import pytest
import torch
from family_cases import CASES, raw_config
from test_kernels import SCORINGS
from tiny import tiny_gpt2, tiny_llama

from gptfast.engine import Engine
from gptfast.families import FAMILIES, model_config
from gptfast.kernels.attention import attention, attention_reference
from gptfast.llm import LLM
from gptfast.quantization import quant_plan
from gptfast.sampling import SamplingParams
from gptfast.shapes import random_model
from quantize.grouped import grouped_linear, grouped_linear_reference

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("bound", [None, 64, 200])
def test_attention_equals_its_reference(num_tokens, bound):
    q = torch.randn(3, num_tokens, 8, 64, device="cuda")
    keys, values = torch.randn(2, 3, 2, 257, 64, device="cuda")
    starts = torch.tensor([[0], [17], [40]], device="cuda")
    positions = starts + torch.arange(num_tokens, device="cuda")
    limit = None if bound is None else torch.tensor(bound)
    found = attention(q, keys, values, positions, limit)
    exact = attention_reference(q, keys, values, positions)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("name", SCORINGS)
def test_scorings_equal_their_reference(name, num_tokens):
    scoring = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in SCORINGS[name].items()
    }
    q = torch.randn(2, num_tokens, 4, 64, device="cuda")
    keys, values = torch.randn(2, 2, 2, 257, 64, device="cuda")
    positions = torch.tensor([[60], [200]], device="cuda") + torch.arange(num_tokens, device="cuda")
    found = attention(q, keys, values, positions, torch.tensor(256), **scoring)
    exact = attention_reference(q, keys, values, positions, **scoring)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [100, 0, 20, 9], [0, 1, 0, 0]], ids=str)
def test_grouped_linear_equals_its_reference(counts, dtype):
    x = torch.randn(sum(counts), 64, device="cuda", dtype=dtype)
    weight = torch.randn(len(counts), 48, 64, device="cuda", dtype=dtype) / 8
    bias = torch.randn(len(counts), 48, device="cuda", dtype=dtype)
    ends = torch.tensor(counts, device="cuda").cumsum(0)
    for biases in (None, bias):
        exact = grouped_linear_reference(x.float(), weight.float(), biases, ends)
        found = grouped_linear(x, weight, biases, ends)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_the_cpu(family):
    """Logits of a text, read and decoded, in float32; experts also in one graph."""
    raw = raw_config(next(name for name in CASES if name.startswith(f"{family}-")))
    config = model_config(raw)
    ours = random_model(config, torch.float32)
    text = torch.randint(3, config.vocab_size, (30,)).tolist()
    [expected] = Engine(ours).all_logits(text)
    compile = family in ("gpt_oss", "deepseek_v3")  # each takes half a minute
    engine = Engine(random_model(config, torch.float32, "cuda"), 2, compile=compile)
    [found] = engine.all_logits(text)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    request = engine.submit(text[:20], SamplingParams(temperature=0, max_new_tokens=8))
    tokens = []
    while engine.has_work:
        tokens += [t for e in engine.step() if e.request_id == request for t in e.token_ids]
    [logits] = Engine(ours).all_logits(text[:20] + tokens)
    chosen = logits[19:-1].gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, logits[19:-1].amax(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("compile", [False, True])
def test_tokens_equal_the_cpu_alone_and_in_a_batch(tmp_path: Path, make, compile):
    folder = make(tmp_path)
    prompts = [[5, 6, 7], list(range(1, 40)), [9]]
    expected = LLM(folder, device="cpu", dtype="fp32", batch_size=1).generate(prompts, GREEDY)
    for rows in (1, 3):
        llm = LLM(folder, device="cuda", dtype="fp32", batch_size=rows, compile=compile)
        found = llm.generate(prompts, GREEDY)
        assert [output.token_ids for output in found] == [o.token_ids for o in expected]


@pytest.mark.parametrize("quant", ["int8", "int4-g16-asym", "mxfp4", "fp8", "int8-dynamic"])
def test_quantized_weights_equal_the_cpu(tmp_path: Path, quant):
    """Rounded on each device; fp8 is multiplied here and dequantized there."""
    folder = tiny_llama(tmp_path)
    text = torch.randint(3, 96, (30,)).tolist()
    here, there = (LLM(folder, device=d, dtype="fp32", quant=quant) for d in ("cuda", "cpu"))
    torch.testing.assert_close(here.logits(text), there.logits(text), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_quantized_experts_run_in_one_graph(name):
    config = model_config(raw_config(next(case for case in CASES if case.startswith(name))))
    model = random_model(config, torch.float32, "cuda", quant=quant_plan("int4", 16))
    results = []
    for compile in (False, True):
        engine = Engine(model, 2, compile=compile)
        engine.submit(list(range(3, 20)), SamplingParams(temperature=0, max_new_tokens=8))
        tokens = []
        while engine.has_work:
            tokens += [t for event in engine.step() for t in event.token_ids]
        results.append(tokens)
    assert results[0] == results[1]


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_caches_of_8_bits_equal_the_cpu(tmp_path: Path, cache):
    folder = tiny_llama(tmp_path)
    text = torch.randint(3, 96, (30,)).tolist()
    here, there = (
        LLM(folder, device=d, dtype="fp32", kv_cache_dtype=cache, compile=d == "cuda")
        for d in ("cuda", "cpu")
    )
    torch.testing.assert_close(here.logits(text), there.logits(text), rtol=1e-2, atol=1e-2)
    assert len(here.generate([text[:10]], GREEDY)[0].token_ids) == 40


def test_a_graph_for_every_bound_and_plan_and_none_is_captured_twice(tmp_path: Path):
    llm = LLM(tiny_llama(tmp_path), device="cuda", dtype="fp32", compile=True)
    engine: Engine = llm.engine
    for params in (GREEDY, SamplingParams(temperature=1.0, seed=1, max_new_tokens=40)):
        llm.generate([[1, 2, 3]], params)
    captured = dict(engine.runner._graphs)
    assert {plan for plan, _ in captured} == {"greedy", "plain"}
    llm.generate([[4, 5]], GREEDY)
    assert engine.runner._graphs == captured


def test_a_stop_in_the_middle_leaves_nothing_behind(tmp_path: Path):
    """The host is one step behind: the token that follows a stop must not be reported."""
    llm = LLM(tiny_llama(tmp_path), device="cuda", dtype="fp32", compile=True)
    full = llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
    stop = SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=[full[10]])
    output = llm.generate([[1, 2, 3]], stop)[0]
    first = full.index(full[10])
    assert output.token_ids == full[: first + 1] and output.finish_reason == "stop"
    assert llm.generate([[1, 2, 3]], GREEDY)[0].token_ids == full
