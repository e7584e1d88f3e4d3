"""Mixtures of experts: only what is chosen is read, padding chooses nothing, a row is as alone.
(Routing by hand and against transformers: test_parity.py.)
"""

import pytest
import torch
from family_cases import CASES, raw_config
from torch import Tensor

from gptfast.cache import KVCache
from gptfast.experts import Experts
from gptfast.families import model_config
from gptfast.model import Transformer
from gptfast.shapes import random_model

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"]


def tiny(family: str) -> Transformer:
    name = next(name for name in CASES if name.startswith(f"{family}-"))
    return random_model(model_config(raw_config(name)), torch.float32)


def experts_of(model: Transformer) -> Experts:
    return next(module for module in model.modules() if isinstance(module, Experts))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_nobody_chose_are_not_read(family: str) -> None:
    experts = experts_of(tiny(family))
    x = torch.randn(1, 2, experts.router.weight.size(1))
    expected = experts(x)
    _, chosen = experts.router(x[0])
    others = [e for e in range(experts.expert_down.num_groups) if e not in chosen]
    assert others
    for linear in (experts.expert_gate_up, experts.expert_down):
        linear.weight[others] = torch.nan
    assert torch.equal(experts(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_goes_to_no_expert(family: str) -> None:
    """Idle rows would otherwise have most experts read at every step of the others."""
    experts = experts_of(tiny(family))
    x = torch.randn(3, 4, experts.router.weight.size(1))
    is_padding = torch.ones(3, 4, dtype=torch.bool)
    is_padding[1, :2] = False
    expected = experts(x)[1, :2]
    _, chosen = experts.router(x[1, :2])
    for linear in (experts.expert_gate_up, experts.expert_down):
        linear.weight[[e for e in range(linear.num_groups) if e not in chosen]] = torch.nan
    y = experts(x, is_padding)
    torch.testing.assert_close(y[1, :2], expected)
    assert y.isfinite().all()
    everything = experts(x, torch.ones_like(is_padding))
    assert everything.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_rows_read_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole model: groups that have rows while one of eight rows is alive."""
    model = tiny(family)
    seen: list[int] = []
    forward = type(experts_of(model).expert_down).forward

    def count(self: torch.nn.Module, x: Tensor, ends: Tensor) -> Tensor:
        seen.append(int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum()))
        return forward(self, x, ends)

    monkeypatch.setattr(type(experts_of(model).expert_down), "forward", count)
    cache = KVCache.allocate(model.config, 8, 16, torch.float32)
    positions = torch.full((8, 1), 16)
    positions[3], cache.lengths[3] = 0, 1
    model(torch.arange(8).unsqueeze(1), positions, cache)
    assert model.config.experts is not None
    assert set(seen) == {model.config.experts.num_active}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_as_it_would_be_alone(family: str) -> None:
    """Whatever other tokens go through the same experts."""
    experts = experts_of(tiny(family))
    x = torch.randn(5, 1, experts.router.weight.size(1))
    together = experts(x)
    for row in range(5):
        alone = experts(x[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)
