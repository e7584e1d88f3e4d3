"""The fused decode step of a CPU: the same logits, keys and values as the blocks it stands for, the
same bits for a token whatever stands beside it, and a reason wherever there is none.
"""

import copy
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import CASES, raw_config
from test_kernels import SCORINGS
from test_shared_memory import memories_of, together

from gptfast.cache import KVCache
from gptfast.config import ModelConfig
from gptfast.engine import Engine
from gptfast.families import model_config
from gptfast.fused import FusedStep, _parts, fused_step, why_no_step
from gptfast.kernels.attention import _has_kernel, attention, attention_reference
from gptfast.kernels.cpu_step import STEP, CpuStep
from gptfast.kernels.rounding import round_vectors
from gptfast.kernels.shared_memory import PIECE_BYTES, SharedMemory, why_not
from gptfast.model import Transformer
from gptfast.parallel import ALONE, Group
from gptfast.quantization import quant_plan
from gptfast.sampling import SamplingParams
from gptfast.shapes import random_model
from quantize.kernels.build import cache_folder
from quantize.packed import PackedLinear
from quantize.packing import pack_linears

pytestmark = pytest.mark.skipif(
    STEP.load() is None, reason=f"needs the built kernels: {STEP.why_not()}"
)

# Cases that the step leaves to the blocks, by a word of the reason.
LEFT_OUT = "mixtral moe olmo2 stablelm-parallel gpt_oss deepseek mpt-clip".split()
WHOLE = [name for name in CASES if not any(word in name for word in LEFT_OUT)]
SPARE = 80


def model_of(
    name: str, dtype: torch.dtype = torch.float32, quant: str | None = None
) -> Transformer:
    plan = None if quant is None else quant_plan(quant)
    return random_model(model_config(raw_config(name)), dtype, quant=plan)


def caches_of(
    model: Transformer, rows: int, kv_cache_dtype: str = "auto"
) -> tuple[KVCache, KVCache]:
    """Two caches that hold the same 30 tokens a row."""
    config = model.config
    tokens = torch.randint(3, config.vocab_size, (rows, 30))
    caches = [
        KVCache.allocate(config, rows, SPARE, model.dtype, "cpu", kv_cache_dtype) for _ in range(2)
    ]
    for cache in caches:
        cache.lengths.fill_(40)
        model(tokens, torch.arange(30).expand(rows, 30), cache)
    return caches[0], caches[1]


def difference(model: Transformer, rows: int = 3, kv_cache_dtype: str = "auto") -> float:
    """Largest difference of logits between blocks and step, in shares of the largest logit, over
    steps of one and of several tokens; the last with an idle row.
    """
    expected_cache, cache = caches_of(model, rows, kv_cache_dtype)
    step, worst = FusedStep(model, cache), 0.0
    for start, count in ((30, 1), (31, 1), (32, 4), (36, 1)):
        tokens = torch.randint(3, model.config.vocab_size, (rows, count))
        positions = torch.arange(start, start + count).repeat(rows, 1)
        if start == 36:
            positions[1] = SPARE
        expected = model(tokens, positions, expected_cache)
        found, best = step(tokens, positions)
        assert found.dtype == torch.float32 and found.isfinite().all()
        if best is not None:
            assert torch.equal(best, found.argmax(-1))
        active = positions[:, 0] < SPARE
        gap = (found - expected)[active].abs().max() / expected[active].abs().max()
        worst = max(worst, gap.item())
    return worst


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_families_equal_their_blocks(name: str) -> None:
    assert difference(model_of(name)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "gemma2-softcaps-window", "falcon-7b"])
def test_bfloat16_equals_its_blocks(name: str) -> None:
    """Rounded at the same places, so that only a rare sum rounds to a neighbour."""
    assert difference(model_of(name, torch.bfloat16)) < 0.06


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["int8", "int4", "int4-g32-asym", "int4-dynamic", "mxfp4"])
def test_quantized_weights(quant: str, dtype: torch.dtype) -> None:
    model = model_of("llama-biases-tied", dtype, quant)
    assert difference(model) < (1e-4 if dtype == torch.float32 else 0.06)


