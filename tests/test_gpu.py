"""What only a CUDA device shows: every kernel of the decode step against its twin at real sizes,
the same tokens as the CPU, graphs that replay without copies.

All of it is skipped where there is no CUDA device.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from family_cases import CASES, raw_config
from ranks import run_ranks
from test_kernels import SCORINGS
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from gptfast.cache import KVCache, LayerCache
from gptfast.engine import Engine
from gptfast.families import FAMILIES, model_config
from gptfast.fused import block_parts
from gptfast.kernels.attention import attention, attention_reference
from gptfast.kernels.cuda_attention import decode_attention, write_heads
from gptfast.kernels.cuda_step import decode_block, why_not
from gptfast.kernels.rounding import round_vectors
from gptfast.llm import LLM
from gptfast.quantization import quant_plan
from gptfast.rope import rotate
from gptfast.runner import ModelRunner
from gptfast.sampling import SamplingParams
from gptfast.shapes import random_model, shape_config
from quantize.formats import Format
from quantize.grouped import grouped_linear, grouped_linear_reference
from quantize.kernels.cuda import CudaLinear, CudaQuantizedLinear, fused_linear
from quantize.rounding import round_to_nearest

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
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


# -- the decode step's own kernels --

BF16 = torch.bfloat16
# Heads, key/value heads, head size, slots: Llama 3.1 8B, Llama 3.2 1B, Gemma 2 2B, StarCoder.
HEADS = [(32, 8, 128, 8192), (32, 8, 64, 3000), (8, 4, 256, 1024), (48, 1, 128, 2048)]
# What a part of a real model is: a shape, and what its weights and cache are stored as.
STEPS = [
    ("llama-3.1-8b", None, "auto"),
    ("llama-3.2-1b", "int8", "int8"),
    ("llama-3.2-1b", "int4", "fp8"),
    ("llama-2-7b", "fp8", "auto"),
    ("gemma-2-2b", None, "int8"),
    ("qwen3-0.6b", "int4", "auto"),
    ("pythia-1.4b", None, "auto"),
    ("gpt2", None, "auto"),
]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|: below 0.01 for operands of 16 bits."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def places_of(num_rows: int, num_tokens: int, num_slots: int) -> Tensor:
    """Rows of all lengths, from a full cache to one token."""
    last = torch.linspace(num_slots - num_tokens, 0, num_rows).long().unsqueeze(1)
    return (last + torch.arange(num_tokens)).to(DEVICE)


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 1), (5, 1), (2, 8)])
def test_decode_attention_equals_its_reference(num_rows, num_tokens, heads, stored):
    num_heads, num_kv_heads, dim, num_slots = heads
    q = torch.randn(num_rows, num_tokens, num_heads, dim, device=DEVICE).to(BF16)
    shape = (2, num_rows, num_kv_heads, num_slots + 1, dim)
    keys, values = torch.randn(shape, device=DEVICE).to(BF16)
    scales: tuple[Tensor, ...] = ()
    if stored is not None:
        (keys, key_scales), (values, value_scales) = (
            round_vectors(tensor, stored) for tensor in (keys, values)
        )
        scales = (key_scales, value_scales)
    positions = places_of(num_rows, num_tokens, num_slots)
    for window in (None, 300):
        scoring = (None, window, None, None, None, *scales)
        found = decode_attention(q, keys, values, positions, *scoring)
        wide = (keys, values) if scales else (keys.float(), values.float())
        exact = attention_reference(q.float(), *wide, positions, *scoring)
        assert relative_error(found, exact) < 0.01


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_go_into_the_cache_as_the_cache_writes_them(interleaved, stored):
    """The same numbers, but for the last bit of a rotation."""
    bound = torch.tensor(99)
    qkv = torch.randn(16, 1, (32 + 8 + 8) * 128, device=DEVICE).to(BF16)
    positions = torch.randint(100, (16, 1), device=DEVICE)
    angles = torch.randn(16, 1, 1, 32, device=DEVICE)
    turn = (angles.cos(), angles.sin())
    caches = []
    for _ in range(2):
        shape = (16, 8, 101, 128)
        tensors = [torch.zeros(shape, dtype=stored or BF16, device=DEVICE) for _ in range(2)]
        if stored is not None:
            tensors += torch.zeros(2, *shape[:3], 1, device=DEVICE).unbind()
        caches.append(LayerCache(*tensors[:2], bound, *tensors[2:]))
    q = write_heads(qkv, caches[0], positions, turn, 32, None, None, interleaved)
    expected, k, v = qkv.unflatten(-1, (48, 128)).split((32, 8, 8), dim=2)
    expected, k = (rotate(heads, *turn, interleaved) for heads in (expected, k))
    caches[1].write(k, v, positions)
    assert relative_error(q, expected) < 1e-3
    for ours, theirs in zip(*(cache.tensors for cache in caches), strict=True):
        assert relative_error(ours.float(), theirs.float()) < 5e-3


def device_linear(plain, form):
    """A linear as `pack_linears` leaves it on a CUDA device."""
    if form == "bf16":
        return CudaLinear(plain)
    return CudaQuantizedLinear(round_to_nearest(plain.weight, Format.parse(form)), plain.bias)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4", "int4-g64-asym", "fp8"])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (1000, 2304)])
def test_linears_equal_their_twin_and_rows_have_the_same_bits(shape, form):
    num_rows, num_columns = shape
    plain = nn.Linear(num_columns, num_rows, dtype=BF16, device=DEVICE).requires_grad_(False)
    linear = device_linear(plain, form)
    x = torch.randn(16, num_columns, device=DEVICE).to(BF16)
    every = fused_linear(x, linear)
    exact = x.double() @ linear.dequantize().double().T + plain.bias.double()
    assert relative_error(every, exact) < 0.01
    for count in (1, 2, 5, 11):
        assert torch.equal(fused_linear(x[-count:].contiguous(), linear), every[-count:])


def one_layer(shape, quant):
    config = model_config(shape_config(shape, 1))
    plan = None if quant is None else quant_plan(quant)
    return random_model(config, BF16, DEVICE, quant=plan)


@pytest.mark.parametrize(("shape", "quant", "kv_cache_dtype"), STEPS)
def test_a_fused_block_equals_the_block(shape, quant, kv_cache_dtype):
    """At real sizes, over rows of different lengths, one of them idle."""
    model = one_layer(shape, quant)
    block, config = model.blocks[0], model.config
    rope = None if model.rope_of[0] is None else model.ropes[model.rope_of[0]]
    parts = block_parts(block, 0 if rope is None else rope.dim)
    assert why_not(parts, BF16, model.device) is None
    num_slots = 700
    positions = torch.tensor([[0], [num_slots], [300], [num_slots - 1]], device=DEVICE)
    x = torch.randn(4, 1, config.dim, device=DEVICE).to(BF16)
    turn = None if rope is None else rope(positions, positions[:, 0] + 1)
    results = []
    for run in (block, partial(decode_block, parts)):
        cache = KVCache.allocate(config, 4, num_slots, BF16, DEVICE, kv_cache_dtype)
        torch.manual_seed(1)
        past = torch.randn(4, 600, 2 * config.num_kv_heads, config.head_dim, device=DEVICE)
        places = torch.arange(600, device=DEVICE).expand(4, -1)
        cache.layers[0].write(*past.to(BF16).chunk(2, dim=2), places)
        results.append(run(x, positions, turn, cache.layers[0]))
    expected, found = results
    used = [0, 2, 3]
    assert found.isfinite().all()
    assert relative_error(found[used] - x[used], expected[used] - x[used]) < 0.02


@pytest.mark.parametrize("quant", [None, "int8", "int4", "fp8"])
def test_a_row_has_the_same_bits_among_1_to_16(quant):
    model = one_layer("llama-3.2-1b", quant)
    config, rope = model.config, model.ropes[0]
    parts = block_parts(model.blocks[0], rope.dim)
    cache = KVCache.allocate(config, 16, 2000, BF16, DEVICE)
    for tensor in cache.layers[0].tensors:
        tensor.normal_()
    positions = torch.randint(2000, (16, 1), device=DEVICE)
    x, turn = (
        torch.randn(16, 1, config.dim, device=DEVICE).to(BF16),
        rope(positions, positions[:, 0]),
    )
    every = decode_block(parts, x, positions, turn, cache.layers[0])
    for count in (1, 2, 5, 11):
        rows = LayerCache(*(t[:count] for t in cache.layers[0].tensors[:2]), cache.bound)
        few = [tensor[:count] for tensor in turn]
        assert torch.equal(
            decode_block(parts, x[:count], positions[:count], few, rows), every[:count]
        )


@torch.no_grad()
def test_a_replay_copies_nothing_and_serves_all_lengths():
    """One graph for a plan. What moves in a step is tokens and positions, a few bytes."""
    model = random_model(model_config(shape_config("llama-3.2-1b", 2)), BF16, DEVICE)
    runner = ModelRunner(model, 2, 4096, compile=True)
    for row in range(2):
        runner.start_row(row, [1, 2, 3], GREEDY, 0)
    places = [tensor.data_ptr() for layer in runner.cache.layers for tensor in layer.tensors]
    for num_used in (10, 300, 3000):
        runner.positions.fill_(num_used)
        runner.decode(num_used + 1)
    assert len(runner._graphs) == 1
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            runner.decode(3010)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset", "cuda"))]
    assert {"attend_parts", "split_heads", "join_parts"} <= set(kernels)
    copies = [name for name in names if name.startswith("Memcpy")]
    assert len(copies) <= 5 and not any("HtoD" in n or "DtoH" in n for n in copies), copies
    assert torch.cuda.memory_allocated() == held
    assert places == [t.data_ptr() for layer in runner.cache.layers for t in layer.tensors]


# -- models and engines --


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
    assert {plan for _, plan, _ in captured} == {"greedy", "plain"}
    llm.generate([[4, 5]], GREEDY)
    assert engine.runner._graphs == captured


@pytest.mark.parametrize(
    ("draft", "k"),
    [("draft", 1), ("draft", 5), ("draft", None), ("ngram", 3), ("layers:1", 4), ("int4-g16", 2)],
)
def test_speculation_says_what_plain_decoding_says(tmp_path: Path, draft, k):
    """Drafting and verification are a graph each; the host reads one round behind."""
    folder = tiny_llama(tmp_path / "target")
    if draft == "draft":
        draft = tiny_llama(tmp_path / "draft", num_hidden_layers=1)
    prompts = [torch.randint(3, 96, (length,)).tolist() for length in (5, 20, 2)]
    for compile in (False, True):
        facts = {"device": "cuda", "dtype": "fp32", "compile": compile, "batch_size": 2}
        plain = LLM(folder, **facts)
        llm = LLM(folder, **facts, draft=draft, speculate_k=k)
        for _ in range(2):
            found = [output.token_ids for output in llm.generate(prompts, GREEDY)]
            assert found == [output.token_ids for output in plain.generate(prompts, GREEDY)]
        sampled = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_new_tokens=20)
        assert all(len(o.token_ids) > 0 for o in llm.generate(prompts, sampled))
    if k is not None:
        alone = LLM(folder, **facts | {"batch_size": 1}, draft=draft, speculate_k=k)
        assert [o.token_ids for o in llm.generate(prompts, sampled)] == [
            alone.generate([prompt], sampled)[0].token_ids for prompt in prompts
        ]


def test_a_stop_in_the_middle_leaves_nothing_behind(tmp_path: Path):
    """The host is one step behind: the token that follows a stop must not be reported."""
    llm = LLM(tiny_llama(tmp_path), device="cuda", dtype="fp32", compile=True)
    full = llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
    stop = SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=[full[10]])
    output = llm.generate([[1, 2, 3]], stop)[0]
    first = full.index(full[10])
    assert output.token_ids == full[: first + 1] and output.finish_reason == "stop"
    assert llm.generate([[1, 2, 3]], GREEDY)[0].token_ids == full


# -- ranks: what one GPU can show of several --

# A group of one GPU, over NCCL: both ways to sum, called, compiled, captured and measured.
ONE_RANK = """
import torch
import torch.distributed as dist
from gptfast.kernels.symmetric import choose_all_reduce, device_all_reduce
from gptfast.parallel import Group

