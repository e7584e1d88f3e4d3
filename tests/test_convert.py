"""`gptfast convert`: there and back for every family, and that a broken run leaves nothing. What it
reads of other formats is in test_foreign.py, adapters in test_lora.py.
"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, cases_of, raw_config, write_checkpoint
from safetensors.torch import load_file
from tiny import LLAMA, llama_tensors, tiny_gpt2, tiny_llama, write_folder
from torch import Tensor

from gptfast import device
from gptfast.checkpoint import FORMAT_KEY, inspect
from gptfast.commands import main
from gptfast.convert import convert
from gptfast.families import FAMILIES
from gptfast.hub import find_model
from gptfast.llm import LLM
from gptfast.loading import load
from gptfast.sampling import SamplingParams
from gptfast.shards import Stored, write_tensors
from gptfast.tensor_files import TensorFiles

REPOSITORY = Path(__file__).resolve().parents[1]
# One of each family, and those whose names follow from more than the model_type.
ROUND_TRIPS = sorted(
    {cases_of(family)[0] for family in FAMILIES}
    | {"llama-biases-tied", "deepseek_v2-groups", "falcon-40b", "falcon-11b", "falcon-rw-alibi"}
)
SAME_LOGITS = (
    "llama-biases-tied gpt2-tied gemma2-softcaps-window qwen3_moe-normalised falcon-40b "
    "deepseek_v3-groups-yarn phi3-fused-window"
).split()
INDEX = "model.safetensors.index.json"


def refused(*words: str, source: Path, out: Path, **options: Any) -> None:
    """A ValueError of one line with all `words`, after which `out` and its neighbours are as they
    were.
    """
    before = listing(out.parent)
    with pytest.raises(ValueError) as caught:
        convert(source, out, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert listing(out.parent) == before


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_same_model(folder: Path, other: Path, dtype: str = "auto") -> None:
    expected = dict(load(other, dtype).named_parameters())
    for name, parameter in load(folder, dtype).named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name


# -- there and back --


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_every_family_goes_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    source, own = write_checkpoint(tmp_path / "source", name), tmp_path / "own"
    convert(source, own)
    assert {n: t.shape for n, t in stored(own).items()} == {
        n: p.shape for n, p in load(source).named_parameters()
    }
    assert config_of(own)[FORMAT_KEY] == 1
    assert_same_model(own, source)
    for number, folder in enumerate((own, source)):
        back = tmp_path / f"back{number}"
        convert(folder, back, "hf")
        assert_same_tensors(stored(back), stored(source))
        assert config_of(back) == config_of(source) | {"torch_dtype": "float32"}


@pytest.mark.parametrize("name", SAME_LOGITS)
def test_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    source = write_checkpoint(tmp_path / "source", name)
    convert(source, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", "hf")
    ids = torch.arange(3, 15).unsqueeze(0)
    expected, found = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (source, tmp_path / "back")
    )
    assert expected.std() > 0.1 and torch.equal(found, expected)


def test_mxfp4_stays_or_becomes_plain_numbers(tmp_path: Path) -> None:
    """Half of gpt-oss's experts in the published form; the other files are those of the case."""
    name = cases_of("gpt_oss")[0]
    raw = raw_config(name) | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    source = write_checkpoint(tmp_path / "source", name, raw)
    tensors = {n: t.bfloat16() for n, t in stored(source).items()}
    for name in [n for n in tensors if n.endswith("down_proj")]:
        num_experts, columns, rows = tensors.pop(name).shape
        shape = (num_experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
    raw |= {"quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "bfloat16"}
    write_folder(source, raw, tensors)
    convert(source, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", "hf")
    modules = config_of(tmp_path / "own")["quantization_config"]["modules"]
    assert list(modules) == ["mxfp4"] and all("down" in name for name in modules["mxfp4"])
    assert "quantization_config" not in config_of(tmp_path / "back")
    expected = load(source, "fp32", quant="none")
    for folder in ("own", "back"):
        found = load(tmp_path / folder, "fp32", quant="none")
        for name, parameter in expected.named_parameters():
            assert torch.equal(found.get_parameter(name), parameter), name
    weights = stored(tmp_path / "back")
    assert weights.keys() == {n.removesuffix("_blocks").removesuffix("_scales") for n in tensors}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_model_inside_of_a_multimodal_one(tmp_path: Path) -> None:
    """Our own files keep config.json; Hugging Face's are those of the language model alone."""
    text = LLAMA | {"torch_dtype": "float32"}
    raw = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 8}}
    tensors = {f"language_model.{n}": t for n, t in llama_tensors(LLAMA).items()}
    vision = {"vision_tower.layer.weight": torch.ones(2, 2)}
    source = write_folder(tmp_path / "source", raw, tensors | vision)
    result = convert(source, tmp_path / "own", dtype="fp16")
    assert result.left_out == "1 tensors of vision_tower"
    assert config_of(tmp_path / "own")["vision_config"] == {"hidden_size": 8}
    assert inspect(tmp_path / "own").dtype == torch.float16
    assert_same_model(tmp_path / "own", source, "fp16")
    convert(source, tmp_path / "hf", "hf")
    assert_same_tensors(stored(tmp_path / "hf"), llama_tensors(LLAMA))
    assert config_of(tmp_path / "hf") == text


def test_a_head_stored_beside_a_tied_one(tmp_path: Path) -> None:
    raw = LLAMA | {"tie_word_embeddings": True}
    tensors = llama_tensors(raw)
    same = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    source = write_folder(tmp_path / "source", raw, tensors | same)
    convert(source, tmp_path / "back", "hf")
    assert_same_tensors(stored(tmp_path / "back"), tensors)
    write_folder(source, raw, tensors | {"lm_head.weight": torch.ones(96, 32)})
    refused("lm_head.weight differs", source=source, out=tmp_path / "own")


# -- what is written --


def test_dtypes(tmp_path: Path) -> None:
    """The router's correction stays float32; config.json says the new dtype, in either spelling."""
    name = cases_of("deepseek_v3")[0]
    raw = raw_config(name) | {"dtype": "float32"}
    source = write_checkpoint(tmp_path / "source", name, raw)
    for to, correction in (("gptfast", "router.correction"), ("hf", "e_score_correction_bias")):
        out = tmp_path / to
        result = convert(source, out, to, "bf16")
        assert result.dtype == torch.bfloat16 and result.num_bytes < 2.2 * result.num_parameters
        for tensor_name, tensor in stored(out).items():
            wide = tensor_name.endswith(correction)
            assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), tensor_name
        assert config_of(out)["dtype"] == "bfloat16" and "torch_dtype" not in config_of(out)
        assert_same_model(out, source, "bf16")
    convert(tmp_path / "gptfast", tmp_path / "wide", dtype="fp32")
    assert_same_model(tmp_path / "wide", tmp_path / "gptfast", "fp32")