@torch.no_grad()
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcaps-window"])
def test_keys_and_values_of_eight_bits(name: str, kv_cache_dtype: str) -> None:
    """A number next to the middle between two steps may be rounded to the other."""
    assert difference(model_of(name), kv_cache_dtype=kv_cache_dtype) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_what_the_blocks_write(dtype: torch.dtype) -> None:
    for kv_cache_dtype in ("auto", "int8", "fp8"):
        model = model_of("qwen3-head-dim", dtype)
        expected, cache = caches_of(model, 2, kv_cache_dtype)
        tokens, positions = torch.tensor([[5], [6]]), torch.tensor([[30], [SPARE]])
        model(tokens, positions, expected)
        FusedStep(model, cache)(tokens, positions)
        # Of the first layer, whose input is the same to the bit, nearly every number is too.
        for ours, theirs in zip(cache.layers[0].tensors, expected.layers[0].tensors, strict=True):
            ours, theirs = ours[:, :, :SPARE].float(), theirs[:, :, :SPARE].float()
            assert (ours != theirs).float().mean() < 0.01
            torch.testing.assert_close(ours, theirs, rtol=0.15, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("quant", [None, "int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_company(quant: str | None, dtype: torch.dtype) -> None:
    """Alone, beside other rows, as one of several new tokens of its row, and in any number of
    threads.
    """
    model = model_of("llama-gqa", dtype, quant)
    tokens = torch.randint(3, model.config.vocab_size, (1, 46))
    whole = torch.arange(46).unsqueeze(0)

    def logits(rows: int, pieces: list[int], threads: int = 1) -> torch.Tensor:
        cache = KVCache.allocate(model.config, rows, SPARE, dtype)
        step, start, found = FusedStep(model, cache), 0, []
        others = torch.randint(3, model.config.vocab_size, (rows, 46))
        others[rows // 2] = tokens
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for size in pieces:
                part = slice(start, start + size)
                places = whole[:, part].repeat(rows, 1)
                places[: rows // 2] = (places[: rows // 2] - 3).clamp(min=0)
                found.append(step(others[:, part], places)[0][rows // 2])
                start += size
        finally:
            torch.set_num_threads(before)
        return torch.cat(found)

    alone = logits(1, [1] * 46)
    assert torch.equal(alone, logits(1, [16, 16, 14]))
    assert torch.equal(alone, logits(1, [3, 5, 2, 7, 1, 11, 16, 1], threads=2))
    assert torch.equal(alone, logits(5, [1, 3, 2] + [1] * 40, threads=5))
    assert torch.equal(alone, logits(16, [1] * 46))


@torch.no_grad()
def test_rows_at_their_own_places() -> None:
    """Rows of different lengths, one of them idle."""
    model = model_of("mistral-window")
    expected_cache, cache = caches_of(model, 4)
    positions = torch.tensor([[3], [29], [SPARE], [12]])
    tokens = torch.tensor([[4], [5], [6], [7]])
    expected = model(tokens, positions, expected_cache)
    found, _ = FusedStep(model, cache)(tokens, positions)
    active = [0, 1, 3]
    torch.testing.assert_close(found[active], expected[active], rtol=1e-4, atol=1e-5)


# -- attention alone, where rows are long --


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (8, 8), (80, 80), (256, 256), (24, 40)], ids=str)
def test_attention_over_chunks(dims, dtype, stored) -> None:
    """Rows beyond one chunk of 512 slots, at its edges too."""
    torch.manual_seed(0)
    key_dim, value_dim = dims
    q = torch.randn(4, 3, 4, key_dim).to(dtype)
    keys = torch.randn(4, 2, 1301, key_dim).to(dtype)
    values = torch.randn(4, 2, 1301, value_dim).to(dtype)
    starts = torch.tensor([[0], [510], [1200], [1300]])
    positions = (starts + torch.arange(3)).clamp(max=1300)
    scales = (None, None)
    if stored is not None:
        (keys, key_scales), (values, value_scales) = (
            round_vectors(x.float(), stored) for x in (keys, values)
        )
        scales = (key_scales, value_scales)
    found = attend(q, keys, values, positions, key_scales=scales[0], value_scales=scales[1])
    exact = attention_reference(
        q.float(),
        widened(keys),
        widened(values),
        positions,
        key_scales=scales[0],
        value_scales=scales[1],
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 64, 700])
@pytest.mark.parametrize("name", SCORINGS)
def test_scorings(name: str, window: int | None) -> None:
    torch.manual_seed(0)
    q, scoring = torch.randn(2, 2, 4, 64), {**SCORINGS[name], "window": window}
    keys, values = torch.randn(2, 2, 2, 1025, 64)
    positions = torch.tensor([[60, 61], [1000, 1001]])
    found = attend(q, keys, values, positions, **scoring)
    exact = attention_reference(q, keys, values, positions, **scoring)
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5)


# -- attention of many tokens --


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (8, 8), (80, 80), (33, 17)], ids=str)
@pytest.mark.parametrize(("num_tokens", "heads"), [(17, (4, 1)), (33, (6, 6)), (511, (4, 2))])
def test_attention_of_many_tokens(num_tokens, heads, dims, dtype, stored) -> None:
    """Odd numbers of them: from the first slot on, behind others, and some with padding."""
    torch.manual_seed(0)
    q = torch.randn(3, num_tokens, heads[0], dims[0]).to(dtype)
    keys, values = (torch.randn(3, heads[1], 801, dim).to(dtype) for dim in dims)
    positions = torch.tensor([[0], [250], [5]]) + torch.arange(num_tokens)
    positions[2, -7:] = 800
    scales = (None, None)
    if stored is not None:
        (keys, key_scales), (values, value_scales) = (
            round_vectors(x.float(), stored) for x in (keys, values)
        )
        scales = (key_scales, value_scales)
    how = {"key_scales": scales[0], "value_scales": scales[1]}
    found = attend(q, keys, values, positions, **how).float()
    exact = attention_reference(q.float(), widened(keys), widened(values), positions, **how)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 64, 300])
