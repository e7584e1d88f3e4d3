"""Formats of a linear's weight against F.linear on the plain weight."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from quantize import formats
from quantize.formats import PackedLinear, pack_linears

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
    before = len(formats._packed_weights)
    packed = PackedLinear(linear(8, 8, bias=False))
    assert len(formats._packed_weights) == before + 1
    del packed
    gc.collect()
    assert len(formats._packed_weights) == before


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
        }
    )
    model["tied"].weight = model["table"].weight
    pack_linears(model)
    assert isinstance(model["own"], PackedLinear)
    assert isinstance(model["wide"], nn.Linear)
    assert isinstance(model["tied"], nn.Linear)


def test_nothing_is_packed_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(linear(16, 16, bias=False))
    pack_linears(model)
    assert isinstance(model[0], nn.Linear)