def test_shards(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", torch_dtype="bfloat16")
    limit = 10_000
    for to in ("gptfast", "hf"):
        out = tmp_path / to
        convert(source, out, to, shard_bytes=limit)
        index = json.loads((out / INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
        count = len(names)
        assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        assert count > 2 and sorted(p.name for p in out.glob("*.safetensors")) == names
        for name in names:
            tensors = load_file(out / name)
            assert {n for n, shard in index["weight_map"].items() if shard == name} == set(tensors)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
        assert_same_model(out, source)
    convert(source, tmp_path / "one", shard_bytes=1 << 30)
    assert [p.name for p in (tmp_path / "one").iterdir() if p.suffix == ".safetensors"] == [
        "model.safetensors"
    ]
    assert not (tmp_path / "one" / INDEX).exists()


def test_numbers_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    """Whatever order they are named in: pages of the file are computed with as they are."""
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(5, 2),
        "half": torch.randn(6).half(),
        "other": torch.randn(1, 3),
    }
    entries = {name: Stored(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(tmp_path, entries, reversed(tensors.items()))
    assert_same_tensors(stored(tmp_path), tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert (8 + size) % 64 == 0
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0


def test_the_bundled_model_tells_the_same_story(tmp_path: Path) -> None:
    """With its tokenizer, and stop tokens from generation_config.json."""
    convert(find_model("storyteller"), tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", "hf")
    params = SamplingParams(temperature=0, max_new_tokens=12)
    prompts = ["Once upon a time", "The little dog"]
    texts = [
        [output.text for output in LLM(model, device="cpu").generate(prompts, params)]
        for model in ("storyteller", tmp_path / "own", tmp_path / "hf")
    ]
    assert len(texts[0][0]) > 20 and texts[0] == texts[1] == texts[2]


def test_what_stands_beside_the_weights_is_copied(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    copied = (
        "tokenizer.json tokenizer_config.json generation_config.json special_tokens_map.json "
        "vocab.json merges.txt tokenizer.model tokenizer.model.v3 qwen.tiktoken "
        "chat_template.jinja additional_chat_templates/tools.jinja LICENSE.txt"
    ).split()
    for name in [*copied, "trainer_state.json", "optimizer.pt", "README.md", "onnx/model.jinja"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}" if name.endswith(".json") else name)
    result = convert(source, tmp_path / "own")
    assert result.has_tokenizer
    kept = listing(tmp_path / "own").keys()
    folders = {"additional_chat_templates"}
    assert kept == {*copied, *folders, "config.json", "model.safetensors"}
    assert (tmp_path / "own" / "merges.txt").read_text() == "merges.txt"
    plain = tiny_gpt2(tmp_path / "plain")
    assert not convert(plain, tmp_path / "without").has_tokenizer


def test_own_weights_are_the_pages_of_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not copied where nothing is to be converted; writing to them changes no file; and
    the file may be replaced while they are in use.
    """
    source, own = tiny_llama(tmp_path / "source"), tmp_path / "own"
    convert(source, own)
    content = (own / "model.safetensors").read_bytes()
    empty, allocated = torch.empty, []

    def recorded(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        allocated.extend([] if tensor.device.type == "meta" else [tensor])
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    load(source)
    assert allocated
    allocated.clear()
    model = load(own)
    assert not allocated
    load(own, "bf16")
    assert allocated
    with torch.no_grad():
        model.norm.weight.fill_(7)
    assert (own / "model.safetensors").read_bytes() == content
    convert(tiny_llama(tmp_path / "other", rms_norm_eps=0.1), own, overwrite=True)
    assert_same_model(own, tmp_path / "other")
    assert model.norm.weight.eq(7).all()
    expected = load(source)
    assert torch.equal(model.embed.weight, expected.embed.weight)


def test_numbers_that_lie_at_odd_places_are_read(tmp_path: Path) -> None:
    """Another program may write our names with a header of any length."""
    source, own = tiny_llama(tmp_path / "source"), tmp_path / "own"
    convert(source, own)
    data = (own / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for padding in range(1, 4):
        header = data[8 : 8 + size] + b" " * padding
        moved = len(header).to_bytes(8, "little") + header + data[8 + size :]
        (own / "model.safetensors").write_bytes(moved)
        assert_same_model(own, source)
        assert all(p.data_ptr() % 4 == 0 for p in load(own).parameters())


def test_weights_in_use_are_no_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts pages of files as available, and a cache sized by that would drive the
    weights out of memory.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    size = 40_000_000
    tensor = torch.zeros(size // 4)
    write_tensors(tmp_path, {"weight": Stored(tensor.dtype, tensor.shape)}, [("weight", tensor)])
    files = TensorFiles(tmp_path)
    before = device._mapped()
    weight = files.mapped("weight")
    assert weight.sum() == 0  # an old system reads the pages only now
    assert 0.9 * size < device._mapped() - before < 1.5 * size
    del weight
    assert device._mapped() - before < 0.1 * size
    monkeypatch.setattr(device, "_mapped", lambda: 1 << 50)
    assert device.free_memory(torch.device("cpu")) == 0


# -- nothing under the final name before all is there --


def test_places_that_are_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    refused("inside", source=source, out=source)
    refused("inside", source=source, out=source / "own")
    refused("inside", source=source, out=tmp_path / "source" / ".." / "source" / "own")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    refused("exists", "--force", source=source, out=tmp_path / "there")
    words = tmp_path / "words"
    words.mkdir()
    (words / "letter.txt").write_text("dear")
    refused("no folder with a checkpoint", source=source, out=words, overwrite=True)
    refused("no folder", source=source, out=words / "letter.txt", overwrite=True)
    (tmp_path / "link").symlink_to(tiny_gpt2(tmp_path / "other"))
    refused("no folder", source=source, out=tmp_path / "link", overwrite=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused("exists", "--force", source=source, out=tmp_path / "dangling")
    outer = tiny_llama(tmp_path / "outer")
    refused("would be replaced", source=tiny_gpt2(outer / "inner"), out=outer, overwrite=True)
    refused("unknown", "gptfast, hf", source=source, out=tmp_path / "own", to="gguf")
    refused("leave out --config", source=source, out=tmp_path / "own", facts=tmp_path / "x.json")


def test_only_a_complete_checkpoint_replaces_another(tmp_path: Path) -> None:
    first, out = tiny_llama(tmp_path / "first"), tmp_path / "out"
    second = tiny_gpt2(tmp_path / "second")
    convert(first, out, shard_bytes=10_000)
    with pytest.raises(KeyboardInterrupt):
        convert(second, out, overwrite=True, progress=interrupted(KeyboardInterrupt))
    assert_same_model(out, first)
    convert(second, out, overwrite=True)
    assert_same_model(out, second)
    assert listing(out).keys() == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "out"}


def test_what_is_no_checkpoint_is_never_lost(tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "source"), tiny_gpt2(tmp_path / "out")
    (out / "notes.txt").write_text("years of work")
    tiny_gpt2(out / "another")
    words = ("would be lost", "another, notes.txt")
    refused(*words, source=source, out=out, overwrite=True)
    links = tmp_path / "links"
    links.mkdir()
    for path in (out / "another").iterdir():
        (links / path.name).symlink_to(path)
    refused("would be replaced", source=links, out=out / "another", overwrite=True)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    convert(source, out)
    assert_same_model(out, source)


def test_numbers_beyond_float16_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    source = write_folder(tmp_path / "source", LLAMA, tensors)
    words = ("blocks.1.mlp.gate_up.weight", "float16", "bf16")
    refused(*words, source=source, out=tmp_path / "own", dtype="fp16")
    convert(source, tmp_path / "own", dtype="bf16")


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = tiny_llama(tmp_path / "source")
    with pytest.raises(ValueError, match="cannot be made"):
        convert(source, tmp_path / "file" / "out")


def interrupted(error: type[BaseException]) -> Any:
    def progress(items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 3:
                raise error
            yield item

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_broken_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    source = tiny_llama(tmp_path / "source")
    with pytest.raises(error):
        convert(source, tmp_path / "own", progress=interrupted(error))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tiny_llama(tmp_path / "first"), tmp_path / "out"
    convert(first, out)
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError):
        convert(tiny_gpt2(tmp_path / "second"), out, overwrite=True)
    assert_same_model(out, first)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "out"}


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "source", torch_dtype="bfloat16")
    with files_of_at_most(20_000):
        refused(str(tmp_path), "as it was", source=source, out=tmp_path / "own")
    needed = 2 * inspect(source).config.num_parameters
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    refused("43.33 kB", "nothing was written", source=source, out=tmp_path / "own")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    convert(source, tmp_path / "own")


def test_the_folder_is_as_open_as_others(tmp_path: Path) -> None:
    convert(tiny_llama(tmp_path / "source"), tmp_path / "deep" / "own")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "deep" / "own").stat().st_mode == (tmp_path / "usual").stat().st_mode


# -- the command --


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_llama(tmp_path / "source")
    own = str(tmp_path / "own")
    assert main(["convert", str(source), own, "--dtype", "bf16"]) == 0
    result = capsys.readouterr()
    assert result.out == f"{own}: 21,664 parameters in bfloat16, 43.33 kB\n"
    assert "No tokenizer" in result.err
    assert main(["convert", str(source), own]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gptfast: error: ") and "--force" in error and error.count("\n") == 1
    assert main(["convert", own, str(source), "--force", "--to", "hf"]) == 0
    assert FORMAT_KEY not in config_of(source)
    assert main(["convert", str(tmp_path / "nowhere"), own]) == 2
    assert "no model at" in capsys.readouterr().err


def test_the_door_opens_from_another_folder(tmp_path: Path) -> None:
    door = [sys.executable, str(REPOSITORY / "scripts" / "convert.py"), "--help"]
    result = subprocess.run(door, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for word in (
        "--to",
        "--lora",
        "--allow-pickle",
        "--force",
        "llama2.c",
        "nanoGPT",
        "params.json",
    ):
        assert word in result.stdout


def test_every_family_has_a_case_here() -> None:
    assert {name.split("-")[0] for name in ROUND_TRIPS} == set(FAMILIES)
    assert set(ROUND_TRIPS) <= set(CASES)


def test_ctrl_c_says_that_nothing_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_llama(tmp_path / "source")
    progress = interrupted(KeyboardInterrupt)
    monkeypatch.setattr("gptfast.commands.convert._progress_bar", progress)
    assert main(["convert", str(source), str(tmp_path / "own")]) == 130
    assert capsys.readouterr().err == "Interrupted; nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