device = torch.device("cuda", 0)
torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl")
name = dist.group.WORLD.group_name
compiled = torch.compile(lambda x: device_all_reduce(x * 2, name), fullgraph=True)
for chosen in (False, True):
    if chosen:
        print(choose_all_reduce(Group(name=name), 4096, torch.bfloat16, device))
    for rows in (1, 16, 40):
        x = torch.randn(rows, 4096, device=device).bfloat16()
        assert torch.equal(device_all_reduce(x, name), x)
        assert torch.equal(compiled(x), x * 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = device_all_reduce(x, name)
        for number in (1.0, 2.0):
            x.fill_(number)
            graph.replay()
            assert torch.equal(y, x)
        graph.reset()  # or the group does not end
dist.destroy_process_group()
"""
# Two ranks with memory of one GPU, which take turns on it.
TWO_RANKS = """
import torch
import torch.distributed as dist
from gptfast.kernels.symmetric import SymmetricReduce

device = torch.device("cuda", 0)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
try:
    reduce = SymmetricReduce.start(dist.group.WORLD.group_name, device, 1 << 18)
except ValueError as error:
    print("no symmetric memory:", error)
    raise SystemExit
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1, 4096), (3, 50), (16, 2048)):
        torch.manual_seed(1)
        steps = torch.randn(5, size, *shape, device=device).to(dtype)
        x = steps[0, rank].clone()
        reduce(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = reduce(x)
        for parts in steps:
            x.copy_(parts[rank])
            graph.replay()
            torch.testing.assert_close(y, parts[0] + parts[1], rtol=1e-2, atol=1e-6)
            assert torch.equal(reduce(x), y)
torch.cuda.synchronize()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "gemma-2-2b", "pythia-1.4b", "gpt2"])
def test_a_block_with_sums_over_ranks_equals_the_fused_block(shape):
    """Of one rank: the residual is added apart, and what is summed is rounded."""
    model = one_layer(shape, None)
    config = model.config
    rope = None if model.rope_of[0] is None else model.ropes[model.rope_of[0]]
    parts = block_parts(model.blocks[0], 0 if rope is None else rope.dim)
    positions = torch.tensor([[0], [40], [7]], device=DEVICE)
    x = torch.randn(3, 1, config.dim, device=DEVICE).to(BF16)
    turn = None if rope is None else rope(positions, positions[:, 0] + 1)
    results = []
    for reduce in (None, torch.clone):
        cache = KVCache.allocate(config, 3, 64, BF16, DEVICE)
        results.append(decode_block(parts, x, positions, turn, cache.layers[0], False, reduce))
    expected, found = results
    assert relative_error(found - x, expected - x) < 0.02


