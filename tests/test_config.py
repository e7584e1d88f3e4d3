"""ModelConfig and its parts check themselves: what does not fit together is a ValueError. Counts of
weights, by hand and against the modules that hold them.
"""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from family_cases import CASES, raw_config

from gptfast.config import ExpertsConfig, LatentConfig, ModelConfig, RopeConfig
from gptfast.families import model_config
from gptfast.model import Transformer

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
EXPERTS = ExpertsConfig(num_experts=4, num_active=2, hidden_dim=6)
LATENT = LatentConfig(kv_rank=3, nope_dim=2, rope_dim=2, value_dim=5)
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


def test_counts_of_experts_by_hand() -> None:
    """A layer: attention and norms as above; a router 4 x 8, four experts of 3 * 8 * 6. Two are
    active.
    """
    sparse = 16 * 8 + 8 * 8 + 2 * 8 + 4 * 8 + 4 * 3 * 8 * 6
    config = replace(LLAMA, experts=EXPERTS)
    assert config.num_parameters == 2 * 80 + 2 * sparse + 8
    assert config.num_active_parameters == config.num_parameters - 2 * 2 * 3 * 8 * 6
    dense = 16 * 8 + 8 * 8 + 2 * 8 + 3 * 8 * 12
    config = replace(LLAMA, experts=replace(EXPERTS, dense_layers=(0,)))
    assert config.num_parameters == 2 * 80 + dense + sparse + 8
    assert config.num_active_parameters == config.num_parameters - 2 * 3 * 8 * 6
    assert [config.has_experts(layer) for layer in (0, 1)] == [False, True]
    assert LLAMA.num_active_parameters == LLAMA.num_parameters


def test_counts_of_latent_attention_by_hand() -> None:
    """Queries 4 * 4 x 8; latent and shared key 5 x 8 with a norm of 3; keys and values of 4 heads
    4 * 7 x 3; out 8 x 4 * 5. The cache holds the latent and the rotated key.
    """
    config = replace(LLAMA, latent=LATENT, head_dim=4, num_kv_heads=4)
    layer = 16 * 8 + 5 * 8 + 3 + 28 * 3 + 8 * 20 + 2 * 8 + 3 * 8 * 12
    assert config.num_parameters == 2 * 80 + 2 * layer + 8
    assert config.cache_bytes_per_token(2) == 2 * 5 * 2
    assert config.cache_shape == (1, 5, 0)


def mixtral() -> ModelConfig:
    return ModelConfig(
        model_type="mixtral",
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        max_seq_len=32768,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=RopeConfig(1e6),
        tied_head=False,
        experts=ExpertsConfig(num_experts=8, num_active=2, hidden_dim=14336),
    )


def test_mixtral_has_12_9_of_46_7_billion_weights_active() -> None:
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096
    outside = 2 * 32000 * 4096 + 4096 + 32 * (attention + 2 * 4096 + 8 * 4096)
    expert = 3 * 4096 * 14336
    assert mixtral().num_parameters == outside + 32 * 8 * expert == 46_702_792_704
    assert mixtral().num_active_parameters == outside + 32 * 2 * expert == 12_879_925_248


