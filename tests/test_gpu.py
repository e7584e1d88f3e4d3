"""What only a CUDA device shows: the same tokens as the CPU, from graphs that replay.

All of it is skipped where there is no CUDA device.
"""

from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama

from gptfast.engine import Engine
from gptfast.kernels.attention import attention, attention_reference
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

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
