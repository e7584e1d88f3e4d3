"""`gptfast quantize` from folder to folder: what it reads, what it leaves behind when it is broken
off, and what it says.
"""

import io
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import write_checkpoint
from safetensors.torch import load_file
from test_calibrated import positions
from test_storyteller import SCRIPTS  # puts scripts/ on the path
from tiny import LLAMA, llama_tensors, tiny_llama, write_folder
from torch import Tensor

from gptfast.calibrated import Awq, Gptq, Method, quantize_model
from gptfast.calibration import BUNDLED_TEXT, calibration_ids, read_documents
from gptfast.commands import main
from gptfast.hub import find_model
from gptfast.llm import LLM
from gptfast.loading import load
from gptfast.quantization import quant_plan
from gptfast.quantize_checkpoint import quantize_checkpoint
from gptfast.tokenizer import Tokenizer, load_tokenizer
from quantize.packing import pack_linears

assert SCRIPTS
from story_text import calibration_story, calibration_text  # noqa: E402
from train_storyteller import held_out_story, training_story  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS: dict[str, Method] = {"gptq": Gptq(), "awq": Awq()}
PLAN = quant_plan("int4-g16")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(find_model("storyteller"))
    assert found is not None
    return found


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(96, (6, 16))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(after: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def progress(items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == after:
                raise error
            yield item

    return progress


# -- calibration text --


def test_the_bundled_text_is_what_its_script_composes() -> None:
    assert BUNDLED_TEXT.read_text(encoding="utf-8") == calibration_text()
    assert BUNDLED_TEXT.stat().st_size <= 300_000
    documents = list(read_documents(None))
    assert documents[:3] == [calibration_story(index) for index in range(3)]
    others = {held_out_story(i) for i in range(1000)} | {training_story(i) for i in range(1000)}
    assert others.isdisjoint(documents)


def test_documents_keep_their_marks(tokenizer: Tokenizer) -> None:
    """Each begins as the tokenizer begins a text and ends with its end, as in training."""
    first, second = (tokenizer.encode(text) for text in ("A fox.", "The end of it."))
    end = tokenizer.eos_token_id
    joined = [*first, end, *second, end]
    found = calibration_ids(["A fox.", "The end of it."], tokenizer, 2, 4)
    assert found.tolist() == [joined[:4], joined[4:8]]
    assert first[0] == tokenizer.bos_token_id


class Counting:
    """A tokenizer that knows how much it has read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.num_read = tokenizer, 0
        self.eos_token_id = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        self.num_read += len(text)
        return self.tokenizer.encode(text)


def test_a_long_document_is_not_read_to_its_end(tokenizer: Tokenizer) -> None:
    """One with few tokens for its length is read further."""
    counting: Any = Counting(tokenizer)
    long = "The fox said hello to the hen. " * 20_000
    assert calibration_ids([long], counting, 4, 32).shape == (4, 32)
    assert counting.num_read < 10 * 4 * 32
    sparse = " wonderful" * 2000
    whole = torch.tensor(tokenizer.encode(sparse))
    assert len(sparse) > 9 * len(whole)
    found = calibration_ids([sparse], tokenizer, 100, 16)
    assert torch.equal(found.flatten(), whole[:1600])


def test_files_of_a_folder_take_turns(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one<|endoftext|>\ntwo\n<|endoftext|>\n\n<|endoftext|>three")
    (tmp_path / "b.md").write_text(" first \n")
    (tmp_path / "deep" / "c.txt").write_text("x<|endoftext|>y")
    (tmp_path / "image.png").write_bytes(b"\xff\x00")
    assert list(read_documents(tmp_path)) == ["one", "first", "x", "two", "y", "three"]


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.TextIOWrapper(io.BytesIO(b"one<|endoftext|>two"))
    monkeypatch.setattr(sys, "stdin", text)
    assert list(read_documents("-")) == ["one", "two"]


def test_texts_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for source, word in ((tmp_path / "nowhere.txt", "not there"), (tmp_path, "no .txt or .md")):
        with pytest.raises(ValueError, match=word):
            list(read_documents(source))
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"image.txt is no text.*UTF-8"):
        list(read_documents(tmp_path))
    with pytest.raises(ValueError, match=r"has 6 tokens.*2 samples of 8 need 16"):
        calibration_ids(["A fox."], tokenizer, 2, 8)
    for count, length in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            calibration_ids(["A fox."], tokenizer, count, length)


# -- from folder to folder --


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_the_model_in_memory(tmp_path: Path, method: str, ids: Tensor) -> None:
    """Also in a process that knows nothing of the original."""
    source, out = tiny_llama(tmp_path / "source", tie_word_embeddings=True), tmp_path / "out"
    result = quantize_checkpoint(source, out, PLAN, METHODS[method], ids)
    model = load(source, "fp32")
    quantize_model(model, ids, PLAN, METHODS[method])
    pack_linears(model, torch.float32)
    expected = model(ids, positions(ids))
    shutil.rmtree(source)
    found = load(out)
    assert torch.equal(found(ids, positions(ids)), expected)
    assert found.formats == model.formats
    assert result.num_bytes == sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["method"] == method and settings["calibration_tokens"] == ids.numel()
    assert hidden(tmp_path) == []
    torch.save((ids, expected), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from pathlib import Path; from gptfast.loading import load;"
        "ids, expected = torch.load(sys.argv[2]); model = load(Path(sys.argv[1]));"
        "found = model(ids, torch.arange(ids.size(1)).expand(len(ids), -1));"
        "torch.testing.assert_close(found, expected)"
    )
    arguments = [sys.executable, "-c", code, str(out), str(tmp_path / "expected.pt")]
    subprocess.run(arguments, cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_goes_on(tmp_path: Path, method: str, after: int, ids: Tensor) -> None:
    """Where it was, to the same bits, without doing blocks again."""
    source = tiny_llama(tmp_path / "source", num_hidden_layers=3, torch_dtype="bfloat16")
    quantize_checkpoint(source, tmp_path / "whole", PLAN, METHODS[method], ids)
    out, notes = tmp_path / "out", []

    def run(progress: Any = iter) -> None:
        quantize_checkpoint(
            source, out, PLAN, METHODS[method], ids, note=notes.append, progress=progress
        )

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(after))
    assert hidden(tmp_path) == [".out.quantizing"] and not out.exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / ".out.quantizing").glob("blocks*")}
    assert len(kept) == after

    def unchanged(items: Iterable[Any]) -> Iterator[Any]:
        yield from items
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

    run(unchanged)
    assert contents(out) == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []
    assert notes == [f"Going on with an earlier run: {after} of 3 blocks are done"]


def test_a_finished_block_that_is_damaged_is_made_again(tmp_path: Path, ids: Tensor) -> None:
    """It stopped every further run, and nothing said which hidden folder to remove."""
    source = tiny_llama(tmp_path / "source", num_hidden_layers=3, torch_dtype="bfloat16")
    quantize_checkpoint(source, tmp_path / "whole", PLAN, METHODS["gptq"], ids)
    arguments = (source, tmp_path / "out", PLAN, METHODS["gptq"], ids)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(*arguments, progress=interrupted(2))
    block = tmp_path / ".out.quantizing" / "blocks.0.safetensors"
    block.write_bytes(block.read_bytes()[:-50])
    quantize_checkpoint(*arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def change_source(source: Path) -> dict[str, Any]:
    write_folder(source, LLAMA, llama_tensors(LLAMA, seed=7))
    return {}


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "source": change_source,
    "plan": lambda source: {"plan": quant_plan("int3-g16")},
    "method": lambda source: {"method": Awq()},
    "setting": lambda source: {"method": Gptq(damping=0.1)},
    "text": lambda source: {"ids": torch.zeros(6, 16, dtype=torch.int64)},
    "dtype": lambda source: {"dtype": "bf16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_begin_anew(tmp_path: Path, change: str, ids: Tensor) -> None:
    source, out, notes = tiny_llama(tmp_path / "source"), tmp_path / "out", []
    settings: dict[str, Any] = {"plan": PLAN, "method": Gptq(), "ids": ids}
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, **settings, progress=interrupted(1))
    settings |= CHANGES[change](source)
    quantize_checkpoint(source, out, **settings, note=notes.append)
    assert len(notes) == 1 and "beginning anew" in notes[0]
    quantize_checkpoint(source, tmp_path / "whole", **settings)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_record_begins_anew(tmp_path: Path, ids: Tensor) -> None:
    source, out, notes = tiny_llama(tmp_path / "source"), tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, PLAN, Gptq(), ids, progress=interrupted(1))
    (tmp_path / ".out.quantizing" / "run.json").write_text("{")
    quantize_checkpoint(source, out, PLAN, Gptq(), ids, note=notes.append)
    assert "beginning anew" in notes[0] and hidden(tmp_path) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(tmp_path: Path, number: float, ids: Tensor) -> None:
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    source = write_folder(tmp_path / "source", LLAMA, tensors)
    for method in (None, *METHODS.values()):
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.gate_up\.weight"):
            quantize_checkpoint(source, tmp_path / "out", PLAN, method, ids)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_quantized_already(tmp_path: Path, ids: Tensor) -> None:
    source, own = tiny_llama(tmp_path / "source"), tmp_path / "own"
    quantize_checkpoint(source, own, PLAN, Gptq(), ids)
    for method in (None, Gptq()):
        with pytest.raises(ValueError, match=r"quantized already \(gptq, int4-g16"):
            quantize_checkpoint(own, tmp_path / "again", PLAN, method, ids)


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    for shape, token, word in (((1, 65), 1, "context of 64"), ((1, 8), 96, "token 96")):
        with pytest.raises(ValueError, match=word):
            ids = torch.full(shape, token)
            quantize_checkpoint(source, tmp_path / "out", PLAN, Gptq(), ids)
    with pytest.raises(ValueError, match=r"gptq finds integers, not fp8"):
        plan = quant_plan("fp8")
        quantize_checkpoint(source, tmp_path / "out", plan, Gptq(), torch.ones(1, 8).long())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["llama-biases-tied", "qwen2_moe-shared-expert"])
def test_memory_is_counted_before_anything_is_read(
    tmp_path: Path, name: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over what 256 experts read take 50 GB: the system would end the run, hours later."""
    source = write_checkpoint(tmp_path / "source", name)
    config = load(source, "fp32").config
    attention = [config.dim, config.num_heads * config.head_dim]
    if (experts := config.experts) is None:
        mlp = [config.dim, config.hidden_dim]
    else:
        mlp = [config.dim, experts.shared_hidden_dim]
        mlp += experts.num_experts * [config.dim, experts.hidden_dim]
    only_attention = quant_plan("int4-g16", exclude=["mlp.*"])
    for plan, widths in ((PLAN, attention + mlp), (only_attention, attention)):
        out = tmp_path / f"out of {len(widths)}"
        needed = 4 * (ids.numel() * config.dim + sum(width**2 for width in widths))
        monkeypatch.setattr("gptfast.device.free_memory", lambda device, free=needed - 1: free)
        for method in METHODS.values():
            with pytest.raises(MemoryError, match=r"states of 96 tokens.*--method rtn"):
                quantize_checkpoint(source, out, plan, method, ids)
        monkeypatch.setattr("gptfast.device.free_memory", lambda device, free=needed: free)
        quantize_checkpoint(source, out, plan, Gptq(), ids)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path, ids: Tensor) -> None:
    """Blocks that were finished wait; nothing else is left, and OUT is as it was."""
    source, out = tiny_llama(tmp_path / "source"), tmp_path / "out"
    for limit in (4000, 12_000):  # within a block, and within the whole
        with files_of_at_most(limit), pytest.raises(ValueError, match="make space") as caught:
            quantize_checkpoint(source, out, PLAN, Gptq(), ids)
        assert "\n" not in str(caught.value)
        names = {path.name for path in tmp_path.rglob("*")}
        assert not any("partial" in name for name in names) and not out.exists()
    quantize_checkpoint(source, out, PLAN, Gptq(), ids)
    assert hidden(tmp_path) == [] and load(out).formats


def test_parts_that_stay_plain(tmp_path: Path, ids: Tensor) -> None:
    source = tiny_llama(tmp_path / "source", attention_bias=True)
    plan = quant_plan("int3-g8-asym", head="none", embedding="int8", exclude=["blocks.0.*"])
    for name, method in METHODS.items():
        quantize_checkpoint(source, tmp_path / name, plan, method, ids)
        names = set(load(tmp_path / name).formats)
        parts = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
        assert names == {"embed", *(f"blocks.1.{part}" for part in parts)}


# -- the command --


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("\n<|endoftext|>\n".join(held_out_story(index) for index in range(3000, 3003)))
    return path


def test_the_command(tmp_path: Path, story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    few = ["--num-samples", "4", "--seq-len", "64"]
    options = [*few, "--bits", "4", "--group-size", "64", "--eval", str(story), "--device", "cpu"]
    assert main(["quantize", "storyteller", str(out), *options]) == 0
    text, notes = capsys.readouterr()
    size, before, after, difference = text.splitlines()
    assert size.startswith(f"{out}: gptq, int4-g64, head int8: ") and "of 6.56 MB" in size
    assert before.startswith("before: perplexity 1.") and after.startswith("after: perplexity 1.")
    assert "KL divergence mean 0.0" in difference and "same likeliest token 9" in difference
    assert "bundled stories" in notes
    story_of_it = LLM(out, device="cpu").generate("Once upon a time")[0].text
    assert len(story_of_it) > 20
    assert main(["quantize", str(out), str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert "quantized already" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "int4", "--bits", "3"], ["--format", "--bits"]),
        (["--format", "int5"], ["int5", "int4"]),
        (["--group-size", "48"], ["48", "power of two"]),
        (["--method", "gptq", "--format", "fp8"], ["gptq finds integers", "rtn"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt", "not there"]),
        (["--eval", "nowhere.txt"], ["nowhere.txt"]),
        (["--num-samples", "100000"], ["has ", "need 51200000"]),
        (["--seq-len", "513"], ["context of 512"]),
        (["--damping", "-1"], ["damping"]),
        (["--exclude", "mlp.upp"], ["mlp.upp"]),
        (["--method", "rtn"], ["--num-samples", "nothing with --method rtn"]),
        (["--method", "awq", "--damping", "0"], ["--damping", "nothing with --method awq"]),
        (["--method", "awq", "--no-act-order"], ["--no-act-order", "--method awq"]),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path,
    options: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [] if "--num-samples" in options else ["--num-samples", "2"]
    assert main(["quantize", "storyteller", str(tmp_path / "out"), *few, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gptfast: error: ")
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_rtn_is_loading_with_quant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_llama(tmp_path / "source"), tmp_path / "out"
    command = ["quantize", str(source), str(out), "--method", "rtn", "--group-size", "8"]
    assert main([*command, "--calibration", "nowhere.txt"]) == 2  # it would not be read
    assert "--calibration means nothing with --method rtn" in capsys.readouterr().err
    assert main(command) == 0  # no tokenizer, no text needed
    assert "rtn, int4-g8, head int8" in capsys.readouterr().out
    expected = load(source, quant=quant_plan("int4-g8"))
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(load(out)(ids, positions(ids)), expected(ids, positions(ids)))
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert main(["quantize", str(source), str(tmp_path / "other")]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "storyteller", str(tmp_path / "out"), "--num-samples", "1"]
    with monkeypatch.context() as patched:
        patched.setattr("gptfast.commands.quantize._progress_bar", interrupted(1))
        assert main(command) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not written" in error and "same command goes on" in error
    assert main(command) == 0
    assert "1 of 4 blocks are done" in capsys.readouterr().err


def test_the_door_opens_from_another_folder(tmp_path: Path) -> None:
    door = [sys.executable, str(REPOSITORY / "scripts" / "quantize_model.py"), "--help"]
    result = subprocess.run(door, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for word in ("--method", "--calibration", "--eval", "--group-size", "--exclude", "--no-act"):
        assert word in result.stdout
