"""Rotary positions: scaling rules by hand and against transformers, and what a rotation is."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import LLAMA
from torch import Tensor

from gptfast.config import RopeConfig
from gptfast.families import model_config
from gptfast.rope import Rope, rotate


def angles(config: RopeConfig, head_dim: int, position: int, length: int = 1) -> Tensor:
    """Angles [D/2] at one position, from cos and sin that are not stretched by a factor."""
    cos, sin = Rope(config, head_dim)(torch.tensor([[position]]), torch.tensor([length]))
    return torch.atan2(sin, cos).flatten()


def test_plain_frequencies_by_hand() -> None:
    """Pair i of D = 4 turns by theta^(-2i/4) at each position: 1 and 1/10 for theta 100."""
    assert Rope(RopeConfig(theta=100.0), 4).inv_freq.tolist() == pytest.approx([1.0, 0.1])
    assert angles(RopeConfig(theta=100.0), 4, position=3).tolist() == pytest.approx([3.0, 0.3])


def test_shapes_and_dtype() -> None:
    positions = torch.arange(10).view(2, 5)
    cos, sin = Rope(RopeConfig(), 8)(positions, torch.tensor([5, 10]))
    assert cos.shape == sin.shape == (2, 5, 1, 4)
    assert cos.dtype == sin.dtype == torch.float32


def test_linear_divides_positions() -> None:
    scaled = RopeConfig(scaling="linear", factor=4.0)
    torch.testing.assert_close(angles(scaled, 8, 12), angles(RopeConfig(), 8, 3))


def test_dynamic_by_hand() -> None:
    """At twice the trained length and factor 3 the base grows by (3 * 2 - 2)^(4/2) = 16 for D = 4:
    the last pair turns 4 times as slowly. Rows of one batch stretch by their own lengths.
    """
    config = RopeConfig(100.0, "dynamic", factor=3.0, original_max_seq_len=8)
    cos, sin = Rope(config, 4)(torch.ones(3, 1, dtype=torch.int64), torch.tensor([2, 8, 16]))
    turned = torch.atan2(sin, cos).flatten(1)
    torch.testing.assert_close(turned, torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.025]]))


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    config = RopeConfig(500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = Rope(RopeConfig(500000.0), 128).inv_freq
    scaled = Rope(config, 128).inv_freq
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and not (short | long).all()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (between.diff() < 0).all()


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_sharpens_attention() -> None:
    config = RopeConfig(10000.0, "yarn", 4.0, 4096, attention_factor=1.25)
    plain, scaled = Rope(RopeConfig(), 128), Rope(config, 128)
    ratio = scaled.inv_freq / plain.inv_freq
    assert ratio[0] == 1.0
    assert ratio[-1].item() == pytest.approx(1 / 4)
    assert (ratio.diff() <= 1e-6).all()
    cos, sin = scaled(torch.tensor([[7]]), torch.tensor([8]))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 1.25**2))


RULES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama-3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn-without-original": {"rope_type": "yarn", "factor": 2.0},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.1,
        "original_max_position_embeddings": 4096,
    },
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 1.5,
        "attention_factor": 0.9,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 2048,
    },
}


def assert_as_transformers(rope: dict[str, Any], head_dim: int, trained: int, length: int) -> None:
    """cos and sin of a whole row of `length` tokens."""
    llama = pytest.importorskip("transformers.models.llama", reason="transformers is the oracle")
    raw = LLAMA | {"head_dim": head_dim, "max_position_embeddings": trained}
    raw |= {"rope_parameters": rope}
    del raw["rope_theta"]
    config, theirs = model_config(raw), llama.LlamaConfig.from_dict(copy.deepcopy(raw))
    positions = torch.arange(length).unsqueeze(0)
    expected = llama.modeling_llama.LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    assert config.rope is not None
    found = Rope(config.rope, head_dim)(positions, torch.tensor([length]))
    for ours, their in zip(found, expected, strict=True):
        # float32 angles of thousands of radians: rounding is 1e-4 of a radian.
        torch.testing.assert_close(
            ours[0, :, 0], their[0, :, : head_dim // 2], rtol=0, atol=1e-6 * max(100, length)
        )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rules_at_real_sizes_against_transformers(name: str, theta: float) -> None:
    assert_as_transformers(RULES[name] | {"rope_theta": theta}, 128, trained=8192, length=300)
    assert_as_transformers(RULES[name] | {"rope_theta": theta}, 64, trained=200, length=300)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["linear", "dynamic", "llama3", "yarn"]),
    theta=st.sampled_from([10.0, 50.0, 500.0, 1e4, 1e6]),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    high=st.floats(2.5, 8.0),
    head_dim=st.sampled_from([4, 8, 64, 96]),
    original=st.integers(300, 10000),
    truncate=st.booleans(),
)
# A ramp that runs backwards.
@example(
    kind="yarn",
    theta=10.0,
    factor=4.0,
    low=1.0,
    high=4.0,
    head_dim=4,
    original=10000,
    truncate=False,
)
def test_random_rules_against_transformers(
    kind: str,
    theta: float,
    factor: float,
    low: float,
    high: float,
    head_dim: int,
    original: int,
    truncate: bool,
) -> None:
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "llama3":
        rope |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": original}
    if kind == "yarn":
        rope |= {"truncate": truncate}
    assert_as_transformers(rope, head_dim, trained=40, length=60)


def test_rotation_turns_the_half_split_pairs() -> None:
    """x = (1, 0, 0, 0) and (0, 0, 1, 0) are the two halves of pair 0; pair 1 stays where it is."""
    x = torch.eye(4).view(1, 4, 1, 4)
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert rotate(x, cos, sin).view(4, 4).tolist() == [
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [-1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 500), second=st.integers(0, 500), shift=st.integers(0, 500))
def test_scores_depend_on_distance_only(first: int, second: int, shift: int) -> None:
    rope = Rope(RopeConfig(), 8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def score(q_position: int, k_position: int) -> float:
        turned = [
            rotate(x, *rope(torch.tensor([[position]]), torch.tensor([1]))).flatten()
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(turned[0] @ turned[1])

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-3)


def test_rotation_is_computed_in_float32_and_keeps_the_dtype() -> None:
    """bfloat16 cannot tell position 1000 from 1001; a rotation in it would lose the place."""
    x = torch.randn(1, 2, 1, 8).to(torch.bfloat16)
    cos_sin = Rope(RopeConfig(), 8)(torch.tensor([[1000, 1001]]), torch.tensor([1002]))
    turned = rotate(x, *cos_sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), *cos_sin).to(torch.bfloat16))


def test_frequencies_are_real_numbers_on_the_meta_device() -> None:
    with torch.device("meta"):
        ropes = [
            Rope(RopeConfig(100.0, scaling, 2.0, 64), 8)  # type: ignore[arg-type]
            for scaling in ("none", "linear", "dynamic", "llama3", "yarn")
        ]
    for rope in ropes:
        assert rope.inv_freq.device.type == "cpu"
        assert rope.inv_freq[0] > 0
    assert not list(ropes[0].state_dict())  # nothing to load or save
