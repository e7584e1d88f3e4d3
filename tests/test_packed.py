"""Weights packed for the CPU against F.linear on the plain weight."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from quantize import packed as prepacked
from quantize.grouped import GroupedLinear, PackedGroupedLinear, grouped_linear
from quantize.packed import PackedLinear
from quantize.packing import pack_linears

needs_packing = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN on this CPU has no bfloat16",
)


def linear(in_features: int, out_features: int, bias: bool, dtype=torch.bfloat16) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (33, 7), (256, 1)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (5,), (1, 300)])
def test_packed_equals_plain(rows, in_features, out_features, bias):
    plain = linear(in_features, out_features, bias)
    x = torch.randn(*rows, in_features, dtype=torch.bfloat16)
    packed = PackedLinear(plain)(x)
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    assert packed.shape == exact.shape
    torch.testing.assert_close(packed.double(), exact, rtol=2**-7, atol=2**-7)


@needs_packing
def test_packed_weight_comes_back_bit_for_bit():
    plain = linear(100, 36, bias=False)
    packed = PackedLinear(plain)
    assert torch.equal(packed.dequantize(), plain.weight)
    assert packed.weight_bytes == 100 * 36 * 2


@needs_packing
def test_packed_weights_are_freed_with_their_module():
    gc.collect()
    before = len(prepacked._packed_weights)
    packed = PackedLinear(linear(8, 8, bias=False))
    assert len(prepacked._packed_weights) == before + 1
    del packed
    gc.collect()
    assert len(prepacked._packed_weights) == before


@needs_packing
def test_two_packed_layers_share_one_compiled_graph():
    layers = [PackedLinear(linear(32, 32, bias=False)) for _ in range(3)]
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    for layer in layers:
        assert torch.equal(run(layer, x), layer(x))
    assert counter.frame_count == 1


@needs_packing
def test_only_bfloat16_linears_with_a_weight_of_their_own_are_packed():
    model = nn.ModuleDict(
        {
            "own": linear(16, 16, bias=True),
            "wide": linear(16, 16, bias=False, dtype=torch.float32),
            "table": nn.Embedding(16, 16, dtype=torch.bfloat16),
            "tied": linear(16, 16, bias=False),
            "experts": GroupedLinear(2, 16, 16, bias=False).bfloat16(),
            "wide_experts": GroupedLinear(2, 16, 16, bias=False),
        }
    )
    model["tied"].weight = model["table"].weight
    pack_linears(model)
    assert isinstance(model["own"], PackedLinear)
    assert isinstance(model["wide"], nn.Linear)
    assert isinstance(model["tied"], nn.Linear)
    assert isinstance(model["experts"], PackedGroupedLinear)
    assert isinstance(model["wide_experts"], GroupedLinear)


def grouped(bias: bool) -> GroupedLinear:
    layer = GroupedLinear(4, 33, 24, bias).bfloat16().requires_grad_(False)
    layer.weight.normal_()
    if layer.bias is not None:
        layer.bias.normal_()
    return layer


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 1, 0, 0], [0, 0, 0, 0]], ids=str)
def test_packed_groups_equal_plain_ones(counts, bias):
    plain = grouped(bias)
    packed, ends = PackedGroupedLinear(plain), torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), 33, dtype=torch.bfloat16)
    exact = grouped_linear(
        x.double(), plain.weight.double(), plain.bias.double() if bias else None, ends
    )
    assert packed(x, ends).shape == exact.shape
    torch.testing.assert_close(packed(x, ends).double(), exact, rtol=2**-7, atol=2**-5)
    assert torch.equal(packed.dequantize(), plain.weight)
    assert packed.weight_bytes == plain.weight_bytes == 4 * 24 * 33 * 2


@needs_packing
def test_packed_groups_are_freed_and_share_a_compiled_graph():
    gc.collect()
    before = len(prepacked._packed_weights)
    layers = [PackedGroupedLinear(grouped(bias=True)) for _ in range(2)]
    assert len(prepacked._packed_weights) == before + 8
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda layer, x, ends: layer(x, ends), backend=counter, fullgraph=True)
    x, ends = torch.randn(5, 33, dtype=torch.bfloat16), torch.tensor([0, 2, 2, 5])
    for layer in layers:
        assert torch.equal(run(layer, x, ends), layer(x, ends))
    assert counter.frame_count == 1
    del layers, layer, run
    torch._dynamo.reset()
    gc.collect()
    assert len(prepacked._packed_weights) == before


def test_nothing_is_packed_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(linear(16, 16, bias=False))
    pack_linears(model)
    assert isinstance(model[0], nn.Linear)
