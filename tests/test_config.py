"""ModelConfig and RopeConfig check themselves: what does not fit together is a ValueError."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from gptfast.config import ModelConfig, RopeConfig

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=10,
    dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    hidden_dim=12,
    max_seq_len=16,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=RopeConfig(),
    tied_head=False,
)
SIZES = "vocab_size dim num_layers num_heads num_kv_heads head_dim hidden_dim max_seq_len".split()


def test_it_is_frozen_and_hashable() -> None:
    with pytest.raises(FrozenInstanceError):
        LLAMA.dim = 16  # type: ignore[misc]
    assert hash(LLAMA) == hash(replace(LLAMA))


def test_counts_by_hand() -> None:
    """embed and head 2 * 80; a layer: qkv 16 x 8, out 8 x 8, norms 2 * 8, MLP 3 * 8 * 12; norm 8.
    Keys and values: 2 layers, 2 heads of 2 numbers, 2 bytes each.
    """
    layer = 16 * 8 + 8 * 8 + 2 * 8 + 3 * 8 * 12
    assert LLAMA.num_parameters == 2 * 80 + 2 * layer + 8
    assert replace(LLAMA, tied_head=True).num_parameters == LLAMA.num_parameters - 80
    assert LLAMA.cache_bytes_per_token(2) == 2 * 2 * 2 * 2 * 2


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, "12", 2.0, True, None, [8]])
def test_sizes_are_positive_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*positive whole number"):
        replace(LLAMA, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "3 attention heads cannot share 2 key/value heads"),
        ({"head_dim": 3}, "even head size, found 3"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"norm_eps": math.inf}, "norm_eps is inf"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"tied_head": "false"}, "tied_head is 'false'; true or false"),
        ({"qkv_bias": 1}, "qkv_bias is 1; true or false"),
        ({"mlp_bias": None}, "mlp_bias is None"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'"),
        ({"bos_token_id": [1]}, r"bos_token_id is \[1\]"),
        ({"eos_token_ids": ("</s>",)}, "eos_token_ids are"),
        ({"eos_token_ids": (2, None)}, "eos_token_ids are"),
        ({"eos_token_ids": (True,)}, "eos_token_ids are"),
    ],
)
def test_facts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, **changes)


def test_prefixes_are_reusable_unless_keys_depend_on_the_length() -> None:
    for scaling in ("none", "linear", "dynamic", "llama3", "yarn"):
        rope = RopeConfig(scaling=scaling, factor=2.0, original_max_seq_len=8)
        assert replace(LLAMA, rope=rope).prefixes_are_reusable == (scaling != "dynamic")
    assert replace(LLAMA, rope=None).prefixes_are_reusable


def test_learned_positions_need_no_even_head() -> None:
    assert replace(LLAMA, head_dim=3, rope=None).rope is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"theta": 0.0}, "must both be positive"),
        ({"theta": math.nan}, "must both be positive"),
        ({"scaling": "linear", "factor": -2.0}, "must both be positive"),
        ({"scaling": "dynamic", "factor": 2.0}, "'dynamic' needs the original context"),
        ({"scaling": "yarn", "factor": 2.0}, "'yarn' needs the original context"),
        (
            {"scaling": "llama3", "original_max_seq_len": 8, "low_freq_factor": 4.0},
            "high_freq_factor .4.0. > low_freq_factor .4.0.",
        ),
        ({"scaling": "yarn", "original_max_seq_len": 8, "theta": 1.0}, r"theta \(1.0\) above 1"),
        ({"scaling": "yarn", "original_max_seq_len": 8, "beta_slow": -1.0}, "positive beta_fast"),
    ],
)
def test_rope_facts_that_do_not_fit(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**facts)
