"""`gptfast eval` as a user meets it, and the answers that lm-evaluation-harness gets."""

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llm import EOS, say, write_byte_tokenizer, write_random_model, write_scripted_model
from tiny import tiny_llama

from gptfast.commands import main
from gptfast.commands.harness import Answers, Tasks, generation_params
from gptfast.evaluation import (
    Window,
    compare,
    documents,
    measure_perplexity,
    second_halves,
    strided,
    token_lengths,
)
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = "The quick brown fox jumps over the lazy dog; naïve 🦙.\n" * 4
CONTEXT = 128


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_random_model(tmp_path_factory.mktemp("random"), context=CONTEXT)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", dtype="fp32")


@pytest.fixture
def evaluate(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `gptfast eval --model FOLDER ARGUMENTS` in this process."""

    def run(*arguments: object, model: Path = folder, dtype: str = "fp32") -> Result:
        capsys.readouterr()
        options = ["--model", model, "--device", "cpu", "--dtype", dtype, *arguments]
        try:
            code = main(["eval", *map(str, options)])
        except SystemExit as exit:  # argparse
            assert isinstance(exit.code, int)
            code = exit.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def numbers(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def refused(result: Result) -> str:
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gptfast: error: ")
    return lines[0]


# --- perplexity ---


def test_a_table(evaluate: Command, text: Path, llm: LLM, folder: Path) -> None:
    result = evaluate("--text", text, "--window", 32)
    ids = llm.encode(TEXT)
    expected = measure_perplexity(llm.model, strided(ids, 32, 16))
    header, row = result.out.splitlines()
    assert header.split() == ["tokens", "nats/token", "perplexity", "bits/byte"]
    assert row.split()[:3] == [folder.name, str(len(ids) - 1), f"{expected.nats_per_token:.5f}"]
    assert f"{expected.perplexity:.4f} ± {expected.perplexity_error:.4f}" in row
    num_bytes = len(TEXT.encode())
    assert row.split()[-1] == f"{expected.nats_per_token / math.log(2):.5f}"  # a byte is a token
    assert (
        f"Text: {len(ids)} tokens, {num_bytes} bytes; strided, window 32, stride 16: " in result.err
    )


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ([], lambda ids: strided(ids, CONTEXT, CONTEXT // 2)),
        (["--window", 40, "--stride", 7], lambda ids: strided(ids, 40, 7)),
        (["--method", "windows"], lambda ids: second_halves(ids, CONTEXT, 256)),
        (["--method", "windows", "--window", 33], lambda ids: second_halves(ids, 33, 256)),
        (["--max-tokens", 50], lambda ids: strided(ids[:50], CONTEXT, CONTEXT // 2)),
        (["--batch-size", 1], lambda ids: strided(ids, CONTEXT, CONTEXT // 2)),
    ],
)
def test_figures_are_the_librarys(
    evaluate: Command,
    text: Path,
    llm: LLM,
    options: Sequence[object],
    windows: Callable[[list[int]], list[Window]],
) -> None:
    found = numbers(evaluate("--text", text, "--json", *options))
    assert llm.tokenizer is not None
    ids = llm.encode(TEXT)
    lengths = token_lengths(llm.tokenizer, ids)
    expected = measure_perplexity(llm.model, windows(ids), lengths).as_dict()
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["num_windows"] == len(windows(ids))


def test_documents_between_marks(evaluate: Command, tmp_path: Path, llm: LLM) -> None:
    """Each alone after BOS and without the white space around it; empty ones are left out."""
    path = tmp_path / "stories.txt"
    path.write_text("One fox.\n==\n\nTwo foxes, three.==\n==" + "long " * 40)
    found = numbers(evaluate("--text", path, "--split", "==", "--json", "--window", 64))
    texts = [llm.encode(part) for part in ("One fox.", "Two foxes, three.", ("long " * 40).strip())]
    expected = measure_perplexity(llm.model, documents(texts, 64))
    assert found["num_tokens"] == 8 + 17 + 63 and found["method"] == "split"
    assert found["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert found["num_bytes"] == found["num_tokens"]
    fewer = numbers(evaluate("--text", path, "--split", "==", "--json", "--max-tokens", 12))
    assert fewer["num_tokens"] == 8 + 2  # nine tokens with BOS, then three


def test_marks_are_not_scored_unnoticed(evaluate: Command, tmp_path: Path) -> None:
    """Stories of a text with marks cost 1.48 nats a token instead of 0.26, and nothing said why."""
    mark, path = "<|endoftext|>", tmp_path / "stories.txt"
    path.write_text(f"One fox.{mark}Two.{mark}Three.")
    assert f"{mark} stands 2 times in the text" in evaluate("--text", path).err
    right = evaluate("--text", path, "--split", mark).err
    assert "stands" not in right and "has no" not in right
    assert "has no '<|eot|>': it is one doc" in evaluate("--text", path, "--split", "<|eot|>").err


def test_where_text_comes_from(
    evaluate: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, standard input, and a folder's files in order with a blank line between them."""
    plain = numbers(evaluate("--text", text, "--json"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert numbers(evaluate("--text", "-", "--json")) == plain
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text(TEXT[30:])
    (folder / "a.txt").write_text(TEXT[:30])
    (folder / "c.md").write_text("not read")
    joined = tmp_path / "joined.txt"
    joined.write_text(TEXT[:30] + "\n\n" + TEXT[30:])
    expected = numbers(evaluate("--text", joined, "--json"))
    assert numbers(evaluate("--text", folder, "--json")) == expected != plain


def test_a_short_text_is_one_shorter_window(evaluate: Command, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("fox")
    result = evaluate("--text", path)
    assert result.code == 0 and result.out.splitlines()[1].split()[1] == "3"
    assert "shorter than a window: it is scored as one window of 4" in result.err


def test_beside_the_same_model_in_another_dtype(
    evaluate: Command, text: Path, folder: Path, llm: LLM
) -> None:
    narrow = LLM(folder, device="cpu", dtype="bf16")
    ids = llm.encode(TEXT)
    expected = compare(narrow.model, llm.model, strided(ids, 64, 32))
    options = ["--text", text, "--window", 64, "--reference-dtype", "fp32"]
    found = numbers(evaluate(*options, "--json", dtype="bf16"))
    assert (found["dtype"], found["reference"]["dtype"]) == ("bfloat16", "float32")
    assert found["reference"]["model"] == folder.name
    for name in ("kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-3)
    assert found["nats_per_token"] == pytest.approx(expected.model.nats_per_token, rel=1e-5)
    reference = found["reference"]["nats_per_token"]
    assert reference == pytest.approx(expected.reference.nats_per_token, rel=1e-5)
    lines = evaluate(*options, dtype="bf16").out.splitlines()
    assert lines[2].startswith("reference ")
    assert f"mean {expected.kl_mean:.6f} ± " in lines[3]
    assert lines[4] == f"Same likeliest token: {expected.top1_agreement:.2%}"


def test_beside_another_model(evaluate: Command, text: Path, folder: Path, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other", context=CONTEXT)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    write_byte_tokenizer(other)
    found = numbers(evaluate("--text", text, "--reference", other, "--json"))
    assert found["kl_mean"] > 0.01 and found["reference"]["model"] == "other"
    assert found["top1_agreement"] == 1  # twice the logits: the same order


def test_quantized_weights_and_cache_beside_the_plain_model(evaluate: Command, text: Path) -> None:
    options = ["--text", text, "--reference-dtype", "fp32", "--json"]
    weights = numbers(evaluate(*options, "--quant", "int8"))
    assert weights["formats"] and not weights["reference"]["formats"]
    assert 0 < weights["kl_mean"] < 0.05
    cache = numbers(evaluate(*options, "--kv-cache-dtype", "int8"))
    assert cache["kv_cache_dtype"] == "int8" and 0 < cache["kl_mean"] < 0.05
    assert cache["reference"]["nats_per_token"] == weights["reference"]["nats_per_token"]


def test_a_text_that_the_tokenizer_changes(evaluate: Command, tmp_path: Path) -> None:
    """Bits per byte are then of other bytes than the file's, and a line says so."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert "does not keep" not in evaluate("--text", path).err
    model = write_random_model(tmp_path / "model", context=CONTEXT)
    write_byte_tokenizer(model)
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Replace", "pattern": {"String": "fox"}, "content": "wolf"}
    (model / "tokenizer.json").write_text(json.dumps(raw))
    result = evaluate("--text", path, model=model)
    assert f"does not keep this text as it is ({len(TEXT.encode())} bytes)" in result.err
    assert f"{len(TEXT.replace('fox', 'wolf').encode())} bytes; strided" in result.err


# --- errors ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --text FILE"),
        (["--text", "TEXT", "--tasks", "x"], "one of them"),
        (["--text", "/nowhere/at-all"], "No such file"),
        (["--text", "TEXT", "--window", 129], "--window is 129.*context, 128"),
        (["--text", "TEXT", "--window", 1], "--window is 1"),
        (["--text", "TEXT", "--window", 8, "--stride", 9], "--stride is 9"),
        (["--text", "TEXT", "--stride", 0], "--stride is 0"),
        (["--text", "TEXT", "--method", "windows", "--stride", 4], "--stride belongs to"),
        (["--text", "TEXT", "--method", "windows", "--window", 2], "window is 2"),
        (["--text", "TEXT", "--method", "windows", "--max-tokens", 99], "99 tokens.*128 is"),
        (["--text", "TEXT", "--split", "x", "--stride", 4], "leave out --method and --stride"),
        (["--text", "TEXT", "--split", ""], "--split is empty"),
        (["--text", "TEXT", "--max-tokens", 1], "--max-tokens is 1"),
        (["--text", "TEXT", "--max-tokens", 2], "2 tokens, of which 1 would be scored"),
        (["--text", "TEXT", "--batch-size", 0], "--batch-size is 0"),
        (["--text", "TEXT", "--limit", 3], "--limit means nothing with --text"),
        (["--text", "TEXT", "--compile"], "--compile means nothing with --text"),
        (["--text", "TEXT", "--max-seq-len", 64], "--max-seq-len means nothing with --text"),
        (["--tasks", "x", "--reference", "y"], "--reference means nothing with --tasks"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "x", "--limit", 0], "--limit is 0"),
        (
            ["--text", "TEXT", "--reference", "storyteller"],
            "267 tokens and the reference one of 2048",
        ),
    ],
)
def test_what_is_refused(
    evaluate: Command, text: Path, options: Sequence[object], words: str
) -> None:
    options = [text if option == "TEXT" else option for option in options]
    assert re.search(words, refused(evaluate(*options)))


def test_texts_that_are_refused(evaluate: Command, tmp_path: Path, folder: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"fox \xff\xfe")
    assert "the text is empty" in refused(evaluate("--text", empty))
    assert "not UTF-8 text: byte 0xff at 4" in refused(evaluate("--text", binary))
    (tmp_path / "none").mkdir()
    assert "no .txt file in this folder" in refused(evaluate("--text", tmp_path / "none"))
    bare = tiny_llama(tmp_path / "bare")
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert "has no tokenizer" in refused(evaluate("--text", path, model=bare))


def test_a_reference_with_other_tokens(
    evaluate: Command, text: Path, tmp_path: Path, folder: Path
) -> None:
    """The same number of tokens that mean something else: the comparison would mean nothing."""
    other = write_random_model(tmp_path / "other", context=CONTEXT)
    write_byte_tokenizer(other)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["f"], vocabulary["o"] = vocabulary["o"], vocabulary["f"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert "another tokenizer" in refused(evaluate("--text", text, "--reference", other))


def test_an_interrupt(evaluate: Command, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptfast.commands.eval.measure_perplexity", interrupted)
    assert evaluate("--text", text)[:2] == (130, "")


def test_the_door() -> None:
    result = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "eval.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("usage: gptfast eval ")


# --- answers for the harness ---


class Asked(NamedTuple):
    """A request, as far as Answers look at it."""

    args: tuple[Any, ...]


def asked(*requests: tuple[Any, ...]) -> list[Asked]:
    return [Asked(request) for request in requests]


PAIRS = [
    ("The fox", " jumps"),
    ("The fox ", "jumps"),  # the space belongs to the continuation: the same ids as above
    ("", "The fox"),
    ("  ", "fox"),
    ("A much longer context, so that rows differ in length.", "!"),
    ("a" * 300, " bc"),  # more than the context holds
    ("x", "y" * CONTEXT),  # as much as can be scored at all
]


def by_hand(llm: LLM, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """From teacher-forced logits of the last tokens that the context holds."""
    whole = [*context, *ids][-(CONTEXT + 1) :]
    logprobs = llm.logits(whole[:-1]).log_softmax(-1)[-len(ids) :]
    chosen = logprobs[torch.arange(len(ids)), torch.tensor(ids)]
    return chosen.sum().item(), logprobs.argmax(-1).tolist() == ids


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loglikelihood(llm: LLM, batch_size: int) -> None:
    bos = [256]
    expected = [
        by_hand(llm, [*bos, *b"The fox"], list(b" jumps")),
        by_hand(llm, [*bos, *b"The fox"], list(b" jumps")),
        by_hand(llm, bos, list(b"The fox")),
        by_hand(llm, bos, list(b"  fox")),
        by_hand(llm, [*bos, *PAIRS[4][0].encode()], list(b"!")),
        by_hand(llm, [*bos, *PAIRS[5][0].encode()], list(b" bc")),
        by_hand(llm, [*bos, *b"x"], list(b"y" * CONTEXT)),
    ]
    found = Answers(llm, batch_size).loglikelihood(asked(*PAIRS))
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    for (likelihood, _), (other, _) in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(other, abs=1e-3)
    alone = llm.score([*bos, *b"The fox jumps"])[-6:].sum().item()
    assert found[0][0] == pytest.approx(alone, abs=1e-4)


def test_without_bos(tmp_path: Path) -> None:
    """A text of its own is scored after EOS where the tokenizer names no BOS, and so is one after
    nothing but spaces; a context has nothing put before it."""
    write_byte_tokenizer(write_random_model(tmp_path, context=CONTEXT), bos=False)
    llm = LLM(tmp_path, device="cpu", dtype="fp32")
    found = Answers(llm).loglikelihood(asked(("", "fox"), ("  ", "fox"), ("The", " fox")))
    contexts = ([EOS], b"fox"), ([EOS], b"  fox"), (list(b"The"), b" fox")
    for (likelihood, _), (context, text) in zip(found, contexts, strict=True):
        assert likelihood == pytest.approx(by_hand(llm, context, list(text))[0], abs=1e-3)


def test_what_greedy_decoding_would_say(tmp_path: Path) -> None:
    """Flagged where every token of the continuation is the likeliest, not only the last."""
    write_byte_tokenizer(write_scripted_model(tmp_path))
    llm = LLM(tmp_path, device="cpu", dtype="fp32")
    say(llm, list(b" fox jumps"), start=4)  # BOS and three letters
    found = Answers(llm).loglikelihood(
        asked(("The", " fox"), ("The", " fax"), ("The", " foxes"), ("The", " fox jumps"))
    )
    assert [flag for _, flag in found] == [True, False, False, True]


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 17])
def test_rolling_loglikelihood(llm: LLM, length: int) -> None:
    """All of a text in windows as long as the context, the first after BOS, later ones after the
    token before them, the last after as much as fits."""
    text = "".join(chr(97 + (number * number) % 26) for number in range(length))
    ids, expected = list(text.encode()), 0.0
    for start in range(0, length, CONTEXT):
        end = min(start + CONTEXT, length)
        before = [256] if start == 0 else ids[max(0, end - CONTEXT - 1) : start]
        if start > 0 and end == CONTEXT * (start // CONTEXT + 1):
            before = ids[start - 1 : start]
        expected += by_hand(llm, before, ids[start:end])[0]
    [found] = Answers(llm).loglikelihood_rolling(asked((text,)))
    assert found == pytest.approx(expected, abs=2e-3)


def test_rolling_keeps_texts_apart(llm: LLM) -> None:
    texts = ["one text " * 40, "", "another"]
    together = Answers(llm, 4).loglikelihood_rolling(asked(*((text,) for text in texts)))
    alone = [Answers(llm).loglikelihood_rolling(asked((text,)))[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-3) and together[1] == 0


def test_generate_until(llm: LLM) -> None:
    settings = {"until": ["q", "z"], "do_sample": False, "max_gen_toks": 24}
    contexts = ["The fox", "A", "w" * 300]
    found = Answers(llm).generate_until(asked(*((context, settings) for context in contexts)))
    params = SamplingParams(temperature=0, max_new_tokens=24, stop=("q", "z"))
    cut = [[256, *b"The fox"], [256, *b"A"], list(b"w" * (CONTEXT - 24))]
    assert found == [output.text for output in llm.generate(cut, params)]
    assert Answers(llm).generate_until([]) == []


def test_generate_until_ends_where_it_is_told(tmp_path: Path) -> None:
    write_byte_tokenizer(write_scripted_model(tmp_path))
    llm = LLM(tmp_path, device="cpu", dtype="fp32")
    say(llm, [*b" fox. Then", EOS], start=4)
    ends: list[Any] = [{"until": "."}, {"until": ["Then"]}, {}, {"max_gen_toks": 3}]
    found = Answers(llm).generate_until(asked(*(("The", settings) for settings in ends)))
    assert found == [" fox", " fox. ", " fox. Then", " fo"]


def test_settings_of_generation() -> None:
    assert generation_params({}) == SamplingParams(max_new_tokens=256, temperature=0, seed=0)
    greedy = {"until": ["\n", ""], "temperature": 0.7, "do_sample": False, "max_tokens": 5}
    params = generation_params(greedy)
    assert (params.temperature, params.stop, params.max_new_tokens) == (0, ("\n",), 5)
    sampled = generation_params({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5})
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.7, 0.9, 5)
    assert generation_params({"num_beams": 1, "min_p": None}) == generation_params({})
    with pytest.raises(ValueError, match="num_beams=4"):
        generation_params({"num_beams": 4})


def test_answers_that_cannot_be_given(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"129 tokens.*128"):
        Answers(llm).loglikelihood(asked(("x", "y" * (CONTEXT + 1))))
    with pytest.raises(ValueError, match="128 new tokens and the context holds 128"):
        Answers(llm).generate_until(asked(("x", {"max_gen_toks": CONTEXT})))
    with pytest.raises(ValueError, match="no tokenizer"):
        Answers(LLM(tiny_llama(tmp_path), device="cpu"))


def test_without_the_harness(evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refused(evaluate("--tasks", "arc_easy"))
    assert "pip install 'gptfast[eval]'" in message


# --- the harness itself ---

TASKS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "choice": (
        [
            {
                "text": "Once upon a time there was a little",
                "choices": ["girl", "the of"],
                "gold": 0,
            },
            {"text": "", "choices": ["Once upon a time", "purple of"], "gold": 0},
        ],
        "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    ),
    "rolling": (
        [{"text": "Once upon a time there was a little fox. " * 20}, {"text": "Hello."}],
        "output_type: loglikelihood_rolling\n"
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, "
        "higher_is_better: false}]\n",
    ),
    "until": (
        [{"text": "Once upon a time", "gold": "?"}, {"text": "One day the fox", "gold": "?"}],
        "output_type: generate_until\ndoc_to_target: gold\n"
        'generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 24}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    ),
}


def write_tasks(folder: Path, answers: Answers) -> None:
    """Local tasks; what the model says to "until" is what that task expects."""
    for name, (documents_, lines) in TASKS.items():
        if name == "until":
            settings = {"until": ["."], "max_gen_toks": 24}
            said = answers.generate_until(asked(*((d["text"], settings) for d in documents_)))
            documents_ = [d | {"gold": text} for d, text in zip(documents_, said, strict=True)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents_))
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            + ('doc_to_text: ""\ndoc_to_target: "{{text}}"\n' if name == "rolling" else "")
            + ('doc_to_text: "{{text}}"\n' if name != "rolling" else "")
            + lines
        )


@pytest.mark.slow
def test_tasks_of_the_harness(
    evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice, rolling and generation from local files, the figures recomputed by hand."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[eval]'")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    llm = LLM("storyteller", device="cpu", dtype="fp32")
    answers = Answers(llm)
    write_tasks(tmp_path, answers)
    found = json.loads(
        evaluate(
            *("--tasks", "local_choice,local_rolling,local_until", "--task-path", tmp_path),
            "--json",
            model=Path("storyteller"),
        ).out
    )["results"]
    assert found["local_until"]["exact_match,none"] == 1
    likelihood = num_bytes = 0.0
    assert llm.tokenizer is not None
    for document in TASKS["rolling"][0]:
        likelihood += answers.loglikelihood_rolling(asked((document["text"],)))[0]
        num_bytes += len(document["text"].encode())
    expected = -likelihood / num_bytes / math.log(2)
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    hits = 0
    for document in TASKS["choice"][0]:
        scores = []
        for choice in document["choices"]:
            num_given = len(llm.tokenizer.encode(document["text"], bos=True))
            whole = llm.tokenizer.encode(f"{document['text']} {choice}", bos=True)
            scores.append(llm.score(whole)[num_given - 1 :].sum().item())
        hits += scores[0] > scores[1]
    assert found["local_choice"]["acc,none"] == hits / 2


def test_unknown_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[eval]'")
    with pytest.raises(ValueError, match="no task 'no_such_task'"):
        Tasks(["no_such_task"])
    with pytest.raises(ValueError, match="not a folder"):
        Tasks(["x"], tmp_path / "nowhere")