def test_one_rank_sums_by_itself_and_ends():
    """In both ways. A group ends when no graph holds its sums any more: else this would wait."""
    [said] = run_ranks(1, ["-c", ONE_RANK])
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("all-reduce: ")
    print(said.stdout)


def test_two_ranks_sum_in_symmetric_memory():
    every = run_ranks(2, ["-c", TWO_RANKS], env={"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"})
    assert all(said.returncode == 0 for said in every), every[0].stderr + every[1].stderr
    if "no symmetric memory" in every[0].stdout:
        pytest.skip(every[0].stdout)


@pytest.mark.parametrize("options", [[], ["--compile"]], ids=str)
def test_two_ranks_on_one_gpu_say_what_one_process_says(tmp_path: Path, options):
    """Sums go through the host (GPTFAST_STAGED=1), so that nothing is missing but NCCL and graphs
    over it.
    """
    model = ["--model", str(tiny_llama(tmp_path)), "--device", DEVICE, "--dtype", "fp32"]
    request = ["--prompt-ids", "5,6,7", "--temperature", "0", "--max-new-tokens", "20", "--json"]
    command = ["-m", "gptfast", "generate", *model, *request, *options]
    found = []
    for size in (1, 2):
        first, *others = run_ranks(size, command, env={"GPTFAST_STAGED": "1"})
        assert first.returncode == 0, first.stderr
        assert all(said.returncode == 0 and said.stdout == "" for said in others)
        found.append(json.loads(first.stdout)["outputs"][0]["token_ids"])
    assert found[0] == found[1] and found[0]
