"""The CUDA decode step in Triton's interpreter: each kernel against its plain twin, whole blocks
against their own `forward`. tests/test_gpu.py has the same on a device.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import triton_interpreter  # noqa: F401 (before any kernel)
from family_cases import CASES, raw_config
from torch import Tensor, nn

from gptfast.cache import KV_CACHE_DTYPES, KVCache, LayerCache
from gptfast.families import model_config
from gptfast.fused import _norm as norm_facts
from gptfast.fused import block_parts
from gptfast.kernels import cuda_attention
from gptfast.kernels.attention import attention_reference
from gptfast.kernels.cuda_attention import (
    add_normed,
    attention_on_cuda,
    decode_attention,
    why_no_attention,
    write_heads,
)
from gptfast.kernels.cuda_step import CudaStep, Reduce, decode_block, why_not
from gptfast.kernels.parts import BlockParts, Norm
from gptfast.kernels.rounding import round_vectors
from gptfast.layers import RMSNorm
from gptfast.model import Transformer
from gptfast.parallel import Group
from gptfast.rope import rotate
from gptfast.shapes import random_model
from gptfast.sharding import local_config, shard_of
from quantize.formats import Format
from quantize.kernels.cuda import CudaLinear, CudaQuantizedLinear
from quantize.linear import QuantizedLinear
from quantize.rounding import round_to_nearest

Results = TypeVar("Results")

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_SLOTS = 200
# Beyond one block of slots, at its edges, and three rows of different lengths.
PLACES = {
    "one": [[150]],
    "edges": [[63], [64], [128]],
    "rows": [[0], [199], [77]],
    "draft": [[60, 61, 62, 63, 64], [3, 4, 5, 6, 7]],
    "many": [list(range(100, 116))],
}
SCORINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 70},
    "window-of-one": {"window": 1},
    "softcap-sinks": {"softcap": 0.8, "sinks": torch.tensor([2.0, -1.0, 0.5, 4.0])},
    "slopes-window": {"slopes": torch.tensor([0.5, 0.25, 1.0, 0.1]), "window": 9},
}


def random_slots(num_rows: int, num_tokens: int, heads: tuple[int, int], dim: int) -> list[Tensor]:
    """q, keys and values for NUM_SLOTS slots."""
    q = torch.randn(num_rows, num_tokens, heads[0], dim)
    return [q, *torch.randn(2, num_rows, heads[1], NUM_SLOTS + 1, dim)]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", SCORINGS)
def test_attention_is_its_reference(name: str, places: str) -> None:
    positions = torch.tensor(PLACES[places])
    q, keys, values = random_slots(*positions.shape, (4, 2), 16)
    y = decode_attention(q, keys, values, positions, **SCORINGS[name])
    expected = attention_reference(q, keys, values, positions, **SCORINGS[name])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "dim"), [((3, 3), 24), ((40, 2), 8), ((5, 1), 40)])
def test_heads_of_any_number_and_size(heads: tuple[int, int], dim: int) -> None:
    """Groups that fill no block of 16, or more than one; heads that are no power of two."""
    positions = torch.tensor([[130, 131], [20, 21]])
    q, keys, values = random_slots(2, 2, heads, dim)
    y = decode_attention(q, keys, values, positions)
    torch.testing.assert_close(
        y, attention_reference(q, keys, values, positions), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("window", [None, 300])
def test_a_part_of_several_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four programs for each head, as where there are many heads, a part is up to three blocks
    of slots, and the largest score of any of them counts.
    """
    monkeypatch.setattr(cuda_attention, "NUM_PROGRAMS", 8)
    num_slots, positions = 700, torch.tensor([[699], [420]])
    q = 3 * torch.randn(2, 1, 4, 8)
    keys, values = torch.randn(2, 2, 2, num_slots + 1, 8)
    y = decode_attention(q, keys, values, positions, window=window)
    expected = attention_reference(q, keys, values, positions, window=window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    alone = decode_attention(q[1:], keys[1:], values[1:], positions[1:], window=window)
    assert torch.equal(alone, y[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
def test_caches_of_every_dtype(dtype: torch.dtype, stored: torch.dtype | None) -> None:
    positions = torch.tensor([[150, 151], [3, 4]])
    q, keys, values = (t.to(dtype) for t in random_slots(2, 2, (4, 2), 16))
    scales: tuple[Tensor, ...] = ()
    if stored is not None:
        (keys, *key_scales), (values, *value_scales) = (
            round_vectors(tensor, stored) for tensor in (keys, values)
        )
        scales = (*key_scales, *value_scales)
    none = (None,) * 5
    y = decode_attention(q, keys, values, positions, *none, *scales)
    wide = (keys, values) if scales else (keys.float(), values.float())
    expected = attention_reference(q.float(), *wide, positions, *none, *scales)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 70])
def test_only_slots_in_use_are_read(window: int | None) -> None:
    """What lies beyond a row's length, or before its window's block, is not even multiplied by
    zero.
    """
    positions = torch.tensor([[150], [199]])
    q, keys, values = random_slots(2, 1, (4, 2), 16)
    expected = attention_reference(q, keys, values, positions, window=window)
    for tensor in (keys, values):
        tensor[0, :, 151:] = torch.nan
        tensor[1, :, NUM_SLOTS:] = torch.nan
        if window is not None:
            tensor[:, :, :64] = torch.nan
    y = decode_attention(q, keys, values, positions, window=window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
def test_a_token_has_the_same_bits_alone_in_a_batch_and_in_a_draft(window: int | None) -> None:
    positions = torch.tensor([[124, 125, 126, 127, 128, 129], [10, 11, 12, 13, 14, 15]])
    q, keys, values = (t.bfloat16() for t in random_slots(2, 6, (6, 2), 16))
    together = decode_attention(q, keys, values, positions, window=window)
    for row, token in ((0, 0), (0, 4), (1, 5)):
        rows, tokens = slice(row, row + 1), slice(token, token + 1)
        inputs = (q[rows, tokens].contiguous(), keys[rows], values[rows], positions[rows, tokens])
        alone = decode_attention(*inputs, window=window)
        assert torch.equal(alone[0, 0], together[row, token])


@pytest.mark.parametrize("name", SCORINGS)
def test_padding_is_zero_and_disturbs_nobody(name: str) -> None:
    """Row 1 is idle, row 2 ends in padding."""
    q, keys, values = random_slots(3, 2, (4, 2), 16)
    keys[:, :, NUM_SLOTS], values[:, :, NUM_SLOTS] = torch.nan, torch.nan
    positions = torch.tensor([[140, 141], [NUM_SLOTS, NUM_SLOTS], [90, NUM_SLOTS]])
    y = decode_attention(q, keys, values, positions, **SCORINGS[name])
    is_padding = positions == NUM_SLOTS
    assert (y[is_padding] == 0).all()
    keys[:, :, NUM_SLOTS], values[:, :, NUM_SLOTS] = 0.0, 0.0
    expected = attention_reference(q, keys, values, positions, **SCORINGS[name])
    torch.testing.assert_close(y[~is_padding], expected[~is_padding], rtol=1e-5, atol=1e-5)


# -- heads into the cache --


def empty_cache(num_rows: int, heads: int, dim: int, stored: torch.dtype | None) -> LayerCache:
    shape, bound = (num_rows, heads, 20, dim), torch.tensor(19)
    keys, values = (torch.zeros(shape, dtype=stored or torch.float32) for _ in range(2))
    if stored is None:
        return LayerCache(keys, values, bound)
    return LayerCache(keys, values, bound, *torch.zeros(2, *shape[:3], 1))


def norms(kind: str, dim: int) -> tuple[Callable[[Tensor], Tensor], Norm | None]:
    """A norm with weights, as a function and as `write_heads` takes it."""
    if kind == "none":
        return nn.Identity(), None
    weight, bias = torch.randn(dim), torch.randn(dim)
    if kind == "layer":
        norm = Norm(weight, bias, 1e-5, True, False)
        return lambda x: nn.functional.layer_norm(x, (dim,), weight, bias, 1e-5), norm
    module = RMSNorm(dim, 1e-5, offset=kind == "offset")
    module.weight.data = weight
    return module, Norm(weight, None, 1e-5, False, kind == "offset")


@pytest.mark.parametrize("kind", ["none", "rms", "offset", "layer"])
@pytest.mark.parametrize("rotary_dim", [0, 6, 12])
@pytest.mark.parametrize("interleaved", [False, True])
@torch.no_grad()
def test_heads_are_normed_rotated_and_cached(kind: str, rotary_dim: int, interleaved: bool) -> None:
    (q_norm, q_facts), (k_norm, k_facts) = norms(kind, 12), norms(kind, 12)
    qkv = torch.randn(2, 3, (4 + 2 + 2) * 12)
    positions = torch.tensor([[4, 5, 19], [0, 1, 2]])
    angles = torch.randn(2, 3, 1, rotary_dim // 2)
    cos_sin = (angles.cos(), angles.sin()) if rotary_dim else None
    found, expected = empty_cache(2, 2, 12, None), empty_cache(2, 2, 12, None)
    y = write_heads(qkv, found, positions, cos_sin, 4, q_facts, k_facts, interleaved)
    q, k, v = qkv.unflatten(-1, (8, 12)).split((4, 2, 2), dim=2)
    q, k = q_norm(q), k_norm(k)
    if cos_sin is not None:
        q, k = rotate(q, *cos_sin, interleaved), rotate(k, *cos_sin, interleaved)
    expected.write(k, v, positions)
    for ours, theirs in ((y, q), *zip(found.tensors, expected.tensors, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_turns_of_the_tokens_or_of_all_slots() -> None:
    qkv, positions = torch.randn(2, 3, 8 * 12), torch.tensor([[4, 5, 19], [0, 1, 2]])
    angles = torch.randn(1, 20, 1, 3)
    here = angles[0, positions]  # [B, T, 1, R / 2]
    results = []
    for turn, by_position in ((here, False), (angles, True)):
        cache, cos_sin = empty_cache(2, 2, 12, None), (turn.cos(), turn.sin())
        q = write_heads(qkv, cache, positions, cos_sin, 4, by_position=by_position)
        results.append((q, *cache.tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_rotated_keys_are_rounded_to_the_dtype_of_the_model_first() -> None:
    """A cache of eight bits holds what one of sixteen would, rounded once more."""
    qkv, positions = torch.randn(16, 1, 5 * 64).bfloat16(), torch.randint(19, (16, 1))
    angles = torch.randn(16, 1, 1, 32)
    found, expected = (empty_cache(16, 1, 64, torch.int8) for _ in range(2))
    write_heads(qkv, found, positions, (angles.cos(), angles.sin()), 3)
    _, k, v = qkv.unflatten(-1, (5, 64)).split((3, 1, 1), dim=2)
    expected.write(rotate(k, angles.cos(), angles.sin()), v, positions)
    assert all(map(torch.equal, found.tensors, expected.tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_heads_are_rounded_as_the_cache_rounds(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Every bit, over many sizes; zeros stay zeros, and a vector with NaN or infinity shows it."""
    qkv = torch.randn(2, 5, 5 * 12) * torch.logspace(-30, 30, 60)
    qkv[0, 0, 36:], qkv[0, 1, 40], qkv[0, 2, 50] = 0.0, torch.nan, torch.inf
    qkv = qkv.to(dtype)
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 9, 2, 3, 4]])
    found, expected = empty_cache(2, 1, 12, stored), empty_cache(2, 1, 12, stored)
    write_heads(qkv, found, positions, None, 3)
    _, k, v = qkv.unflatten(-1, (5, 12)).split((3, 1, 1), dim=2)
    expected.write(k, v, positions)
    assert found.key_scales is not None and expected.key_scales is not None
    torch.testing.assert_close(
        found.key_scales, expected.key_scales, rtol=0, atol=0, equal_nan=True
    )
    is_number = expected.key_scales.isfinite().expand_as(found.keys)
    assert not is_number.all()
    assert torch.equal(found.keys.float()[is_number], expected.keys.float()[is_number])
    is_number = expected.value_scales.isfinite().expand_as(found.values)
    assert torch.equal(found.values.float()[is_number], expected.values.float()[is_number])


@pytest.mark.parametrize("kind", ["rms", "offset", "layer"])
@torch.no_grad()
def test_a_normed_result_is_added(kind: str) -> None:
    norm, facts = norms(kind, 40)
    x, y = torch.randn(2, 3, 40)
    assert facts is not None
    expected = torch.add(x, norm(y), alpha=0.3)
    torch.testing.assert_close(add_normed(x, y, facts, 0.3), expected, rtol=1e-5, atol=1e-5)


# -- blocks --

FAMILIES = [
    "llama-biases-tied",
    "mistral-window",
    "qwen3-head-dim",
    "granite-multipliers",
    "smollm3-nope-layers",
    "stablelm-sequential-biases",
    "gemma2-softcaps-window",
    "gemma3_text-two-ropes-pattern",
    "gpt_neox-parallel",
    "gptj-partial-rotary",
    "falcon-7b",
    "gpt2-tied",
    "opt-tied",
    "bloom-6-heads-untied",
]


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = random_model(model_config(raw_config(name)), dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that matter
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def step_parts(model: Transformer) -> list[BlockParts]:
    """The blocks taken apart, with the linears of a CUDA device."""

    def cuda(linear: nn.Module) -> nn.Module:
        if isinstance(linear, QuantizedLinear):
            return CudaQuantizedLinear(linear.quantized, linear.bias)
        assert type(linear) is nn.Linear
        return CudaLinear(linear)

    found = []
    for block, rope in zip(model.blocks, model.rope_of, strict=True):
        parts = block_parts(block, 0 if rope is None else model.ropes[rope].dim)
        assert parts is not None
        names = ("qkv", "out", "up", "down")
        found.append(replace(parts, **{name: cuda(getattr(parts, name)) for name in names}))
    return found


def both_steps(
    model: Transformer, lengths: list[int], num_tokens: int = 1, kv_cache_dtype: str = "auto"
) -> Iterator[tuple[Tensor, KVCache]]:
    """Hidden states and cache after a step of rows that hold so many tokens (-1: idle), by the
    blocks themselves and by `decode_block`.
    """
    num_rows, num_slots = len(lengths), 40
    prompts = torch.randint(3, model.config.vocab_size, (num_rows, num_slots))
    for parts in (None, step_parts(model)):
        cache = KVCache.allocate(
            model.config, num_rows, num_slots, model.dtype, kv_cache_dtype=kv_cache_dtype
        )
        for row, length in enumerate(lengths):
            if length > 0:
                places = torch.arange(length).unsqueeze(0)
                model.hidden(prompts[row : row + 1, :length], places, cache.row(row))
        starts = torch.tensor([[length] for length in lengths])
        positions = torch.where(starts < 0, num_slots, starts + torch.arange(num_tokens))
        cache.lengths.copy_(positions[:, -1] + 1)
        tokens = prompts.gather(1, positions.clamp(max=num_slots - 1))
        queue = iter(parts or ())

        def run(block: nn.Module, *inputs: Any, queue: Iterator[BlockParts] = queue) -> Tensor:
            return decode_block(next(queue), *inputs)

        yield model.hidden(tokens, positions, cache, run if parts else None), cache


def assert_close_steps(
    steps: Iterator[tuple[Tensor, KVCache]], lengths: list[int], tolerance: float
) -> None:
    (expected, cache), (found, fused_cache) = steps
    used = [row for row, length in enumerate(lengths) if length >= 0]
    assert found.isfinite().all()
    torch.testing.assert_close(found[used], expected[used], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(fused_cache.layers, cache.layers, strict=True):
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            a, b = a[used].float(), b[used].float()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_fused_block_is_the_block(name: str) -> None:
    """Three rows of different lengths, one of them idle."""
    lengths = [17, -1, 4]
    assert_close_steps(both_steps(tiny_model(name), lengths), lengths, 2e-5)


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "gemma2-softcaps-window", "gemma3_text-two-ropes-pattern", "gpt2-tied"],
)
@torch.no_grad()
def test_a_step_is_the_model(name: str) -> None:
    """Embedding to logits, with turns of every position."""
    model = tiny_model(name)
    tokens, positions = torch.tensor([[5], [6], [7]]), torch.tensor([[12], [40], [3]])
    caches = [KVCache.allocate(model.config, 3, 40, torch.float32) for _ in range(2)]
    for cache in caches:
        cache.lengths.copy_(positions[:, 0] + 1)
        torch.manual_seed(3)
        for layer in cache.layers:
            for tensor in layer.tensors:
                tensor.normal_()
    expected = model(tokens, positions, caches[0])
    step = CudaStep()
    for parts, rope, layer in zip(step_parts(model), model.rope_of, caches[1].layers, strict=True):
        assert layer.values is not None
        step.add_block(parts, rope, layer.keys, layer.values, None, None)
    norm = norm_facts(model.norm)
    assert norm is not None
    step.set_head(norm, CudaLinear(model.head))
    turns = [rope(torch.arange(41).unsqueeze(0), caches[1].lengths) for rope in model.ropes]
    found, best = step(model.embedded(tokens, positions), positions, turns, True)
    assert best is None
    found, used = model.scaled(found), [0, 2]
    torch.testing.assert_close(found[used], expected[used], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_a_fused_block_reads_several_tokens_of_a_row() -> None:
    lengths = [12, 3]
    assert_close_steps(both_steps(tiny_model("llama-gqa"), lengths, 5), lengths, 2e-5)


@torch.no_grad()
def test_a_fused_block_in_bfloat16() -> None:
    lengths = [17, -1, 4]
    model = tiny_model("qwen3-head-dim", torch.bfloat16)
    for name, module in list(model.named_modules()):
        if hasattr(module, "handle"):  # packed for this CPU
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            plain.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    assert_close_steps(both_steps(model, lengths), lengths, 6e-2)


@pytest.mark.parametrize("kv_cache_dtype", [name for name in KV_CACHE_DTYPES if name != "auto"])
@torch.no_grad()
def test_a_fused_block_with_a_cache_of_8_bits(kv_cache_dtype: str) -> None:
    """Keys that differ in the last bit may be rounded to different steps."""
    lengths = [17, -1, 4]
    steps = both_steps(tiny_model("qwen3-head-dim"), lengths, kv_cache_dtype=kv_cache_dtype)
    (expected, cache), (found, fused_cache) = steps
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=2e-2, atol=2e-2)
    ours, theirs = fused_cache.layers[0], cache.layers[0]
    assert ours.key_scales is not None and theirs.key_scales is not None
    torch.testing.assert_close(ours.key_scales[0], theirs.key_scales[0], rtol=1e-5, atol=1e-5)
    differ = (ours.keys[0].float() != theirs.keys[0].float()).float().mean()
    assert differ < 0.01, f"{differ:.1%} of the stored numbers differ"


@pytest.mark.parametrize("form", ["int8", "int4-g16", "int4-g16-asym"])
@torch.no_grad()
def test_a_fused_block_of_quantized_weights(form: str) -> None:
    lengths = [17, -1, 4]
    model = tiny_model("llama-biases-tied")
    for block in model.blocks:
        for owner, name in (
            (block.attention, "qkv"),
            (block.attention, "out"),
            (block.mlp, "gate_up"),
            (block.mlp, "down"),
        ):
            linear = getattr(owner, name)
            weight = round_to_nearest(linear.weight, Format.parse(form))
            setattr(owner, name, QuantizedLinear(weight, linear.bias))
    assert_close_steps(both_steps(model, lengths), lengths, 2e-4)


@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    model = tiny_model("llama-gqa")
    parts, config = step_parts(model)[0], model.config
    cache = KVCache.allocate(config, 3, 40, torch.float32)
    for tensor in cache.layers[0].tensors:
        tensor.normal_()
    x, positions = torch.randn(3, 1, config.dim), torch.tensor([[7], [30], [12]])
    angles = torch.randn(3, 1, 1, parts.rotary_dim // 2)
    turn = (angles.cos(), angles.sin())
    together = decode_block(parts, x, positions, turn, cache.layers[0])
    for row in range(3):
        part = slice(row, row + 1)
        here = (angles[part].cos(), angles[part].sin())
        alone = decode_block(parts, x[part], positions[part], here, cache.row(row).layers[0])
        assert torch.equal(alone, together[part])


def test_what_no_kernel_does_is_said() -> None:
    [parts, *_] = step_parts(tiny_model("llama-gqa"))
    cpu, float32 = torch.device("cpu"), torch.float32
    assert why_not(parts, float32, cpu) is None
    for change, dtype, device, reason in (
        ({}, torch.float64, cpu, "float64"),
        ({}, float32, torch.device("mps"), "mps"),
        ({"head_dim": 264}, float32, cpu, "264"),
        ({"out": nn.Identity()}, float32, cpu, "Identity"),
        ({"activation": "tanh"}, float32, cpu, "tanh"),
    ):
        found = why_not(replace(parts, **change), dtype, device)
        assert found is not None and reason in found
    assert why_not(None, float32, cpu) is not None


@pytest.mark.parametrize("change", ["latents", "dtype", "gaps", "size"])
def test_what_the_attention_does_not_read_is_read_by_the_plain_one(change: str) -> None:
    """The op of a CUDA device answers all the same."""
    q, keys, values = random_slots(2, 1, (4, 2), 16)
    if change == "latents":
        values = keys[..., :8]
    elif change == "dtype":
        q = q.double()
    elif change == "gaps":
        keys = keys.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        q, keys, values = (torch.cat([t] * 20, dim=-1) for t in (q, keys, values))
    assert why_no_attention(keys, values, None, q.dtype) is not None
    keys, positions = keys.to(q.dtype), torch.tensor([[9], [150]])
    y = attention_on_cuda(q, keys, values.to(q.dtype), positions)
    expected = attention_reference(q, keys, values, positions)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    q = torch.randn(2, 9, 4, keys.size(-1), dtype=q.dtype)  # 18 tokens
    positions = positions + torch.arange(9)
    y = attention_on_cuda(q, keys, values.to(q.dtype), positions)
    expected = attention_reference(q, keys, values, positions)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_every_family_is_run_by_the_step_or_says_why() -> None:
    """Blocks of a kind that is not taken apart are known by name: none is lost by accident."""
    others = set()
    for name in CASES:
        with torch.device("meta"):
            model = Transformer(model_config(raw_config(name)))
        if any(block_parts(block, 0) is None for block in model.blocks):
            others.add(name.split("-")[0])
    experts = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"}
    assert others == experts | {"olmo2", "stablelm", "mpt"}


def test_the_step_compiles_for_hopper(tmp_path: Path) -> None:
    """What the interpreter accepts is not yet what hardware takes."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, str(REPOSITORY / "tests" / "compile_for_hopper.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    kernels = [json.loads(line) for line in process.stdout.splitlines()]
    assert {"split_heads", "attend_parts", "join_parts", "add_normed"} < {
        kernel["kernel"] for kernel in kernels
    }
    for kernel in kernels:
        assert kernel["stack"] <= 64, f"registers are spilled: {kernel}"
        assert kernel["shared"] <= 227 << 10, f"a multiprocessor has less: {kernel}"
        if kernel["kernel"] == "attend_parts" and "fp32" not in kernel["case"]:
            assert {"mma.sync", "cp.async.cg"} < kernel.keys(), f"slow instructions: {kernel}"


# -- a share of the heads and hidden units --


class Lockstep:
    """Ranks in threads, of which one runs at a time (Triton's interpreter has one grid in all). A
    rank goes on behind a sum when all have given their part.
    """

    def __init__(self, size: int) -> None:
        self.given: list[list[Tensor]] = [[] for _ in range(size)]
        self._turn, self._all_given = threading.Lock(), threading.Barrier(size)

    def reduce(self, rank: int, x: Tensor) -> Tensor:
        """The sum of what every rank gives as its n-th."""
        self.given[rank].append(x)
        number = len(self.given[rank]) - 1
        self._turn.release()
        try:
            self._all_given.wait(timeout=60)
        finally:
            self._turn.acquire()
        return torch.stack([given[number] for given in self.given]).sum(0)

    def run(self, function: Callable[[int], Results]) -> list[Results]:
        """What `function(rank)` returns."""

        def in_turn(rank: int) -> Results:
            try:
                with self._turn:
                    return function(rank)
            except BaseException:
                self._all_given.abort()
                raise

        with ThreadPoolExecutor(len(self.given)) as pool:
            return list(pool.map(in_turn, range(len(self.given))))


def share_of(whole: Transformer, group: Group) -> Transformer:
    """What a rank has of a model."""
    found = Transformer(local_config(whole.config, group), group)
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in found.named_parameters(remove_duplicate=False):
        shard, full = shard_of(name, whole.config, group), parameters[name]
        held = [full[index] for index in shard.indices(full.dim())]
        part = held[0] if len(held) == 1 else torch.cat(held, shard.rows_dim)
        parameter.copy_(torch.zeros_like(part) if shard.is_elsewhere else part)
    return found


def step_logits(model: Transformer, xs: list[Tensor], reduce: Reduce | None) -> list[Tensor]:
    """Logits [B, T, V] of this model's rows of the head, for a text x that begins and a token
    behind it.
    """
    cache = KVCache.allocate(model.config, xs[0].size(0), 40, torch.float32)
    step = CudaStep(reduce)
    for parts, rope, layer in zip(step_parts(model), model.rope_of, cache.layers, strict=True):
        assert layer.values is not None
        step.add_block(parts, rope, layer.keys, layer.values, None, None)
    norm = norm_facts(model.norm)
    assert norm is not None
    step.set_head(norm, CudaLinear(model.head))
    found, start = [], 0
    for x in xs:
        positions = (start + torch.arange(x.size(1))).expand(x.shape[:2]).contiguous()
        start += x.size(1)
        cache.lengths.fill_(start)
        turns = [rope(torch.arange(41).unsqueeze(0), cache.lengths) for rope in model.ropes]
        found.append(model.scaled(step(x, positions, turns, True)[0]))
    return found


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-gqa", 4),  # more than key/value heads
        ("gemma2-softcaps-window", 2),
        ("granite-multipliers", 2),
        ("gpt_neox-parallel", 2),
        ("gpt2-tied", 2),
    ],
)
@torch.no_grad()
def test_ranks_together_are_the_model(name: str, size: int) -> None:
    """Each with its heads, hidden units and rows of the head, and two sums a block."""
    model = tiny_model(name)
    tokens, positions = torch.randint(3, model.config.vocab_size, (1, 3)), torch.arange(3)[None]
    expected, embedded = model(tokens, positions), model.embedded(tokens, positions)
    shares = [share_of(model, Group(rank, size)) for rank in range(size)]
    lockstep = Lockstep(size)
    found = lockstep.run(
        lambda rank: step_logits(
            shares[rank], list(embedded.split((2, 1), 1)), partial(lockstep.reduce, rank)
        )
    )
    for logits, exact in zip(zip(*found, strict=True), expected.split((2, 1), 1), strict=True):
        torch.testing.assert_close(torch.cat(logits, -1), exact, rtol=5e-5, atol=5e-5)
    shapes = [list(x.shape) for x in lockstep.given[0]]
    num_sums = 2 * model.config.num_layers
    assert shapes == [[2, model.config.dim]] * num_sums + [[1, model.config.dim]] * num_sums


@torch.no_grad()
def test_a_sum_over_one_rank_changes_nothing() -> None:
    model = tiny_model("granite-multipliers")
    x = [torch.randn(1, 1, model.config.dim)]
    [expected], [found] = (step_logits(model, x, reduce) for reduce in (None, lambda y: y))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
