"""A folder that others quantized, seen through QuantizedFiles: in every layout, names and shapes
are those of the plain model, and numbers those that were stored.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
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
    packed_columns,
    packed_rows,
    plain,
    state,
)
from safetensors.torch import save_file
from tiny import LLAMA, llama_tensors, write_folder
from torch import Tensor

from gptfast.checkpoint import empty_model, inspect
from gptfast.loading import read_parameters
from gptfast.quantized_files import QuantizedFiles, quantization_settings, quantized_files
from gptfast.tensor_files import DTYPES, TensorFiles
from quantize.formats import QuantizedWeight

Parts = dict[str, Tensor]
Layout = Callable[[Tensor], tuple[Parts, Tensor]]  # weight -> its parts, and what they mean
GROUP = 16


def rounded(weight: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """To nearest, in groups of columns: integers [N, K] from -qmax to qmax, and scales [N, G]."""
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // GROUP, GROUP)
    scales = (grouped.abs().amax(-1) / qmax).half()
    numbers = (grouped / scales.float().unsqueeze(-1)).round().clamp(-qmax, qmax)
    return numbers.view(rows, columns).long(), scales


def as_gptq(weight: Tensor, act_order: bool = False) -> tuple[Parts, Tensor]:
    columns = weight.size(1)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    order = order if act_order else torch.arange(columns)
    numbers, scales = rounded(weight[:, order], 7)
    back = order.argsort()
    numbers, groups = numbers[:, back], back // GROUP
    zeros = torch.full(scales.shape, 8)
    parts = gptq_parts(numbers + 8, scales, zeros, 4) | {"g_idx": groups.int()}
    return parts, plain(numbers, scales, None, groups.tolist())


def as_awq(weight: Tensor) -> tuple[Parts, Tensor]:
    numbers, scales = rounded(weight, 7)
    zeros = torch.randint(7, 9, scales.shape)
    meant = plain(numbers + 8, scales, zeros, in_groups(weight.size(1), GROUP))
    return awq_parts(numbers + 8, scales, zeros), meant


def as_packed(weight: Tensor) -> tuple[Parts, Tensor]:
    numbers, scales = rounded(weight, 7)
    zeros = torch.randint(-1, 2, scales.shape)
    parts = {
        "weight_packed": packed_rows(numbers + 8, 4),
        "weight_scale": scales,
        "weight_zero_point": packed_columns(zeros + 8, 4),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, plain(numbers, scales, zeros, in_groups(weight.size(1), GROUP))


def as_int8(weight: Tensor) -> tuple[Parts, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scales).round().to(torch.int8)
    parts = {"weight": numbers, "weight_scale": scales.bfloat16(), "input_scale": torch.ones(1)}
    return parts, plain(numbers, scales.bfloat16(), None, [0] * weight.size(1))


def as_fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    values = (weight * 100).to(torch.float8_e4m3fn)
    rows, columns = (-(-size // GROUP) for size in weight.shape)
    scales = torch.rand(rows, columns) / 50 + 0.005
    each_row = torch.stack([scales[n // GROUP] for n in range(weight.size(0))])
    meant = plain(values.float(), each_row, None, in_groups(weight.size(1), GROUP))
    return {"weight": values, "weight_scale_inv": scales}, meant


def as_nf4(weight: Tensor) -> tuple[Parts, Tensor]:
    codes = torch.randint(0, 16, (weight.numel(),))
    table, peaks = torch.linspace(-1, 1, 16), torch.rand(-(-weight.numel() // 64)) + 0.1
    parts = {
        "weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8).unsqueeze(1),
        "weight.absmax": peaks,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": state(
            quant_type="nf4", blocksize=64, dtype="bfloat16", shape=list(weight.shape)
        ),
    }
    blocks = torch.arange(weight.numel()) // 64
    return parts, (table[codes] * peaks[blocks]).view(weight.shape)


PACKED = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}
LAYOUTS: dict[str, tuple[dict[str, Any], Layout, str | None]] = {
    "gptq": (GPTQ | {"group_size": GROUP, "sym": True}, as_gptq, "int4-g16"),
    "gptq-act": (GPTQ | {"group_size": GROUP}, lambda w: as_gptq(w, True), "int4-g16-asym"),
    "awq": (AWQ | {"group_size": GROUP}, as_awq, "int4-g16-asym"),
    "packed": (compressed(PACKED), as_packed, "int4-g16-asym"),
    "int8": (compressed({"num_bits": 8, "strategy": "channel"}), as_int8, "int8"),
    "fp8": (FP8 | {"weight_block_size": [GROUP, GROUP]}, as_fp8, "fp8-g16"),
    "nf4": (BNB, as_nf4, None),
}


LINEARS = ("qkv.weight", "out.weight", "gate_up.weight", "down.weight")  # ours


def is_linear(name: str) -> bool:
    return "proj." in name and name.endswith(".weight")


def quantized_llama(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Writes a tiny Llama with biases in a layout; returns the plain one, and the numbers that its
    quantized weights mean.
    """
    settings, layout, _ = LAYOUTS[name]
    raw = LLAMA | {"attention_bias": True, "quantization_config": settings}
    tensors = llama_tensors(raw)
    stored, meant = {}, {}
    for tensor_name, tensor in tensors.items():
        if not is_linear(tensor_name):
            stored[tensor_name] = tensor
            continue
        parts, meant[tensor_name] = layout(tensor)
        module = tensor_name.removesuffix(".weight")
        stored |= {f"{module}.{part}": numbers for part, numbers in parts.items()}
    write_folder(folder, raw, stored, num_shards=2)
    return tensors, meant