@pytest.mark.parametrize("name", SCORINGS)
def test_scorings_of_many_tokens(name: str, window: int | None) -> None:
    torch.manual_seed(0)
    q, scoring = torch.randn(2, 35, 4, 16), {**SCORINGS[name], "window": window}
    keys, values = torch.randn(2, 2, 2, 700, 16)
    positions = torch.tensor([[0], [610]]) + torch.arange(35)
    exact = attention_reference(q, keys, values, positions, **scoring)
    found = attend(q, keys, values, positions, **scoring)
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5)
    keys, values, q = keys.bfloat16(), values.bfloat16(), q.bfloat16()
    found = attend(q, keys, values, positions, **scoring).float()
    torch.testing.assert_close(found, exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
def test_attention_of_a_prompt_in_any_pieces(stored: torch.dtype, window: int | None) -> None:
    """The same bits in any number of threads and beside another row, whatever the slots hold that
    nobody sees.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if stored == torch.int8 else stored
    q = torch.randn(1, 600, 4, 24).to(dtype)
    cache = list(torch.randn(2, 1, 2, 701, 24).to(dtype))
    if stored == torch.int8:
        rounded = [round_vectors(x, stored) for x in cache]
        cache = [x for x, _ in rounded] + [scales for _, scales in rounded]
    whole, before = torch.arange(600).unsqueeze(0), torch.get_num_threads()

    def attended(slots: list[torch.Tensor], part: slice, rows: int) -> torch.Tensor:
        named = dict(zip(("keys", "values", "key_scales", "value_scales"), slots, strict=False))
        places = whole[:, : part.stop - part.start].repeat(rows, 1)
        places[0] = whole[0, part]
        return attend(q[:, part].repeat(rows, 1, 1, 1), positions=places, window=window, **named)

    expected = attended(cache, slice(0, 600), 1)
    try:
        for threads, sizes in ((1, (17, 300, 283)), (2, (512, 88)), (5, (582, 18))):
            torch.set_num_threads(threads)
            start, found = 0, []
            for size in sizes:
                unseen = [x.clone() for x in cache]
                for x in (x for x in unseen if x.is_floating_point()):
                    x[:, :, start + size :] = torch.nan
                    x[:, :, : max(0, start - 99) if window else 0] = torch.nan
                rows = [torch.cat(pair) for pair in zip(unseen, cache, strict=True)]
                found.append(attended(rows, slice(start, start + size), 2)[:1])
                start += size
            assert torch.equal(torch.cat(found, dim=1), expected)
    finally:
        torch.set_num_threads(before)


def test_attention_of_many_tokens_shows_nan() -> None:
    q, keys, values = torch.randn(1, 20, 2, 8), torch.randn(1, 1, 33, 8), torch.randn(1, 1, 33, 8)
    positions = torch.arange(20).unsqueeze(0)
    keys[0, 0, 3, 0] = torch.nan
    found = attend(q, keys, values, positions)
    assert found[:, 3:].isnan().all() and found[:, :3].isfinite().all()
    assert attend(q * torch.nan, keys, values, positions).isnan().all()


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_nan_alone_stays_visible(num_tokens: int) -> None:
    """Where a query has seen nothing else: before a sink, and before other slots."""
    q, (keys, values) = torch.randn(1, num_tokens, 2, 8), torch.randn(2, 1, 1, 700, 8)
    positions = torch.arange(num_tokens).unsqueeze(0) + 512
    sinks = torch.zeros(2)
    assert attend(q * torch.nan, keys, values, positions, sinks=sinks).isnan().all()
    keys[..., :512, :] = torch.nan
    assert attend(q, keys, values, positions).isnan().all()


@pytest.mark.parametrize("window", [2**31, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_a_window_longer_than_the_cache(num_tokens: int, window: int) -> None:
    q, (keys, values) = torch.randn(1, num_tokens, 2, 8), torch.randn(2, 1, 1, 33, 8)
    positions = torch.arange(num_tokens).unsqueeze(0)
    found = attend(q, keys, values, positions, window=window)
    assert torch.equal(found, attend(q, keys, values, positions))


@pytest.mark.parametrize("name", ["sinks", "slopes"])
def test_sinks_and_slopes_are_one_of_each_head(name: str) -> None:
    q, keys = torch.randn(1, 20, 4, 8), torch.randn(1, 2, 33, 8)
    with pytest.raises(ValueError, match="one of each"):
        attend(q, keys, keys, torch.arange(20).unsqueeze(0), **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :, :0], keys, keys, torch.arange(20).unsqueeze(0))


def test_prompts_go_through_it() -> None:
    """Where the processor is wide enough; numbers that it does not know stay with PyTorch."""
    q, keys, values = torch.randn(1, 20, 2, 8), torch.randn(1, 1, 33, 8), torch.randn(1, 1, 33, 8)
    positions = torch.arange(20).unsqueeze(0)
    kernel = torch.ops.gptfast.has_prompt_attention()
    assert _has_kernel(q, keys, values, None, None) == kernel
    assert _has_kernel(q[:, :16], keys, values, None, None)
    assert not _has_kernel(q.half(), keys.half(), values.half(), None, None)
    if kernel:
        found = attention(q, keys, values, positions)
        assert torch.equal(found, attend(q, keys, values, positions))


def attend(q, keys, values, positions, **how) -> torch.Tensor:
    names = "scale window softcap sinks slopes key_scales value_scales".split()
    how["scale"] = how.get("scale") or q.size(-1) ** -0.5
    options = [how.get(name) for name in names]
    return torch.ops.gptfast.slots_attention(q, keys, values, positions, *options)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


# -- where there is none --


def test_why_there_is_none() -> None:
    reasons = {name: why_no_step(model_of(name)) for name in CASES if name not in WHOLE}
    assert all(reason and "parts" in reason for reason in reasons.values()), reasons
    model = model_of("llama-gqa", torch.float16)
    assert "float16" in (why_no_step(model) or "")
    model = model_of("llama-gqa")
    assert "16 rows" in (why_no_step(model, 17) or "")
    assert fused_step(model, KVCache.allocate(model.config, 17, 8, model.dtype)) is None


def test_many_rows_go_through_the_blocks() -> None:
    model = model_of("llama-gqa")
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    texts = []
    for rows in (17, 3):
        engine = Engine(model, rows, 40)
        ids = [engine.submit([5, 6, 7 + i], params) for i in range(3)]
        found: dict[int, list[int]] = {i: [] for i in ids}
        while engine.has_work:
            for event in engine.step():
                found[event.request_id] += event.token_ids
        texts.append([found[i] for i in ids])
    assert texts[0] == texts[1]


def test_steps_are_refused_what_they_are_not_for() -> None:
    model = model_of("llama-gqa")
    step = FusedStep(model, KVCache.allocate(model.config, 1, 40, model.dtype))
    with pytest.raises(ValueError, match="at most 16 tokens"):
        step(torch.zeros(1, 17, dtype=torch.int64), torch.arange(17).unsqueeze(0))
    with pytest.raises(ValueError, match="position 41 is none of 0 to 40"):
        step(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[41]]))
    inputs = torch.zeros(1, 1, model.config.dim), torch.tensor([[0]])
    [(cos, sin)] = step.turns or []
    for turns, why in (
        ([], "by turns 0 of 0"),
        ([(cos, sin[:, :40])], "of 41 places by"),
        ([(cos, sin.double())], "contiguous float32"),
    ):
        with pytest.raises(ValueError, match=why):
            step.step(*inputs, turns, True)
    with pytest.raises(ValueError, match="has no kernel"):
        parts = replace_activation(step)
        step.step.add_block(parts, 0, *step.cache.layers[0].tensors, None, None)


def replace_activation(step: FusedStep):
    [parts, *_] = _parts(step.model)
    return replace(parts, activation="tanh")


def test_what_does_not_fit_is_refused() -> None:
    """Before anything is written beyond what there is."""
    model = model_of("llama-gqa")
    step = FusedStep(model, KVCache.allocate(model.config, 2, 40, model.dtype))
    with pytest.raises(ValueError, match="3 rows do not fit a cache of 2"):
        step(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="not those of the model"):
        FusedStep(model, KVCache.allocate(model.config, 2, 40, torch.bfloat16))
    keys = torch.zeros(2, 1, 9, 8)
    with pytest.raises(ValueError, match="do not fit the slots"):
        attend(torch.zeros(3, 1, 2, 8), keys, keys, torch.zeros(3, 1, dtype=torch.int64))


@torch.no_grad()
def test_nan_stays_visible() -> None:
    q, keys, values = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 33, 8), torch.randn(1, 1, 33, 8)
    positions = torch.tensor([[20]])
    for softcap in (None, 5.0):
        broken = keys.clone()
        broken[0, 0, 3, 0] = torch.nan
        assert attend(q, broken, values, positions, softcap=softcap).isnan().all()
        assert attend(q * torch.nan, keys, values, positions, softcap=softcap).isnan().all()
    model = model_of("llama-gqa")
    model.norm.weight[3] = torch.nan
    step = FusedStep(model, KVCache.allocate(model.config, 1, 40, model.dtype))
    logits, best = step(torch.tensor([[5]]), torch.tensor([[0]]))
    assert logits.isnan().all() and best.item() == model.config.vocab_size - 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["copied", "replaced"])
def test_a_step_holds_its_weights(kind: str) -> None:
    """The numbers themselves, whoever owns the modules: the original of a copied model is gone, or
    weights have been given other memory. What they lay in is used again at once.
    """
    model = model_of("llama-gqa", torch.bfloat16 if kind == "copied" else torch.float32)
    own = copy.deepcopy(model) if kind == "copied" else model
    step = FusedStep(own, KVCache.allocate(own.config, 1, 40, own.dtype))
    inputs = torch.tensor([[5]]), torch.tensor([[0]])
    expected, sizes = step(*inputs)[0].clone(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | PackedLinear):
            sizes.append((module.out_features, module.in_features))
        if kind == "replaced" and isinstance(module, torch.nn.Linear):
            module.weight.data = torch.zeros(1)
    if kind == "copied":
        del model, module
        gc.collect()
    # One after the other as they were freed, several times over: allocators differ.
    used = [torch.full(size, torch.nan, dtype=own.dtype) for size in 20 * sizes]
    assert torch.equal(step(*inputs)[0], expected) and len(used) > 100


@torch.no_grad()
def test_steps_in_two_threads() -> None:
    """Each engine its own; what threads share is each thread's own."""
    models = [model_of("llama-gqa"), model_of("gpt2-tied")]
    inputs = torch.tensor([[5]]), torch.tensor([[0]])

    def run(model: Transformer) -> torch.Tensor:
        step = FusedStep(model, KVCache.allocate(model.config, 1, 40, model.dtype))
        return torch.stack([step(*inputs)[0] for _ in range(50)])

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, models))
    for model, found in zip(models, together, strict=True):
        assert torch.equal(found, run(model))


