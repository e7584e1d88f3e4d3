"""The same random checkpoint in the files of every engine of bench/peers.py, kept between runs.

Each engine starts from its own format, as its users do: a folder of `gptfast convert`, a Hugging
Face folder, a GGUF, an OpenVINO model. Nothing here runs a model. A folder or file appears whole or
not at all; one that is there is used again.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.convert import convert
from gptfast.families import model_config
from gptfast.quantization import quant_plan
from gptfast.rope import Rope
from gptfast.shapes import shape_config, write_random_checkpoint

# Positions that every checkpoint has at least, whatever its shape says: room for long contexts.
MIN_POSITIONS = 16384
# llama.cpp's names of its formats: the number of each in enum llama_ftype.
GGUF_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}


class Files:
    """The checkpoint of one shape under `work_dir`, in one format after another."""

    def __init__(self, work_dir: Path, shape: str, threads: int, note: Callable[[str], None]):
        self.folder, self.threads, self.note = work_dir / shape, threads, note
        raw = shape_config(shape)
        raw["max_position_embeddings"] = max(MIN_POSITIONS, raw.get("max_position_embeddings", 0))
        self.raw = raw

    def hf(self) -> Path:
        """bfloat16 weights in a Hugging Face folder: what all others are made from."""

        def write(folder: Path) -> None:
            folder.mkdir()
            write_random_checkpoint(self.raw, folder, torch.bfloat16)

        return self._made("hf", write)

    def gptfast(self, precision: str) -> Path:
        """Our own files: plain for "bf16", else rounded by the plan of that name."""

        def write(folder: Path) -> None:
            convert(source, folder, quant=None if precision == "bf16" else quant_plan(precision))

        source = self.hf()
        return self._made(f"gptfast-{precision}", write)

    def gguf(self, precision: str) -> Path:
        """A GGUF: bf16 from the tensors, the others made of that by llama.cpp itself."""
        if precision == "bf16":
            return self._made("llama-bf16.gguf", partial(write_gguf, self.hf()))
        source = self.gguf("bf16")
        write = partial(_quantize_gguf, source, GGUF_TYPES[precision], self.threads)
        return self._made(f"llama-{precision}.gguf", write)

    def openvino(self, precision: str) -> Path:
        """A stateful OpenVINO model by optimum-intel; int8 and int4-g32 (head and embedding int8)
        by NNCF, as `optimum-cli export openvino --weight-format` makes them.
        """
        if precision == "bf16":
            return self._made("openvino-bf16", partial(_export_openvino, self.hf()))
        source = self.openvino("bf16")
        return self._made(f"openvino-{precision}", partial(_compress_openvino, source, precision))

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        """The path of that name, written now if it is not there."""
        place = self.folder / name
        if not place.exists():
            self.note(f"Writing {place}")
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"part-{name}"
            _remove(part)
            try:
                write(part)
                part.rename(place)
            finally:
                _remove(part)
        return place


def missing(*packages: str) -> list[str]:
    """Those of these packages that are not installed. Imports none of them."""
    return [name for name in packages if not _is_there(name)]


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # what it stands in is not there
        return False


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# -- llama.cpp --

_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama's Hugging Face folder as a GGUF without a tokenizer: matrices as they are stored,
    norms in float32. ValueError for another model type.
    """
    import gguf  # optional: needed once, to write these files
    import numpy

    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "llama":
        raise ValueError(f"llama.cpp is given llama shapes only, not {raw['model_type']}")
    config = model_config(raw)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(raw.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, tensor in _tensors(folder):
        if ".q_proj" in name or ".k_proj" in name:
            heads = config.num_heads if ".q_proj" in name else config.num_kv_heads
            tensor = neighbouring_pairs(tensor, heads)
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            kind, words = gguf.GGMLQuantizationType.BF16, tensor.contiguous().view(torch.uint16)
            writer.add_tensor(gguf_name(name), words.numpy().view(numpy.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a published Llama tensor."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    part, _, kind = name.rpartition(".")
    if part in whole:
        return f"{whole[part]}.{kind}"
    _, _, layer, rest = part.split(".", 3)
    return f"blk.{layer}.{_BLOCK_NAMES[rest]}.{kind}"


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)


def neighbouring_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows [H * D, K] whose rotated pairs stand half a head apart, in the order in which they are
    neighbours: what llama.cpp rotates.
    """
    halves = weight.view(num_heads, 2, -1, weight.size(1))  # [H, 2, D/2, K]
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(config: ModelConfig) -> Tensor | None:
    """What llama.cpp has to divide the plain frequencies by [D/2]; None where they are plain."""
    assert config.rope is not None
    if config.rope.scaling == "none":
        return None
    plain = Rope(replace(config.rope, scaling="none"), config.head_dim)
    return plain.inv_freq / Rope(config.rope, config.head_dim).inv_freq


def _quantize_gguf(source: Path, kind: int, threads: int, path: Path) -> None:
    import llama_cpp  # optional: the engine whose files these are

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, kind
    with _quiet():
        code = llama_cpp.llama_model_quantize(bytes(source), bytes(path), params)
    if code:
        raise RuntimeError(f"llama_model_quantize ended with {code} on {source}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Sends what libraries write to this process's output and errors nowhere."""
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for target in (1, 2):
            os.dup2(nowhere, target)
        yield
    finally:
        for target, before in zip((1, 2), kept, strict=True):
            os.dup2(before, target)
            os.close(before)
        os.close(nowhere)


# -- OpenVINO --


def _export_openvino(source: Path, folder: Path) -> None:
    # Optional: these make the files, and are not needed once they are there.
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with _quiet():
        main_export(
            str(source),
            str(folder),
            task="text-generation-with-past",
            ov_config=OVConfig(dtype="bf16"),
            stateful=True,
            convert_tokenizer=False,
        )


def _compress_openvino(source: Path, precision: str, folder: Path) -> None:
    import nncf  # optional, as above
    import openvino

    modes: dict[str, dict[str, Any]] = {
        "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
        "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32, "ratio": 1.0},
    }
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("openvino_model.*"))
    with _quiet():
        model = openvino.Core().read_model(source / "openvino_model.xml")
        model = nncf.compress_weights(model, **modes[precision])
        openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


# -- how much a token reads --


def step_bytes(path: Path, raw: dict[str, Any]) -> int:
    """Bytes of a peer's files that one token reads: all, but of the embedding one row, where the
    head has a matrix of its own.
    """
    if path.suffix == ".gguf":
        import gguf

        tensors = {each.name: int(each.n_bytes) for each in gguf.GGUFReader(path).tensors}
        return sum(tensors.values()) - (
            tensors["token_embd.weight"] if "output.weight" in tensors else 0
        )
    weights = [*path.glob("*.safetensors"), *path.glob("openvino_model.bin")]
    total = sum(file.stat().st_size for file in weights)
    if raw["tie_word_embeddings"]:
        return total
    size = 1 if path.name in ("openvino-int8", "openvino-int4") else 2
    return total - size * raw["vocab_size"] * raw["hidden_size"]