@pytest.fixture(scope="module", params=LAYOUTS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, QuantizedFiles, dict[str, Tensor], dict[str, Tensor]]]:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    tensors, meant = quantized_llama(folder, request.param)
    settings = quantization_settings(folder, json.loads((folder / "config.json").read_text()))
    assert settings is not None
    yield request.param, quantized_files(TensorFiles(folder), settings), tensors, meant


def test_names_shapes_and_dtypes_are_the_plain_ones(case) -> None:
    _, files, tensors, _ = case
    assert files.names == tensors.keys()
    for name, tensor in tensors.items():
        assert files.shape(name) == tuple(tensor.shape)
        assert DTYPES[files.dtype(name)] == files.tensor(name).dtype == torch.float32


def test_numbers_are_those_that_were_stored(case) -> None:
    _, files, tensors, meant = case
    with files.reader() as read:
        for name in files.names:
            assert torch.equal(read(name), meant.get(name, tensors[name])), name


def test_quantized_weights_are_lossless(case) -> None:
    layout, files, tensors, meant = case
    expected = LAYOUTS[layout][2]
    assert files.formats.keys() == meant.keys()
    for name in tensors:
        form = files.format(name)
        assert (form and form.name) == (expected if name in meant else None)
        if form is not None:
            weight = files.quantized(name)
            assert weight.format == form
            assert torch.equal(weight.dequantize(), meant[name])
            assert (weight.order is None) == (layout != "gptq-act")


def test_notes_say_what_is_lost(case) -> None:
    layout, files, _, _ = case
    said = " ".join(files.notes)
    assert ("dequantized" in said) == (layout == "nf4")
    assert ("activations keep their precision" in said) == (layout == "fp8")
    if layout == "nf4":
        assert said.startswith("14 weights are dequantized, because no format here has the sixteen")


