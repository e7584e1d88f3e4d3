"""bench/peers.py: everyone gets the same weights and the same work, in turns, and the figures are
what they are called. That they are fast is measured elsewhere (bench/LOG.md).
"""

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from gptfast.families import model_config
from gptfast.runner import ModelRunner
from gptfast.shapes import SHAPES, shape_config, write_random_checkpoint

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # a folder of scripts, no package
peers, files, races, report = map(import_module, "peers peer_files peer_race peer_report".split())

TINY = {
    **SHAPES["tinyllama-1.1b"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
QUICK = (
    "--shape=tiny --eager --no-plot --threads=1 --rounds=3 --starts=1 --prompt-tokens=4 "
    "--prefill-tokens=16 --new-tokens=6 --context-tokens=3 --tries=1"
).split()


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(peers, "read_bandwidth", lambda device, seconds: 25e9)


def compare(folder: Path, *options: str) -> dict[str, Any]:
    """Runs the benchmark in `folder` and returns what it wrote."""
    out, threads = folder / "result.json", torch.get_num_threads()
    try:
        assert peers.main([*QUICK, f"--work-dir={folder}", f"--out={out}", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def check_figures(figures: dict[str, Any], contexts: list[int]) -> None:
    """Medians of their rounds, consistent with one another."""
    assert len(figures["per_round"]) in (2, 3)  # two, where it was far behind
    for key in ("decode_tok_s", "prefill_tok_s", "bandwidth_fraction"):
        assert figures[key] == median(each[key] for each in figures["per_round"]) > 0
    for each in figures["per_round"]:
        traffic = figures["bytes_per_token"] * each["decode_tok_s"]
        assert each["bandwidth_fraction"] == pytest.approx(traffic / 25e9)
    assert figures["contexts_per_round"].keys() == {str(context) for context in contexts}
    for context, rounds in figures["contexts_per_round"].items():
        speed = median(each["decode_tok_s"] for each in rounds)
        assert figures[f"context_{context}_tok_s"] == speed > 0
    assert figures["first_token_s"] == figures["starts_s"][-1] > 0
    assert figures["peak_memory_bytes"] > 10e6


def test_this_engine_and_transformers_do_the_same_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    result = compare(
        tmp_path, "--precisions=bf16,int4-dynamic", "--peers=transformers", "--contexts=24"
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    bf16, int4 = result["groups"]["bf16"], result["groups"]["int4"]
    assert list(bf16) == ["gptfast bf16", "transformers eager"]
    assert list(int4) == ["gptfast int4-dynamic"]
    config = model_config(TINY)
    read = 2 * (config.num_parameters - config.vocab_size * config.dim)
    for figures in bf16.values():
        check_figures(figures, [24])
        assert figures["bytes_per_token"] == pytest.approx(read, rel=0.05)
        # Two ways to compute in bfloat16 may part, but not at the first token.
        assert figures["equal_tokens"] > 0
    check_figures(int4["gptfast int4-dynamic"], [24])
    assert int4["gptfast int4-dynamic"]["bytes_per_token"] < read / 2
    assert result["over_best_peer"]["int4"] == {}
    [ratios] = result["over_best_peer"]["bf16"].values()
    assert ratios.keys() == {"decode_tok_s", "prefill_tok_s", "context_24_tok_s"}


@pytest.mark.parametrize(
    ("peer", "forms"),
    [("llama.cpp", ["bf16", "Q8_0", "Q4_0"]), ("openvino", ["bf16", "int8", "int4"])],
)
def test_other_engines_do_the_same_work(peer: str, forms: list[str], tmp_path: Path) -> None:
    """The first tokens are equal, so the files hold the same weights, turned as they should be."""
    if absent := files.missing(*peers.PACKAGES[peer]):
        pytest.skip(f"without {', '.join(absent)}")
    groups = compare(tmp_path, f"--peers={peer}", "--precisions=bf16,int8,int4", "--contexts=32")[
        "groups"
    ]
    for group, form in zip(groups.values(), forms, strict=True):
        check_figures(group[f"{peer} {form}"], [32])
    assert groups["bf16"][f"{peer} bf16"]["equal_tokens"] > 0


def test_a_missing_peer_is_a_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PACKAGES, "openvino", {"torch": "torch", "no.such": "its-name"})
    assert not peers._is_installed("openvino")
    assert capsys.readouterr().err == "Without openvino: pip install its-name\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--peers=ollama", "peer 'ollama' is unknown; use some of: transformers, llama.cpp, openv"),
        ("--precisions=", "--precisions names none; use some of: bf16, int8, "),
        ("--precisions=int5", "int5"),
        ("--rounds=0", "--rounds is 0; 1 is the least"),
        ("--tries=0", "--tries is 0; 1 is the least"),
        ("--new-tokens=1", "--new-tokens is 1; a speed needs at least 2"),
        ("--contexts=16384", "must stay within 1 to 16382"),
        ("--shape=llama-9", "shape 'llama-9' is unknown"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    option: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as raised:
        peers.main([*QUICK, "--peers=", f"--work-dir={tmp_path}", option])
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


# -- contexts that nobody reads --


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """A folder with tiny weights. What sets the number of threads is undone."""
    threads = torch.get_num_threads()
    write_random_checkpoint(TINY, tmp_path, torch.bfloat16)
    yield tmp_path
    torch.set_num_threads(threads)


def test_ours_reads_every_prompt_and_no_context(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []  # where pieces of prompts began, and their length
    prefill = ModelRunner.prefill

    def noted(self: ModelRunner, piece: list[int], start: int, row: int) -> torch.Tensor:
        read.append((start, len(piece)))
        return prefill(self, piece, start, row)

    monkeypatch.setattr(ModelRunner, "prefill", noted)
    ours = import_module("peer_torch").Ours(checkpoint, 1, 32, False)
    prompt = list(range(1, 9))
    first, second = (ours.run(prompt, 4) for _ in range(2))
    assert first[0] == second[0] and len(first[1]) == 4
    assert read == [(0, 8), (0, 8)]
    ours.hold(range(24), 40)
    for _ in range(2):
        tokens, times = ours.resume(5)
        assert len(tokens) == 5 and 0 < times[0] < times[-1]
    assert read[2:] == [(24, 1), (24, 1)]


def test_transformers_reads_every_prompt_and_no_context(checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    theirs = import_module("peer_torch").Theirs(checkpoint, 1, False)
    read: list[tuple[int, int]] = []  # tokens before a step, and tokens of it

    def note(module: Any, args: Any, settings: dict[str, Any]) -> None:
        known = settings["past_key_values"].get_seq_length()
        read.append((int(known), settings["input_ids"].size(1)))

    theirs._contestant.model.register_forward_pre_hook(note, with_kwargs=True)
    for _ in range(2):
        theirs.run(list(range(1, 9)), 3)
    assert read == [(0, 8), (8, 1), (9, 1)] * 2
    del read[:]
    theirs.hold(range(24), 40)
    for _ in range(2):
        tokens, times = theirs.resume(3)
        assert len(tokens) == 3 and 0 < times[0] < times[-1]
    assert read == [(24, 1), (25, 1), (26, 1)] * 2


# -- turns: a contestant that writes down what it is asked and answers what it is told --

SCRIPTED = """
import json, sys
from time import monotonic
task = json.loads(sys.argv[1])
place, speed, fails = task["path"].split(":")
print(json.dumps({"first_token_at": monotonic(), "version": "1", "step_bytes": 1000}), flush=True)
for line in sys.stdin:
    what = json.loads(line)
    with open(place, "a") as file:
        parts = (what.get(key) for key in ("do", "length", "new", "seed"))
        print(task["engine"], *parts, file=file)
    if fails == what["do"]:
        print(json.dumps({"error": "it cannot"}), flush=True)
        break
    step = 1 / float(speed) / (2 if what.get("seed") == 3 else 1)
    times = [0.5 + step * place for place in range(what.get("new", 0))]
    print(json.dumps({"tokens": [7] * what.get("new", 0), "times": times}), flush=True)
"""


def scripted_race(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str = "",
    speed: float = 80,
    num_tries: int = 1,
) -> tuple[list[Any], list[str]]:
    """A race of A and B, of which B may fail; and the lines that both wrote."""
    script, asked = folder / "script.py", folder / "asked"
    script.write_text(SCRIPTED)
    monkeypatch.setattr(races, "WORKER", script)
    work = races.Work(100, 4, 16, 6, [24], 3)
    probes = iter(range(1, 100))
    entries = [
        races.Entry("A", "x", Path(f"{asked}:100:")),
        races.Entry("B", "x", Path(f"{asked}:{speed}:{fails}"), step_bytes=4000),
    ]
    racers = [races.Racer.start(each, work, 1, 1, folder / "log") for each in entries]
    try:
        races.race(racers, work, 3, lambda: 1e6 * next(probes), num_tries)
    finally:
        for racer in racers:
            racer.end()
    return racers, asked.read_text().splitlines()


def test_contestants_take_turns_at_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    racers, asked = scripted_race(tmp_path, monkeypatch)
    # Warm first; then in each round a new prompt, the same one for both.
    short = [
        (who, f"{who} run 16 1 {2 * number}", f"{who} run 4 {new} {2 * number + 1}")
        for number, new in ((0, 8), (1, 6), (2, 6), (3, 6))
        for who in "AB"
    ]
    held = [(who, f"{who} hold 24 None 0", f"{who} resume None 3 None") for who in "AB"]
    behind = [(who, f"{who} resume None 3 None") for _ in range(3) for who in "AB"]
    assert asked == [line for _, *lines in (*short, *held, *behind) for line in lines]
    a, b = (racer.as_dict() for racer in racers)
    # Seed 3 is decoded twice as fast: the median of the rounds ignores it. No prompt is in it.
    assert (a["decode_tok_s"], b["decode_tok_s"]) == (pytest.approx(100), pytest.approx(80))
    assert a["prefill_tok_s"] == pytest.approx(16 / 0.5)
    assert a["context_24_tok_s"] == pytest.approx(100)
    assert (a["bytes_per_token"], b["bytes_per_token"]) == (1000, 4000)
    # Probes: 1 before, 2 behind A's turn, 3 behind B's, ...: each turn has the mean of its two.
    found = [each["read_bandwidth_gb_s"] * 1e3 for each in b["per_round"]]
    assert found == pytest.approx([2.5, 4.5, 6.5])
    assert b["per_round"][1]["bandwidth_fraction"] == pytest.approx(4000 * 80 / 4.5e6)


def test_who_is_far_behind_has_two_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    racers, asked = scripted_race(tmp_path, monkeypatch, speed=20)
    slow = [line for line in asked if line.startswith("B ")]
    assert slow == [
        *("B run 16 1 0", "B run 4 8 1", "B run 16 1 2", "B run 4 6 3"),
        *("B run 16 1 4", "B run 4 6 5", "B hold 24 None 0", *(["B resume None 3 None"] * 3)),
    ]
    assert racers[1].as_dict()["context_24_tok_s"] == pytest.approx(20)
    assert len(racers[0].as_dict()["per_round"]) == 3


def test_of_a_disturbed_turn_the_calmest_try_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp was noted with 1 token a second, because another program took a core meanwhile."""
    # Seconds before and behind each turn of B: its first turn waits for 3, then for 9 more.
    waits = {"A": repeat(0.0), "B": chain([0.0, 3.0, 3.0, 12.0], repeat(12.0))}
    monkeypatch.setattr(races.Racer, "waited", lambda self: next(waits[self.entry.engine]))
    monkeypatch.setattr(races, "PAUSE_SECONDS", 0)
    racers, asked = scripted_race(tmp_path, monkeypatch, num_tries=2)
    # The long prompt is a new one in each try: some engines remember.
    assert [line for line in asked if line.startswith("B run 16")] == [
        *("B run 16 1 0", "B run 16 1 2", "B run 16 1 10002", "B run 16 1 4", "B run 16 1 6")
    ]
    # Probes 2 and 3 were around the first try, 4 and 5 around the second.
    found = [each["read_bandwidth_gb_s"] * 1e3 for each in racers[1].as_dict()["per_round"]]
    assert found == pytest.approx([2.5, 6.5, 8.5])
    assert [each["waited"] > 0 for each in racers[1].as_dict()["per_round"]] == [True, False, False]


@pytest.mark.parametrize("fails", ["run", "resume"])
def test_a_contestant_that_fails_is_out_and_the_others_go_on(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    racers, asked = scripted_race(tmp_path, monkeypatch, fails)
    assert racers[0].failure is None and racers[0].as_dict()["context_24_tok_s"] > 0
    assert racers[1].failure == f"it cannot (see {tmp_path / 'log'})"
    assert sum(line.startswith(f"B {fails}") for line in asked) == 1


# -- what is written for others --


def test_queries_rotate_by_neighbours_as_they_do_by_halves() -> None:
    """llama.cpp rotates numbers 2i and 2i + 1 of a head where others rotate i and i + D/2."""
    heads, width = 3, 8
    weight = torch.randn(heads * width, 5)
    pairs = files.neighbouring_pairs(weight, heads).view(heads, width // 2, 2, 5)
    halves = weight.view(heads, 2, width // 2, 5)
    assert torch.equal(pairs[:, :, 0], halves[:, 0])
    assert torch.equal(pairs[:, :, 1], halves[:, 1])


def test_rope_factors_stretch_long_waves_only() -> None:
    """Llama 3.2: waves of up to 8,192 / 4 positions stay, those above 8,192 are 32 times longer."""
    factors = files.rope_factors(model_config(shape_config("llama-3.2-1b")))
    waves = 2 * math.pi * 500000 ** (torch.arange(0, 64, 2) / 64)
    assert factors[waves < 2048].tolist() == pytest.approx([1.0] * int((waves < 2048).sum()))
    assert factors[waves > 8192].tolist() == pytest.approx([32.0] * int((waves > 8192).sum()))
    assert files.rope_factors(model_config(shape_config("llama-160m"))) is None


def test_names_in_a_gguf() -> None:
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.11.self_attn.q_proj.weight": "blk.11.attn_q.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    assert {name: files.gguf_name(name) for name in names} == names


# -- ratios --


def test_ratios_are_to_the_fastest_peer() -> None:
    group = {
        "gptfast int4": {"decode_tok_s": 60.0, "prefill_tok_s": 300.0},
        "gptfast int4-dynamic": {"decode_tok_s": 66.0, "prefill_tok_s": 500.0},
        "llama.cpp Q4_0": {"decode_tok_s": 50.0, "prefill_tok_s": 250.0},
        "openvino int4": {"decode_tok_s": 40.0, "prefill_tok_s": 400.0},
    }
    over = report.over_best_peer(group)
    assert over["gptfast int4"] == {
        "decode_tok_s": {"ratio": 1.2, "peer": "llama.cpp Q4_0"},
        "prefill_tok_s": {"ratio": 0.75, "peer": "openvino int4"},
    }
    assert over["gptfast int4-dynamic"]["prefill_tok_s"]["ratio"] == 1.25
    assert report.over_best_peer({"gptfast int4": group["gptfast int4"]}) == {}
    assert report.equal_tokens([5, 6, 7, 8], [5, 6, 9, 8]) == 0.5
    assert report.equal_tokens([5, 6], [5, 6]) == 1.0


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    speeds = {"decode_tok_s": 60.0, "prefill_tok_s": 300.0, "context_24_tok_s": 9.0}
    groups = {"int4": {"gptfast int4": speeds, "llama.cpp Q4_0": speeds}}
    result = {"groups": groups, "contexts": [24], "model": "m", "device_name": "d", "threads": 1}
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
