"""The commands as a user meets them: what is on stdout, what is on stderr, and the exit code."""

import functools
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llm import EOS, VOCAB, say, write_byte_tokenizer, write_random_model, write_scripted_model
from tiny import LLAMA, llama_tensors, write_folder

from gptfast.commands import main
from gptfast.engine import Engine
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

REPOSITORY = Path(__file__).resolve().parents[1]
STATS = (
    "decode_tok_s prefill_tok_s ttft_s itl_p50_ms itl_p99_ms bytes_per_token bandwidth_gb_s "
    "bandwidth_fraction peak_memory_bytes load_s compile_s"
).split()


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs `gptfast ARGUMENTS` in this process; the bandwidth, half a second each, is made up."""
    monkeypatch.setattr("gptfast.commands.generate.read_bandwidth", lambda device: 1e12)
    num_threads = torch.get_num_threads()

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            assert isinstance(exit.code, int)
            code = exit.code
        return Result(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 1024 tokens of context, and a tokenizer of bytes."""
    folder = write_random_model(tmp_path_factory.mktemp("random"))
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Callable[..., list[Any]]:
    """What the library says to prompts at temperature 0."""
    llm = LLM(folder, device="cpu")

    def outputs(prompts: Any, num_tokens: int = 12) -> list[Any]:
        params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
        return llm.generate(prompts, params)

    return outputs


def generate(folder: Path, *options: object) -> list[object]:
    return [
        *("generate", "--model", folder, "--device", "cpu", "--temperature", 0, "--ignore-eos"),
        *options,
    ]