def test_parts_of_one_input_share_their_order(case) -> None:
    """Queries, keys and values can be joined where columns are in the order of activations."""
    layout, files, _, _ = case
    if layout == "gptq-act":
        q, k = (files.quantized(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qk")
        assert torch.equal(q.order, k.order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_has_the_numbers_that_were_stored(tmp_path: Path, layout: str) -> None:
    """Queries, keys and values are joined, and stay in their format."""
    tensors, meant = quantized_llama(tmp_path / "quantized", layout)
    write_folder(tmp_path / "plain", LLAMA | {"attention_bias": True}, tensors | meant)
    expected, found = (parameters(tmp_path / folder) for folder in ("plain", "quantized"))
    assert found.keys() == expected.keys()
    for name, numbers in found.items():
        is_kept = name.startswith("blocks.") and name.endswith(LINEARS) and layout != "nf4"
        assert isinstance(numbers, QuantizedWeight) == is_kept, name
        numbers = numbers.dequantize() if isinstance(numbers, QuantizedWeight) else numbers
        assert torch.equal(numbers, expected[name]), name


def parameters(folder: Path) -> dict[str, Tensor | QuantizedWeight]:
    source = inspect(folder)
    model = empty_model(source.config)
    return dict(read_parameters(source, model, torch.float32, torch.device("cpu")))


def test_a_bias_of_zeros_may_be_left_out(tmp_path: Path) -> None:
    """AutoGPTQ once wrote one for every module. A norm's, or one with numbers, is never spare."""
    parts, _ = as_gptq(torch.randn(16, 16))
    tensors = {f"a.{name}": part for name, part in parts.items()}
    tensors |= {f"b.{name}": part.clone() for name, part in parts.items()}
    tensors |= {"a.bias": torch.zeros(16), "b.bias": torch.ones(16), "norm.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = quantized_files(TensorFiles(tmp_path), LAYOUTS["gptq"][0])
    assert [name for name in sorted(files.names) if files.is_spare_bias(name)] == ["a.bias"]


def test_settings_without_quantized_weights(tmp_path: Path) -> None:
    """As where somebody dequantized the weights and left config.json as it was."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    files = quantized_files(TensorFiles(tmp_path), FP8)
    assert files.names == {"a.weight"} and files.formats == {}
    assert files.notes == ("no weight is quantized, though the settings say so",)


def test_a_shard_that_was_cut_off(tmp_path: Path) -> None:
    """A quantized tensor that half arrived is found before any weight is used."""
    quantized_llama(tmp_path, "awq")
    [shard, _] = sorted(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{shard.name}: not a complete safetensors file"):
        quantized_files(TensorFiles(tmp_path), LAYOUTS["awq"][0])


def test_a_module_that_lost_a_part(tmp_path: Path) -> None:
    parts, _ = as_awq(torch.randn(16, 16))
    tensors = {f"a.{name}": part for name, part in parts.items() if name != "scales"}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        quantized_files(TensorFiles(tmp_path), LAYOUTS["awq"][0])
    assert str(error.value) == f"{tmp_path}: a.scales is missing beside a.qweight, a.qzeros"


# -- where the settings stand --


def test_settings_of_config_json_come_first(tmp_path: Path) -> None:
    assert quantization_settings(tmp_path, {}) is None
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert quantization_settings(tmp_path, {}) == {"quant_method": "gptq", "bits": 4}
    raw = {"quantization_config": {"quant_method": "awq"}}
    assert quantization_settings(tmp_path, raw) == {"quant_method": "awq"}
    old = quantization_settings(tmp_path, {"compression_config": {"format": "pack-quantized"}})
    assert old == {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("quant_config.json", '{"w_bit": 4}', {"quant_method": "awq", "w_bit": 4}),
        (
            "hf_quant_config.json",
            '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}',
            {"quant_method": "modelopt", "quant_algo": "FP8"},
        ),
    ],
)
def test_settings_in_files_of_their_own(
    tmp_path: Path, file: str, text: str, expected: dict[str, Any]
) -> None:
    (tmp_path / file).write_text(text)
    assert quantization_settings(tmp_path, {}) == expected


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization_config is 'int4'; a JSON object"):
        quantization_settings(tmp_path, {"quantization_config": "int4"})
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": 8}')
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quantization is 8; a JSON object"):
        quantization_settings(tmp_path, {})
    (tmp_path / "quant_config.json").write_text("[")
    with pytest.raises(ValueError, match="not valid JSON"):
        quantization_settings(tmp_path, {})