# -- several ranks, here as threads of one process --


def local_model(
    whole: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype, group: Group
) -> Transformer:
    """What a rank has of a model, from all its parameters: heads, hidden units and rows of the
    vocabulary, and biases of sums on the first rank only.
    """
    size, rank = group.size, group.rank
    heads, kv_heads = config.num_heads // size, max(config.num_kv_heads // size, 1)
    model = Transformer(
        replace(
            config,
            num_heads=heads,
            num_kv_heads=kv_heads,
            hidden_dim=config.hidden_dim // size,
            alibi=config.alibi[rank * heads : (rank + 1) * heads],
        ),
        group,
    )
    for name, parameter in model.named_parameters():
        value = whole[name]
        if "attention.qkv." in name:
            q, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            shared_by = max(size // config.num_kv_heads, 1)  # so many ranks have the same one
            q, k, v = value.split((q, kv_rows, kv_rows))
            k, v = (t.chunk(size // shared_by)[rank // shared_by] for t in (k, v))
            value = torch.cat((q.chunk(size)[rank], k, v))
        elif ".gate_up." in name:
            value = torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
        elif ".mlp.up." in name or name.startswith(("embed.", "head.")):
            value = value.chunk(size)[rank]
        elif ".out.weight" in name or ".down.weight" in name:
            value = value.chunk(size, dim=1)[rank]
        elif ".out.bias" in name or ".down.bias" in name:
            value = value if rank == 0 else torch.zeros_like(value)
        parameter.data = value.clone()
    model = model.to(dtype)
    model.tie_head()
    pack_linears(model, dtype)
    return model.eval()


class Ranks:
    """The models of all ranks, and the whole one."""

    def __init__(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> None:
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        config = model_config(raw_config(name))
        weights = dict(model_of(name).named_parameters())
        weights["head.weight"] = weights.get("head.weight", weights["embed.weight"])
        whole = {name: w + 0.1 * torch.randn_like(w) for name, w in weights.items()}
        if config.tied_head:
            whole["head.weight"] = whole["embed.weight"]
        self.memories = memories_of(size, PIECE_BYTES)
        groups = [Group(rank, size, shared=m.handle) for rank, m in enumerate(self.memories)]
        self.whole = local_model(whole, config, dtype, ALONE)
        self.models = [local_model(whole, config, dtype, group) for group in groups]

    def each(
        self, run: Callable[[int], torch.Tensor], threads: Sequence[int] = (1, 1, 1, 1)
    ) -> list[torch.Tensor]:
        """run(rank) of all ranks at the same time, each with so many threads of its own."""
        before = torch.get_num_threads()

        def alone(rank: int) -> torch.Tensor:
            torch.set_num_threads(threads[rank])
            return run(rank)

        try:
            return together(self.memories, alone)
        finally:
            torch.set_num_threads(before)


def logits_of(model: Transformer, fused: bool) -> torch.Tensor:
    """Of steps of one and of several tokens behind a prompt, in three rows, the last step with an
    idle one: [3, 7, part of the vocabulary].
    """
    tokens = torch.randint(3, 90, (3, 37), generator=torch.Generator().manual_seed(1))
    cache, found = KVCache.allocate(model.config, 3, SPARE, model.dtype), []
    cache.lengths.fill_(40)
    model.hidden(tokens[:, :30], torch.arange(30).expand(3, 30), cache)
    step = FusedStep(model, cache) if fused else None
    for start, stop in ((30, 31), (31, 32), (32, 36), (36, 37)):
        positions = torch.arange(start, stop).repeat(3, 1)
        if start == 36:
            positions[1] = SPARE
        if step is None:
            logits = model.own_logits(model.hidden(tokens[:, start:stop], positions, cache))
        else:
            logits, best = step(tokens[:, start:stop], positions)
            assert best is None or torch.equal(best, logits.argmax(-1))
        found.append(logits)
    found[-1][1] = 0
    return torch.cat(found, dim=1)


SHARED_OUT = (
    "llama-biases-tied granite-biases phi-gqa-qk-norm falcon-40b gpt_neox-parallel "
    "gemma2-softcaps-window gpt2-tied bloom-4-heads"
).split()


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SHARED_OUT)
def test_ranks_equal_the_whole(name: str, size: int) -> None:
    """And their own blocks, whose sums they form in the same places."""
    ranks = Ranks(name, size)
    fused = torch.cat(ranks.each(lambda rank: logits_of(ranks.models[rank], True)), dim=-1)
    blocks = torch.cat(ranks.each(lambda rank: logits_of(ranks.models[rank], False)), dim=-1)
    for expected in (logits_of(ranks.whole, True), blocks):
        torch.testing.assert_close(fused, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcaps-window", "falcon-7b", "gpt2-tied"])
def test_ranks_in_bfloat16_equal_the_whole(name: str) -> None:
    """Each rank's part is rounded, and so is their sum."""
    ranks = Ranks(name, 2, torch.bfloat16)
    fused = torch.cat(ranks.each(lambda rank: logits_of(ranks.models[rank], True)), dim=-1)
    blocks = torch.cat(ranks.each(lambda rank: logits_of(ranks.models[rank], False)), dim=-1)
    for expected in (logits_of(ranks.whole, True), blocks):
        assert (fused - expected).abs().max() < 0.06 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_have_the_same_bits_in_any_threads_and_company(dtype: torch.dtype) -> None:
    ranks = Ranks("llama-gqa", 2, dtype)
    tokens = torch.randint(3, 90, (1, 48))

    def run(rank: int, rows: int, size: int) -> torch.Tensor:
        """Logits of the middle row, which has the tokens, read `size` at a time."""
        cache = KVCache.allocate(ranks.models[rank].config, rows, SPARE, dtype)
        step = FusedStep(ranks.models[rank], cache)
        others = torch.randint(3, 90, (rows, 48), generator=torch.Generator().manual_seed(rows))
        others[rows // 2] = tokens
        found = [
            step(others[:, i : i + size], torch.arange(i, i + size).repeat(rows, 1))[0][rows // 2]
            for i in range(0, 48, size)
        ]
        return torch.cat(found)

    expected = ranks.each(lambda rank: run(rank, 1, 1))
    for rows, size, threads in ((1, 1, (3, 2)), (1, 16, (1, 4)), (5, 3, (2, 1)), (16, 1, (3, 3))):
        found = ranks.each(lambda rank: run(rank, rows, size), threads)  # noqa: B023
        assert all(map(torch.equal, found, expected)), (rows, size, threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rank_that_ends_ends_the_steps_of_others(threads: int) -> None:
    ranks = Ranks("llama-gqa", 2)

    def run(rank: int) -> torch.Tensor:
        if rank == 1:
            time.sleep(0.05)
            ranks.memories[rank].abort()
            return torch.zeros(0)
        model = ranks.models[rank]
        step = FusedStep(model, KVCache.allocate(model.config, 1, 40, model.dtype))
        x, places = torch.zeros(1, 1, model.config.dim), torch.tensor([[0]])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="another rank has ended"):
                step.step(x, places, step.turns, True)
        return x

    ranks.each(run, (threads, threads))


def test_ranks_that_share_too_little() -> None:
    ranks = Ranks("llama-gqa", 2)
    model = ranks.models[0]
    model.group = Group(0, 2)
    assert why_no_step(model) == "its ranks share no memory"
    memory = SharedMemory.create(1, piece_bytes=4096)
    step = CpuStep(torch.float32, memory.handle)
    for parts in _parts(ranks.whole):
        assert parts is not None
        keys, values = torch.zeros(2, 16, parts.num_kv_heads, 8, parts.head_dim)
        step.add_block(parts, None, keys, values, None, None)
    wide = torch.nn.Linear(1025, 4)
    step.set_head(_parts(ranks.whole)[0].attention_norm, wide)
    with pytest.raises(ValueError, match="share 4096 bytes each cannot add up 4100"):
        step(torch.zeros(1, 1, 1025), torch.zeros(1, 1, dtype=torch.int64), [], True)


def test_built_libraries_may_be_moved(tmp_path: Path) -> None:
    """`gptfast cache load` puts them elsewhere: nothing is compiled again there."""
    shutil.copytree(cache_folder(), tmp_path / "kernels")
    code = "from gptfast.kernels.cpu_step import STEP; STEP.load(print); assert not STEP.why_not()"
    environment = {**os.environ, "GPTFAST_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == ""


@pytest.mark.slow
def test_a_processor_without_avx512(tmp_path: Path) -> None:
    """The same tests, but for packed bfloat16 weights, which have no kernel there."""
    chosen = "attention or scorings or quantized or families or eight_bits or why or ranks_equal"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    subprocess.run(
        [*command, "-k", f"({chosen}) and not avx512 and not equals"],
        env={**os.environ, "GPTFAST_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": "avx2"},
        check=True,
    )