def parsed(text: str) -> dict[str, Any]:
    """Exactly one JSON object, without NaN or Infinity, which JSON does not know."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    assert text.endswith("\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


# --- generate ---


def test_text_then_what_it_took(command: Command, folder: Path, greedy: Callable[..., Any]) -> None:
    code, out, err = command(*generate(folder, "--prompt", "fox", "-n", 12))
    [expected] = greedy("fox")
    assert code == 0
    assert out.startswith("fox" + expected.text + "\nTime for inference 1: ")
    lines = out[len("fox" + expected.text) + 1 :].splitlines()
    assert lines[0].endswith(" tokens/sec") and " sec total, " in lines[0]
    assert lines[1] == "=========="
    starts = ("Average tokens/sec: ", "Memory used: ", "Prefill: 4 tokens", "Decode: 11 tokens in ")
    for line, start in zip(lines[2:], (*starts, "Bandwidth achieved: ", "Load: "), strict=True):
        assert line.startswith(start)
    assert "Loaded " in err and "Time to load model: " in err
    assert "nan" not in out[len(expected.text) + 3 :]


def test_json_is_one_object_and_nothing_else(
    command: Command, folder: Path, greedy: Callable[..., Any]
) -> None:
    code, out, _ = command(*generate(folder, "--prompt", "fox", "-n", 12, "--json"))
    result = parsed(out)
    assert code == 0 and list(result) == ["outputs", "stats"]
    [output] = result["outputs"]
    assert list(output) == ["prompt", "text", "token_ids", "finish_reason", "logprobs", "stats"]
    [expected] = greedy("fox")
    assert (output["prompt"], output["text"]) == ("fox", expected.text)
    assert output["token_ids"] == expected.token_ids
    assert output["finish_reason"] == "length" and output["logprobs"] is None
    assert set(STATS) <= set(result["stats"])
    assert all(math.isfinite(result["stats"][name]) for name in STATS)
    assert result["stats"]["bandwidth_fraction"] == pytest.approx(
        result["stats"]["bandwidth_gb_s"] / 1000
    )
    assert output["stats"]["new_tokens"] == 12 and output["stats"]["prompt_tokens"] == 4


def test_json_with_logprobs(command: Command, folder: Path) -> None:
    _, out, _ = command(*generate(folder, "--json", "--logprobs", 2, "-n", 3))
    [output] = parsed(out)["outputs"]
    for token, entry in zip(output["token_ids"], output["logprobs"], strict=True):
        assert entry["token_id"] == token and len(entry["top"]) == 2
        assert entry["top"][str(token)] == pytest.approx(entry["logprob"])


def test_statistics_of_a_single_token_are_null_not_nan(command: Command, folder: Path) -> None:
    code, out, _ = command(*generate(folder, "--json", "-n", 1))
    stats = parsed(out)["stats"]
    assert code == 0 and stats["decode_tok_s"] is None and stats["ttft_s"] > 0
    code, out, _ = command(*generate(folder, "-n", 1))
    assert code == 0 and "too short to measure tokens/sec" in out


def test_a_prompt_that_fills_the_context_gives_no_token(command: Command, folder: Path) -> None:
    options = generate(folder, "--prompt-ids", "1,2,3", "--max-seq-len", 3)
    code, out, _ = command(*options, "--json")
    [output] = parsed(out)["outputs"]
    assert code == 0
    assert (output["token_ids"], output["finish_reason"]) == ([], "length")
    code, out, _ = command(*options)
    assert code == 0 and "no new tokens" in out


def test_prompts_from_stdin_and_the_default(
    command: Command,
    folder: Path,
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    _, out, _ = command(*generate(folder, "--prompt", "-", "--json", "-n", 12))
    [output] = parsed(out)["outputs"]
    assert output["prompt"] == "two\nlines"
    assert output["token_ids"] == greedy("two\nlines")[0].token_ids
    _, out, _ = command(*generate(folder, "--json", "-n", 12))
    assert parsed(out)["outputs"][0]["prompt"] == "Once upon a time"
    _, out, _ = command(*generate(folder, "--json", "-n", 12, "--prompt", ""))
    assert parsed(out)["outputs"][0]["token_ids"] == greedy("")[0].token_ids


def test_files_of_prompts_run_together_as_each_would_alone(
    command: Command, folder: Path, greedy: Callable[..., Any], tmp_path: Path
) -> None:
    prompts: list[Any] = ["a fox", "é" * 100, "the end \u2028 of a line", [5, 6, 7], "x"]
    lines = [json.dumps(prompts[0]), json.dumps({"prompt": prompts[1], "id": 7}), ""]
    lines += [json.dumps(prompt, ensure_ascii=False) for prompt in prompts[2:4]]
    lines += [json.dumps({"prompt": prompts[4]})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text("a fox\n\né\r\n x \n", encoding="utf-8")
    alone = [greedy([prompt])[0] for prompt in prompts]
    for rows in (1, 2, 4):
        options = ("--prompt-file", tmp_path / "p.jsonl", "--batch-size", rows, "-n", 12)
        code, out, _ = command(*generate(folder, "--json", *options))
        outputs = parsed(out)["outputs"]
        assert code == 0 and [output["prompt"] for output in outputs] == prompts
        assert [output["token_ids"] for output in outputs] == [o.token_ids for o in alone]
        code, out, _ = command(*generate(folder, *options))
        place = 0
        for number, expected in enumerate(alone, start=1):  # in order, each with its line
            shown = expected.prompt if isinstance(expected.prompt, str) else ""
            place = out.index(f"{shown}{expected.text}\nTime for inference {number}: ", place)
    _, out, _ = command(*generate(folder, "--json", "--prompt-file", tmp_path / "p.txt", "-n", 1))
    assert [output["prompt"] for output in parsed(out)["outputs"]] == ["a fox", "é", " x "]


def test_samples_seeds_and_rows(command: Command, folder: Path) -> None:
    """The same seed gives the same samples in any number of rows; another gives others."""
    options = ["generate", "--model", folder, "--json", "--num-samples", 3, "-n", 12, "--seed", 7]
    options += ["--prompt", "fox", "--ignore-eos", "--device", "cpu"]

    def samples(*more: object) -> list[list[int]]:
        code, out, _ = command(*options, *more)
        assert code == 0
        return [output["token_ids"] for output in parsed(out)["outputs"]]

    first = samples()
    assert len({tuple(ids) for ids in first}) == 3
    assert samples("--batch-size", 2) == samples("--batch-size", 8) == first
    assert samples("--seed", 8, "--num-samples", 1) == first[1:2] != samples("--seed", 9)[:1]


def test_stop_texts(command: Command, folder: Path, greedy: Callable[..., Any]) -> None:
    text = greedy("fox")[0].text
    _, first, second, *_ = (char for char in dict.fromkeys(text) if char != "\ufffd")
    ends = text.index(first)
    options = generate(folder, "--prompt", "fox", "-n", 12, "--stop", second, "--stop", first)
    _, out, _ = command(*options, "--json")
    [output] = parsed(out)["outputs"]
    assert (output["text"], output["finish_reason"]) == (text[:ends], "stop")
    _, out, _ = command(*options)
    assert out.startswith(f"fox{text[:ends]}\nTime for inference 1")


def test_ids_without_a_tokenizer(command: Command, folder: Path, tmp_path: Path) -> None:
    bare = write_random_model(tmp_path)
    code, out, _ = command(*generate(bare, "--prompt-ids", "1,2, 3", "-n", 4))
    _, expected, _ = command(*generate(folder, "--prompt-ids", "1 2 3", "-n", 4, "--json"))
    ids = parsed(expected)["outputs"][0]["token_ids"]
    assert code == 0 and out.startswith(" ".join(map(str, ids)) + " \nTime for inference")


def test_underscores_aliases_and_threads(
    command: Command, folder: Path, greedy: Callable[..., Any]
) -> None:
    torch.set_num_threads(2)
    code, out, _ = command(
        *("generate", "--checkpoint_path", folder, "--max_tokens=12", "--temperature", "0"),
        *("--top_k", "5", "--ignore_eos", "--prompt", "fox", "--json", "--threads", "1"),
        *("--max_seq_len", "64", "--batch_size=2", "--num_samples", "1", "--device", "cpu"),
    )
    assert code == 0 and torch.get_num_threads() == 1
    assert parsed(out)["outputs"][0]["token_ids"] == greedy("fox")[0].token_ids


def test_every_option_of_sampling_reaches_the_engine(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    submit = Engine.submit

    def spy(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        seen.append(params)
        return submit(engine, prompt_ids, params)

    monkeypatch.setattr(Engine, "submit", spy)
    command(
        *("generate", "--model", folder, "--device", "cpu", "-n", 2, "--temperature", 0.5),
        *("--top-k", 3, "--top-p", 0.9, "--min-p", 0.1, "--repetition-penalty", 1.1),
        *("--presence-penalty", 0.2, "--frequency-penalty", 0.3, "--stop", "x", "--seed", 4),
        *("--ignore-eos", "--logprobs", 1),
    )
    assert seen == [
        SamplingParams(
            max_new_tokens=2,
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            stop=("x",),
            seed=4,
            ignore_eos=True,
            logprobs=1,
        )
    ]


def test_a_profile_is_a_trace(command: Command, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, out, err = command(*generate(folder, "-n", 2, "--json", "--profile", trace))
    assert code == 0 and parsed(out) and str(trace) in err
    assert json.loads(trace.read_text())["traceEvents"]


def test_compile_says_how_long_it_took(
    command: Command,
    folder: Path,
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a compiler that only traces: what it makes is tested in test_compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    code, out, err = command(
        *generate(folder, "--prompt", "fox", "-n", 12, "--compile", "--json", "--max-seq-len", 64)
    )
    result = parsed(out)
    assert code == 0 and "Compilation time: " in err
    assert result["outputs"][0]["token_ids"] == greedy("fox")[0].token_ids
    assert result["stats"]["compile_s"] > 0.1 > result["stats"]["itl_p99_ms"] / 1e3


def test_ctrl_c_keeps_what_there_is(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three prompts, two rows: the first is whole, the second a part."""
    step, steps = Engine.step, iter(range(100))

    def interrupted(engine: Engine) -> list[Any]:
        if next(steps) % 10 == 9:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    options = generate(folder, "--num-samples", 3, "-n", 6)
    code, out, err = command(*options, "--json")
    result = parsed(out)
    assert code == 130
    reasons = [output["finish_reason"] for output in result["outputs"]]
    assert reasons == ["length", "cancelled"]
    assert 0 < len(result["outputs"][1]["token_ids"]) < 6
    assert result["stats"]["new_tokens"] == 6 + len(result["outputs"][1]["token_ids"])
    code, out, err = command(*options)
    assert code == 130 and "Average tokens/sec: " in out and "Traceback" not in err
    # Before the first token there is nothing to measure, and that is no error either.
    steps = iter(range(9, 100))
    code, out, err = command(*options, "--json")
    assert code == 130 and parsed(out)["outputs"] == []