def test_deepseek_v2_lite_has_2_7_of_15_7_billion_weights_active() -> None:
    """27 layers, the first dense; 64 experts of 1408 units, six active, two shared (as one)."""
    config = replace(
        mixtral(),
        vocab_size=102400,
        dim=2048,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        hidden_dim=10944,
        latent=LatentConfig(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        experts=ExpertsConfig(
            num_experts=64,
            num_active=6,
            hidden_dim=1408,
            shared_hidden_dim=2816,
            dense_layers=(0,),
        ),
    )
    attention = 16 * 192 * 2048 + 576 * 2048 + 512 + 16 * 256 * 512 + 2048 * 16 * 128
    outside = 2 * 102400 * 2048 + 2048 + 27 * (attention + 2 * 2048) + 3 * 2048 * 10944
    outside += 26 * (64 * 2048 + 3 * 2048 * 2816)
    expert = 3 * 2048 * 1408
    assert config.num_parameters == outside + 26 * 64 * expert == 15_706_484_224
    assert config.num_active_parameters == outside + 26 * 6 * expert == 2_661_150_208


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_modules(name: str) -> None:
    """Ours and transformers', of every family; there corrections of routers are buffers."""
    raw = raw_config(name)
    config = model_config(raw)
    with torch.device("meta"):
        ours = Transformer(config)
        assert config.num_parameters == sum(p.numel() for p in ours.parameters())
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**raw)
        )
    corrections = [b for key, b in theirs.named_buffers() if key.endswith("correction_bias")]
    tensors = [*theirs.parameters(), *corrections]
    assert config.num_parameters == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_what_the_facts_say(name: str) -> None:
    """Active weights are all but those of idle experts, and a token's share of the cache is what
    the layers keep of it.
    """
    config = model_config(raw_config(name))
    with torch.device("meta"):
        model = Transformer(config)
    idle = 0
    for module in model.modules():
        if config.experts is not None and hasattr(module, "num_groups"):
            idle_share = config.experts.num_experts - config.experts.num_active
            each = sum(p.numel() for p in module.parameters()) // config.experts.num_experts
            idle += idle_share * each
    assert config.num_active_parameters == config.num_parameters - idle
    assert (idle > 0) == (config.experts is not None)


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
        ({"shared_norm": True}, "share a norm only where"),
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
        ({"windows": (4,)}, "1 attention windows for 2 layers"),
        ({"windows": (4, 4, None)}, "3 attention windows for 2 layers"),
        ({"windows": (4, 0)}, "sliding window is 0"),
        ({"windows": (4, "x")}, "sliding window is 'x'"),
        ({"alibi": (0.5,)}, "1 alibi slopes for 4 heads"),
        ({"attention_scale": 0.0}, "attention_scale is 0.0"),
        ({"attention_softcap": -1.0}, "attention_softcap is -1.0"),
        ({"logits_softcap": math.nan}, "logits_softcap is nan"),
        ({"qkv_clip": math.inf}, "qkv_clip is inf"),
        ({"qkv_clip": "6"}, "qkv_clip is '6'"),
        ({"parallel_residual": None}, "parallel_residual is None"),
        ({"rope": RopeConfig(dim=4)}, "even head size, found 4 .of heads of 2"),
        ({"local_rope": RopeConfig(dim=4)}, "even head size, found 4"),
        ({"latent": replace(LATENT, rope_dim=3)}, "even head size, found 3"),
        (
            {"rope": RopeConfig(scaling="longrope", original_max_seq_len=8, short_factors=(1.0,))},
            "longrope has 0 factors; one for each of 1",
        ),
    ],
)
def test_facts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_active": 5}, "5 of 4 experts cannot be active"),
        ({"num_groups": 3}, "4 experts in 3 groups"),
        ({"num_groups": 2, "num_active_groups": 3}, "of which 3 are active"),
        ({"num_groups": 4, "num_active": 2}, "2 experts are active for a token; .* have 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"hidden_dim": "6"}, "hidden_dim is '6'"),
        ({"num_active": True}, "num_active is True"),
    ],
)
def test_experts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EXPERTS, **changes)


@pytest.mark.parametrize("name", "kv_rank nope_dim rope_dim value_dim q_rank".split())
@pytest.mark.parametrize("value", [0, -1, 2.0, "3"])
def test_sizes_of_latent_attention(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*positive whole number"):
        replace(LATENT, **{name: value})


def test_how_long_a_prefix_serves_other_texts() -> None:
    """Everywhere, but for keys that depend on the length: as long as it is within the original
    context.
    """
    for scaling in ("none", "linear", "dynamic", "llama3", "yarn"):
        rope = RopeConfig(scaling=scaling, factor=2.0, original_max_seq_len=8)
        expected = 8 if scaling == "dynamic" else LLAMA.max_seq_len
        assert replace(LLAMA, rope=rope).max_reusable_length == expected
        assert replace(LLAMA, local_rope=rope).max_reusable_length == expected
    longrope = RopeConfig(
        scaling="longrope", original_max_seq_len=5, short_factors=(1.0,), long_factors=(2.0,)
    )
    assert replace(LLAMA, rope=longrope).max_reusable_length == 5
    assert replace(LLAMA, rope=None).max_reusable_length == 16


def test_what_each_layer_has() -> None:
    config = replace(
        LLAMA,
        num_layers=3,
        windows=(4, None, 4),
        local_rope=RopeConfig(theta=5.0),
        nope_layers=(2,),
    )
    assert [config.window(layer) for layer in range(3)] == [4, None, 4]
    assert [config.layer_rope(layer) for layer in range(3)] == [
        RopeConfig(theta=5.0),
        RopeConfig(),
        None,
    ]
    assert LLAMA.window(1) is None and LLAMA.layer_rope(1) == RopeConfig()


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
        ({"scaling": "longrope"}, "'longrope' needs the original context"),
        ({"dim": 3}, "3 rotated numbers of a head; an even count"),
        ({"dim": 0}, "0 rotated numbers of a head"),
    ],
)
def test_rope_facts_that_do_not_fit(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**facts)
