"""What readers of others' layouts refuse, in one line and before any weight is used: settings that
they do not know, and parts that do not fit together.
"""

import math
from typing import Any

import pytest
import torch
from layouts import (
    AWQ,
    BNB,
    FP8,
    GPTQ,
    awq_parts,
    compressed,
    gptq_parts,
    in_groups,
    named,
    nf4_parts,
    opened,
    packed_columns,
    packed_rows,
    read,
    some_numbers,
    some_scales,
    state,
)
from torch import Tensor


def some_parts(method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and parts of a sound module [8, 16]."""
    numbers, scales, zeros = some_numbers(8, 16, 4), some_scales(8, 2), some_numbers(8, 2, 4)
    values = torch.randn(8, 16).to(torch.float8_e4m3fn)
    weights = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}
    sound: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
        "gptq": (
            GPTQ,
            gptq_parts(numbers, scales, zeros, 4)
            | {"g_idx": torch.tensor(in_groups(16, 8), dtype=torch.int32)},
        ),
        "awq": (AWQ, awq_parts(numbers, scales, zeros)),
        "compressed": (
            compressed(weights),
            {
                "weight_packed": packed_rows(numbers, 4),
                "weight_scale": scales,
                "weight_zero_point": packed_columns(zeros, 4),
                "weight_shape": torch.tensor([8, 16]),
            },
        ),
        "int": (
            compressed({"num_bits": 4, "strategy": "channel"}),
            {
                "weight": torch.randint(-8, 8, (8, 16), dtype=torch.int8),
                "weight_scale": some_scales(8, 1),
                "weight_zero_point": torch.zeros(8, 1, dtype=torch.int8),
            },
        ),
        "float": (
            compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}),
            {
                "weight": values,
                "weight_scale": torch.ones(1),
                "weight_zero_point": torch.zeros(1, dtype=torch.int8),
            },
        ),
        "fp8": (
            FP8 | {"weight_block_size": [4, 8]},
            {"weight": values, "weight_scale_inv": torch.rand(2, 2)},
        ),
        "nf4": (BNB, nf4_parts(nested=True)[0]),
        "int8": (BNB, {"weight": torch.ones(2, 2, dtype=torch.int8), "SCB": torch.ones(2)}),
    }
    return sound[method]


ALL = ["gptq", "awq", "compressed", "int", "float", "fp8", "nf4", "int8"]
# Parts that a module may do without: there are other ways to say it, or nothing to say.
OPTIONAL = {
    "gptq": {"g_idx"},
    "compressed": {"weight_shape"},
    "int": {"weight_zero_point"},
    "float": {"weight_zero_point"},
}
PARTS = [(method, part) for method in ALL for part in some_parts(method)[1]]


@pytest.mark.parametrize("method", ALL)
def test_sound_parts_are_read(method: str) -> None:
    settings, parts = some_parts(method)
    files = opened(settings, named(parts) | {"norm.weight": torch.ones(4)})
    assert files.names == {"m.weight", "norm.weight"}
    assert files.tensor("m.weight").shape == files.shape("m.weight")


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_a_missing_part_is_named(method: str, part: str) -> None:
    settings, parts = some_parts(method)
    lacking = named({name: tensor for name, tensor in parts.items() if name != part})
    if part in OPTIONAL.get(method, ()):
        expected = opened(settings, named(parts)).tensor("m.weight")
        assert torch.equal(opened(settings, lacking).tensor("m.weight"), expected)
        return
    with pytest.raises(ValueError, match=r"somewhere: .*m\.") as error:
        opened(settings, lacking)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_a_part_of_another_shape_is_named(method: str, part: str) -> None:
    """Cut off in the middle, before any number is used."""
    settings, parts = some_parts(method)
    if method == "float" and part != "weight_scale":
        return  # one scale fits every shape; the model will not
    found = parts[part]
    cut = found.new_ones(3, 3) if found.numel() == 1 else found[: len(found) // 2]
    with pytest.raises(ValueError, match=r"somewhere: m\."):
        opened(settings, named(parts | {part: cut}))


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_a_part_of_another_dtype_is_named(method: str, part: str) -> None:
    settings, parts = some_parts(method)
    if part.startswith(("weight.quant_state", "weight_shape", "weight.nested")) or (
        method == "float" and part == "weight_zero_point"
    ):
        return  # read as what they say
    other = torch.zeros(parts[part].shape, dtype=torch.int64)
    if part == "g_idx":
        other = other.float()
    with pytest.raises(ValueError, match=rf"m\.{part} is stored as \w+; "):
        opened(settings, named(parts | {part: other}))


@pytest.mark.parametrize("group", [-1, 2])
@pytest.mark.parametrize(("method", "part"), [("gptq", "g_idx"), ("compressed", "weight_g_idx")])
def test_groups_that_there_are_not(method: str, part: str, group: int) -> None:
    settings, parts = some_parts(method)
    broken = torch.tensor(in_groups(16, 8), dtype=torch.int32)
    broken[3] = group
    with pytest.raises(ValueError, match=rf"m\.{part} names groups .*there are 2"):
        opened(settings, named(parts | {part: broken}))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed", "int", "float", "fp8", "nf4"])
def test_numbers_that_are_not_finite(method: str) -> None:
    settings, parts = some_parts(method)
    names = [name for name, part in parts.items() if part.is_floating_point()]
    for name in names:
        broken = parts[name].float().clone()
        broken.view(-1)[:] = math.nan
        files = opened(settings, named(parts | {name: broken.to(parts[name].dtype)}))
        with pytest.raises(ValueError, match=r"m\.weight has numbers that are not finite"):
            files.tensor("m.weight")


def test_zeros_where_the_settings_know_none() -> None:
    settings, parts = some_parts("gptq")
    with pytest.raises(ValueError, match=r"m\.qzeros are not all 8, though .* sym: true"):
        read(settings | {"sym": True}, parts)
    for method in ("int", "float"):
        settings, parts = some_parts(method)
        with pytest.raises(ValueError, match=r"m\.weight_zero_point is not 0"):
            read(settings, parts | {"weight_zero_point": parts["weight_zero_point"] + 1})


def test_integers_out_of_range() -> None:
    settings, parts = some_parts("int")
    with pytest.raises(ValueError, match=r"m\.weight has integers from .* says -8 to 7"):
        read(settings, parts | {"weight": parts["weight"] * 5 + 9})


def test_other_shape_than_it_says() -> None:
    settings, parts = some_parts("compressed")
    with pytest.raises(ValueError, match=r"m\.weight_shape is \[8, 15\], not \[8, 16\]"):
        read(settings, parts | {"weight_shape": torch.tensor([8, 15])})


def test_a_weight_in_e5m2() -> None:
    settings, parts = some_parts("fp8")
    with pytest.raises(ValueError, match=r"m\.weight is stored as F8_E5M2; F8_E4M3 is read there"):
        opened(settings, named(parts | {"weight": torch.zeros(8, 16).to(torch.float8_e5m2)}))


def test_small_numbers_that_nothing_explains() -> None:
    lost = {"x.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"x\.weight is stored as F8_E4M3, and nothing beside it"):
        opened(FP8, lost)


def test_damaged_state_of_bitsandbytes() -> None:
    settings, parts = some_parts("nf4")
    key = "weight.quant_state.bitsandbytes__nf4"
    for broken in (
        state(shape=[3, 5]),
        state(blocksize=8, shape=[15]),
        state(blocksize=0, shape=[]),
    ):
        with pytest.raises(ValueError, match=r"m\.weight\.quant_state.* (is damaged|has shape)"):
            opened(settings, named(parts | {key: broken}))
    layout = {"weight_format": torch.tensor(2, dtype=torch.uint8)}
    settings, parts = some_parts("int8")
    with pytest.raises(ValueError, match=r"m\.weight_format is not 0"):
        opened(settings, named(parts | layout))


PUBLISHED: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "damp_percent": 0.01, "sym": False}
        | {"desc_act": False, "static_groups": False, "true_sequential": True, "dataset": None}
        | {"model_name_or_path": None, "model_file_base_name": "model", "dynamic": None},
        "gptq",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "lm_head": False}
        | {"checkpoint_format": "gptq_v2", "format": "gptq_v2", "pack_dtype": "int32"}
        | {"meta": {"quantizer": ["gptqmodel:2.0.0"], "uri": "https", "mse": 0.0, "v2": False}},
        "gptq",
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
        | {"modules_to_not_convert": None, "backend": "autoawq", "do_fuse": False},
        "awq",
    ),
    (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        | {"weight_block_size": [4, 8], "modules_to_not_convert": ["lm_head"]},
        "fp8",
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
        | {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4"}
        | {"bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0},
        "nf4",
    ),
    (
        compressed(
            {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None}
            | {"actorder": None, "block_structure": None, "observer": "minmax", "dynamic": False},
            format="float-quantized",
            quantization_status="frozen",
            kv_cache_scheme=None,
            sparsity_config={"format": "dense", "sparsity_structure": "unstructured"},
            transform_config={},
            version="0.9.0",
        ),
        "float",
    ),
]


@pytest.mark.parametrize(("settings", "method"), PUBLISHED)
def test_settings_as_they_are_published(settings: dict[str, Any], method: str) -> None:
    """What does not change numbers may say anything."""
    _, parts = some_parts(method)
    assert opened(settings, named(parts)).formats.keys() == {"m.weight"}


def group_of(**weights: Any) -> dict[str, Any]:
    return compressed(weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantized by 'hqq'; gptq, awq, compressed-tensors, fp8"),
        ({}, "quantized by None"),
        (GPTQ | {"bits": 5}, "bits is 5; 2, 3, 4, 8"),
        ({"quant_method": "gptq", "group_size": 8}, "there is no bits"),
        (GPTQ | {"group_size": None}, "group_size is None; -1 or a count"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; gptq, gptq_v2"),
        (GPTQ | {"format": "gptq_p"}, "format is 'gptq_p'"),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "both gptq and gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"rotation": "hadamard"}, "rotation"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQ | {"dynamic": {"+:[": {}}}, r"dynamic has '\+:\['"),
        (GPTQ | {"dynamic": [1]}, r"dynamic is \[1\]"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; gemm"),
        (AWQ | {"version": "GEMV_fast"}, "version is 'gemv_fast'"),
        (AWQ | {"bits": 3}, "bits is 3; 4"),
        (AWQ | {"zero_point": False}, "zero_point is False"),
        (AWQ | {"backend": "llm-awq"}, "backend llm-awq"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; rows and columns"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; FP8"),
        (BNB | {"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4'"),
        (compressed({}, format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (compressed({}, format="marlin-24"), "format is 'marlin-24'"),
        (compressed({}, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed({}, transform_config={"config_groups": {"u": 1}}), "config_groups"),
        (compressed({}, config_groups={}), "no config_groups say how weights"),
        (compressed({}, config_groups={"W8A8": ["Linear"]}), r"W8A8 is \['Linear'\]"),
        (compressed({}, config_groups="W8A8"), "config_groups is 'W8A8'; a JSON object"),
        (compressed({}, sparsity_config="2:4"), "sparsity_config is '2:4'; a JSON object"),
        (GPTQ | {"bits": 4.0}, "bits is 4.0"),
        (GPTQ | {"bits": True}, "bits is True"),
        (GPTQ | {"dynamic": {"+:a": 8}}, r"\+:a is 8; a JSON object"),
        (GPTQ | {"meta": "gptqmodel"}, "meta is 'gptqmodel'; a JSON object"),
        (
            compressed({}, config_groups={"a": {"targets": 1, "weights": {"type": "int"}}}),
            "targets of a are 1",
        ),
        (group_of(num_bits=4, type="float"), "num_bits is 4; 8"),
        (group_of(num_bits=16), "num_bits is 16"),
        (group_of(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (group_of(strategy="group"), "group_size is None"),
        (group_of(strategy="group", group_size=-1), "groups and no group_size"),
        (group_of(strategy="block"), "block_structure is None"),
        (group_of(type="float", symmetric=False), "floats with zeros"),
        (group_of(dynamic=True), "dynamic is True"),
    ],
)
def test_settings_that_are_not_known(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        opened(settings, {"norm.weight": torch.ones(2)})
    assert str(error.value).startswith("somewhere: ") and "\n" not in str(error.value)