def test_ctrl_c_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    """A real signal to a real process, started through its door in scripts/."""
    folder = write_random_model(tmp_path, context=100_000)
    process = subprocess.Popen(
        [
            *(sys.executable, REPOSITORY / "scripts" / "generate.py", "--model", folder),
            *("--prompt-ids", "1,2,3", "--max-new-tokens", "99000", "--ignore-eos"),
            *("--threads", "1", "--device", "cpu"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Where the tests run in a shell's background, it is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    started = b""
    while len(started) < 100:
        piece = os.read(process.stdout.fileno(), 100)
        assert piece, "it ended by itself"
        started += piece
    process.send_signal(signal.SIGINT)
    try:
        rest, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        # Python loses an interrupt that comes inside of a finalizer; then one presses again.
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    lines = rest.decode().splitlines()
    assert process.returncode == 130
    assert b"Traceback" not in err and b"Error" not in err
    for start in ("Average tokens/sec: ", "Memory used: ", "Decode: "):
        assert any(line.startswith(start) for line in lines), start


# --- chat ---


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with the letters of its places in the alphabet, to the next tenth."""
    folder = write_scripted_model(tmp_path_factory.mktemp("talker"))
    write_byte_tokenizer(folder)
    llm = LLM(folder, device="cpu")
    say(llm, [EOS if place % 10 == 0 else 97 + place % 26 for place in range(1, 250)])
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": llm.model.head.weight.data}, folder / "model.safetensors"
    )
    return folder


def answer(num_prompt: int) -> str:
    """What the talker says after a prompt of so many tokens."""
    end = next(place for place in range(num_prompt, 250) if place % 10 == 0)
    return "".join(chr(97 + place % 26) for place in range(num_prompt, end))


def chat(
    command: Command, monkeypatch: pytest.MonkeyPatch, folder: Path, typed: str, *options: object
) -> Result:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return command(*("chat", "--model", folder, "--device", "cpu", "--temperature", 0, *options))


def test_chat_over_turns(command: Command, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn reads only what is new; /reset starts over; the end of input ends it."""
    typed = "hi\n\nhow are you?\n/reset\nhi\n"
    code, out, err = chat(command, monkeypatch, talker, typed)
    first = len(["user", *"hi", "end", "assistant"])
    # user, "how are you?", end, assistant follow the answer and its end.
    second = first + len(answer(first)) + 1 + 1 + len("how are you?") + 2
    assert out.splitlines() == [answer(first), answer(second), answer(first)]
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("[prompt")]
    assert [line.split(";")[0] for line in notes] == [
        f"[prompt {first} tokens, {first} of them new",
        f"[prompt {second} tokens, {second - first - len(answer(first))} of them new",
        f"[prompt {first} tokens, 1 of them new",
    ]
    assert all("tokens/sec]" in line for line in notes)


def test_chat_with_a_system_message_and_exit(
    command: Command, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template writes the role's name between <| and |>, and `system` is no control token."""
    typed = "hi\n/exit\nnot read\n"
    code, out, err = chat(command, monkeypatch, talker, typed, "--system", "Be brief.")
    length = len("<|system|>Be brief.") + 1 + 5
    assert code == 0 and out == answer(length) + "\n"
    assert f"[prompt {length} tokens" in err


def test_chat_goes_on_after_a_turn_that_is_too_long(
    command: Command, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "x" * 400 + "\nhi\n"
    code, out, err = chat(command, monkeypatch, talker, typed)
    assert code == 0 and out.splitlines() == [answer(5)]
    assert "403 tokens and the context holds 256" in err and "/reset starts over" in err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    command: Command, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, iter(range(100))

    def interrupted(engine: Engine) -> list[Any]:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, out, err = chat(command, monkeypatch, talker, "hi\n/reset\nhi\n")
    assert code == 0 and out.splitlines() == [answer(5)[:2], answer(5)] and "(stopped)" in err


# --- info ---


def test_info_tells_facts_size_and_need(command: Command, folder: Path) -> None:
    code, out, err = command("info", folder, "--json", "--batch-size", 3, "--device", "cpu")
    facts = parsed(out)
    assert code == 0 and err == ""
    assert facts["parameters"] == LLM(folder, device="cpu").config.num_parameters
    assert facts["weights_bytes"] == 4 * facts["parameters"] and facts["dtype"] == "float32"
    assert facts["cache_bytes"] == 3 * 1024 * 256 and facts["context"] == 1024
    assert facts["needed_bytes"] == facts["weights_bytes"] + facts["cache_bytes"]
    assert facts["facts"]["num_layers"] == 2 and facts["fits"] and facts["supported"]
    assert facts["chat_template"] is True and f"{VOCAB} tokens" in facts["tokenizer"]
    code, out, err = command("info", folder, "--dtype", "bf16", "--max-seq-len", 100)
    assert code == 0 and err == ""
    for line in ("parameters ", "weights_bytes ", "needed_bytes ", "family ", "supported "):
        assert f"\n{line}" in out
    half = next(line for line in out.splitlines() if line.startswith("weights_bytes"))
    assert f"({2 * facts['parameters']:,})" in half


# --- bad input: one line, exit code 2, nothing else ---


def assert_one_error(result: Result, fragment: str) -> None:
    assert result.err.startswith("gptfast: error: "), result.err
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert fragment in result.err, result.err
    assert (result.code, result.out) == (2, "")


OPTIONS: list[tuple[list[str], str]] = [
    *(
        (["--temperature", value], f"temperature = {shown} must be")
        for value, shown in (
            ("nan", "nan"),
            ("-1", "-1.0"),
            ("1e9", "1000000000.0"),
            ("inf", "inf"),
        )
    ),
    *((["--top-p", value], "top_p = ") for value in ("nan", "-0.1", "2", "0", "1e30")),
    *((["--min-p", value], "min_p = ") for value in ("nan", "-0.1", "2")),
    *((["--top-k", value], f"top_k = {value} must be") for value in ("-5", str(2**70))),
    *((["--repetition-penalty", v], "repetition_penalty = ") for v in ("nan", "0", "-1", "1e9")),
    *((["--presence-penalty", v], "presence_penalty = ") for v in ("nan", "-3", "1e9")),
    *((["--frequency-penalty", v], "frequency_penalty = ") for v in ("nan", "3", "-3")),
    *((["-n", value], f"max_new_tokens = {value} must be") for value in ("0", "-1", str(2**70))),
    *((["--seed", value], f"seed = {value} must be") for value in ("-1", str(2**70))),
    (["--stop", ""], "empty text"),
    (["--logprobs", "-1"], "logprobs = -1"),
    (["--logprobs", "21"], "logprobs = 21"),
    (["--num-samples", "0"], "--num-samples is 0"),
    (["--num-samples", "-2"], "--num-samples is -2"),
    (["--num-samples", "1000000"], "--num-samples is 1000000"),
    (["--batch-size", "0"], "batch size) is 0; at least 1"),
    (["--batch-size", "-1"], "batch size) is -1; at least 1"),
    (["--threads", "0"], "--threads is 0; at least 1"),
    (["--threads", "-1"], "--threads is -1; at least 1"),
    (["--max-seq-len", "0"], "max_seq_len is 0; this model allows 1 to 1024"),
    (["--max-seq-len", "1025"], "max_seq_len is 1025; this model allows 1 to 1024"),
    (["--max-seq-len", "-7"], "max_seq_len is -7"),
    (["--device", "abacus"], "device 'abacus' is unknown"),
    (["--device", "cuda:77"], "is not there"),
    (["--dtype", "int3"], "invalid choice: 'int3'"),
    (["--temperature", "warm"], "invalid float value: 'warm'"),
    (["-n", "many"], "invalid int value: 'many'"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--prompt", "a", "--prompt-ids", "1"], "--prompt and --prompt-ids cannot be given together"),
    (["--prompt", "", "--prompt-ids", "1"], "--prompt and --prompt-ids cannot be given together"),
    (["--prompt-ids", "1,x"], "is not a list of numbers"),
    (["--prompt-ids", ""], "no tokens"),
    (["--prompt-ids", f"1,{VOCAB}"], f"token id {VOCAB} is outside the vocabulary"),
    (["--prompt-ids", "-3"], "token id -3 is outside the vocabulary"),
    (["--prompt", "x" * 1024], "1025 tokens and the context holds 1024"),
    (["--prompt", "x" * 9, "--max-seq-len", "9"], "10 tokens and the context holds 9"),
    (["--prompt", "\udcff"], "half of a surrogate pair"),
    (["--prompt-file", "no/such/file"], "No such file or directory: no/such/file"),
    (["--profile", "no/such/folder/trace.json"], "--profile no/such/folder/trace.json"),
    (["--profile", "."], "--profile ."),
]


@pytest.mark.parametrize(("options", "fragment"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_that_cannot_be(
    command: Command,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    fragment: str,
) -> None:
    def never(engine: Engine) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(Engine, "step", never)
    assert_one_error(command("generate", "--model", folder, *options), fragment)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.txt", b"\xff\xfe\x00", "is not a UTF-8 text file"),
        ("p.jsonl", b'"good"\n\n{bad\n', "p.jsonl line 3 is not JSON"),
        ("p.jsonl", b'{"text": "x"}', 'line 1: a text, a list of token ids or {"prompt": either}'),
        ("p.jsonl", b"[1, true]", "line 1: a text, a list of token ids"),
        ("p.jsonl", b'"good"\n[1, 99999]', "token id 99999 is outside the vocabulary"),
        ("p.jsonl", b"[]", "no tokens"),
    ],
)
def test_prompt_files_that_cannot_be_read(
    command: Command, folder: Path, tmp_path: Path, name: str, content: bytes, fragment: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = command("generate", "--model", folder, "--prompt-file", tmp_path / name)
    assert_one_error(result, fragment)
    if content:
        both = command("generate", "--prompt-file", tmp_path / name, "--prompt", "x")
        assert_one_error(both, "--prompt and --prompt-file cannot be given together")


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def point_outside(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown model_type": (change_config(model_type="abacus"), "model_type 'abacus'"),
    "unsupported key": (
        change_config(rope_scaling={"rope_type": "spiral", "factor": 2}),
        "rope scaling 'spiral' is not supported",
    ),
    "unknown activation": (change_config(hidden_act="tanh"), "hidden_act = 'tanh'"),
    "no config": (remove("config.json"), "there is no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (remove("model.safetensors"), "there are no .safetensors weights"),
    "truncated": (truncate, "not a complete safetensors file"),
    "missing tensor": (
        change_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        "missing tensors: model.norm.weight",
    ),
    "extra tensor": (
        change_tensors(lambda tensors: tensors.update(surplus=torch.zeros(1))),
        "no place for: surplus",
    ),
    "misshapen tensor": (
        change_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)})),
        "model.norm.weight has shape [7]",
    ),
    "shard outside": (point_outside, "'../model.safetensors' is not a plain file name"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer; give prompts as token ids"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_cannot_be_run(command: Command, tmp_path: Path, kind: str) -> None:
    folder = write_random_model(tmp_path)
    write_byte_tokenizer(folder)
    damage, fragment = BROKEN[kind]
    damage(folder)
    for name in ("generate", "chat"):
        assert_one_error(command(name, "--model", folder), fragment)
    if kind != "no tokenizer":
        assert_one_error(command("info", folder), fragment)


@pytest.mark.parametrize(
    ("model", "fragment"),
    [
        ("./no/such/folder", "there is no such folder"),
        ("no-such-folder", "there is no such folder, it is not in the local cache"),
        ("nobody/no-such-model", "there is no such folder, it is not in the local cache"),
        (__file__, "is a file; a model is a folder"),
        ("", "there is no"),
    ],
)
def test_models_that_are_not_there(
    command: Command, monkeypatch: pytest.MonkeyPatch, model: str, fragment: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for options in (["generate", "--model", model], ["chat", "--model", model], ["info", model]):
        assert_one_error(command(*options), fragment)


def test_an_empty_prompt_needs_a_bos(command: Command, tmp_path: Path) -> None:
    folder = write_random_model(tmp_path)
    write_byte_tokenizer(folder, bos=False)
    result = command("generate", "--model", folder, "--prompt", "")
    assert_one_error(result, "no beginning-of-sequence token")


def test_chat_needs_a_template(command: Command, tmp_path: Path) -> None:
    folder = write_random_model(tmp_path)
    write_byte_tokenizer(folder, template=None)
    assert_one_error(command("chat", "--model", folder), "has no chat template")
    assert_one_error(command("chat", "--model", folder, "--temperature", "nan"), "temperature")


def test_out_of_memory_says_how_much_was_needed(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = write_random_model(tmp_path, context=10_000_000)
    options = ["generate", "--model", large, "--prompt-ids", "1", "--batch-size", "1000"]
    needed = "1000 x 10000000 tokens needs 2.56 TB, and "
    assert_one_error(command(*options, "--max-seq-len", "10000000"), needed)
    rows = command("generate", "--model", folder, "--batch-size", "1000000000")
    assert_one_error(rows, "a cache of 1000000000 x 1 tokens needs ")
    monkeypatch.setattr("gptfast.device.free_memory", lambda device: 10_000)
    result = command("generate", "--model", folder)
    assert_one_error(result, "weights in torch.float32 needs 130")
    assert "10.00 kB are free" in result.err


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--max-seq-len", "0"], "max_seq_len is 0"),
        (["--max-seq-len", "1025"], "max_seq_len is 1025"),
        (["--batch-size", "0"], "batch size) is 0"),
        (["--dtype", "int3"], "invalid choice"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_info_refuses_what_generate_refuses(
    command: Command, folder: Path, options: list[str], fragment: str
) -> None:
    assert_one_error(command("info", folder, *options), fragment)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--model", "./no/such/folder"], "there is no such folder"),
        (["--temperature", "nan"], "temperature = nan"),
    ],
)
def test_a_process_of_its_own_says_one_line_too(options: list[str], fragment: str) -> None:
    """Nothing that an import or the interpreter might add."""
    result = subprocess.run(
        [sys.executable, "-m", "gptfast", "generate", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert_one_error(Result(result.returncode, result.stdout, result.stderr), fragment)


def test_what_a_multimodal_model_leaves_out_is_said(tmp_path: Path, capsys: Any) -> None:
    raw = {"model_type": "llava", "text_config": LLAMA}
    tensors = {f"language_model.{n}": t for n, t in llama_tensors(LLAMA).items()}
    tensors["vision_tower.layer.weight"] = torch.ones(2, 2)
    folder = write_folder(tmp_path / "model", raw, tensors)
    options = ["--model", str(folder), "--prompt-ids", "5,6", "--max-new-tokens", "2"]
    assert main(["generate", *options, "--threads", "1", "--device", "cpu"]) == 0
    assert "Left out, because it is no language model: 1 tensors of vision_tower" in (
        capsys.readouterr().err
    )
