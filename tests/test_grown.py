"""bench/grow.py: a grown model computes what the small one does, and has the bytes of a large one;
and bench/speculation.py, which needs it.

What is written in bfloat16 is checked in float64 and float32, where nothing but rounding differs.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import LLM, SamplingParams
from gptfast.hub import find_model
from gptfast.loading import load
from gptfast.model import Transformer

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))  # a folder of scripts, no package
grow, speculation, spec_race = map(import_module, "grow speculation spec_race".split())

SMALL = "storyteller-draft"  # 3 layers of 64, 4 heads of 16 over 2
CPU = torch.device("cpu")
PROMPTS = ["Once upon a time", "There was a boy named Theo. He had a blue drum."]


def shape(dim: int, heads: int, kv_heads: int, head_dim: int, **others: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_hidden_layers": 7,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 320,
        "vocab_size": 2100,
        "max_position_embeddings": 512,
        **others,
    }


SHAPES = {
    # Three copies, of which one has no partner; each query head twice in its group; one
    # key/value head more.
    "odd": shape(6 * 64, 12, 3, 32),
    # Four copies; a key/value head for each query head, and two more; heads as they were.
    "even": shape(7 * 64, 6, 6, 16),
}


@pytest.fixture(scope="module", params=SHAPES)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("grown") / request.param
    return folder, grow.grow(find_model(SMALL), SHAPES[request.param], folder)


def both(folder: Path) -> tuple[Transformer, Transformer]:
    """The small model and the grown one, in float64."""
    return tuple(load(at, torch.float32, CPU).double() for at in (find_model(SMALL), folder))


def story_tokens() -> Tensor:
    """[1, T] of a story."""
    text = Path(find_model(SMALL)).parent / "stories.txt"
    llm = LLM(SMALL, dtype="fp32")
    return torch.tensor([llm.encode(text.read_text()[:900])])


@torch.no_grad()
def test_it_computes_what_the_small_model_does(grown: Any) -> None:
    folder, _ = grown
    tokens = story_tokens()
    positions = torch.arange(tokens.size(1)).unsqueeze(0)
    ours, theirs = (model(tokens, positions) for model in both(folder))
    # Norms round to float32 even here.
    torch.testing.assert_close(theirs[..., : ours.size(-1)], ours, rtol=0, atol=1e-4)
    assert theirs[..., ours.size(-1) :].max() < -grow.FLOOR / 2
    found = grow.compare(find_model(SMALL), folder, tokens, torch.float32)
    assert found.logit_error < 1e-4 * found.logit_size
    assert found.equal == 1.0


@torch.no_grad()
def test_the_first_layers_hold_what_the_first_small_ones_held(grown: Any) -> None:
    # So that a draft of the first N layers accepts no more than one of a real model would.
    folder, _ = grown
    small, wide = both(folder)
    tokens = story_tokens()[:, :40]
    positions = torch.arange(40).unsqueeze(0)
    streams: dict[str, list[Tensor]] = {}
    for name, model in (("small", small), ("wide", wide)):
        seen = streams[name] = []

        def run(block: Any, x: Tensor, *rest: Any, seen: list[Tensor] = seen) -> Tensor:
            seen.append(block(x, *rest))
            return seen[-1]

        model.hidden(tokens, positions, run_block=run)
    held = [0, 0, 1, 1, 2, 2, 3]  # small layers behind each of the seven, by hand
    for layer, count in enumerate(held):
        x = streams["wide"][layer][..., 64:128]
        expected = streams["small"][count - 1] if count else small.embedded(tokens, positions)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-3)


def test_its_greedy_texts_are_those_of_the_small_model(grown: Any) -> None:
    folder, _ = grown
    params = SamplingParams(temperature=0.0, max_new_tokens=40)
    ours = LLM(SMALL, dtype="fp32").generate(PROMPTS, params)
    theirs = LLM(folder, dtype="fp32").generate(PROMPTS, params)
    assert [each.token_ids for each in theirs] == [each.token_ids for each in ours]


@pytest.mark.parametrize("quant", ["int8", "int4", "int8-dynamic", "int4-asym"])
def test_quantized_it_is_as_good_as_the_small_model_quantized(grown: Any, quant: str) -> None:
    # What is added must cancel in rounded numbers too, and no group may become NaN.
    folder, _ = grown
    ids = story_tokens()[0].tolist()
    exact = LLM(SMALL, dtype="fp32").logits(ids)
    small = LLM(SMALL, dtype="fp32", quant=quant).logits(ids)
    wide = LLM(folder, dtype="fp32", quant=quant).logits(ids)[:, : exact.size(1)]
    assert wide.isfinite().all()
    errors = [float((logits - exact).square().mean().sqrt()) for logits in (small, wide)]
    assert 0.9 < errors[1] / errors[0] < 1.1


def test_hardly_anything_in_it_is_zero(grown: Any) -> None:
    folder, written = grown
    model = load(folder, torch.float32, CPU)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    numbers = sum(p.numel() for p in matrices.values())
    assert written.num_parameters == sum(p.numel() for p in model.parameters())
    assert written.num_zeros < 0.1 * written.num_parameters
    zeros = {name: 1 - float(p.count_nonzero()) / p.numel() for name, p in matrices.items()}
    assert max(zeros.values()) < 0.35 and numbers > 0.99 * written.num_parameters
    added = {name: share for name, share in zeros.items() if name.startswith("blocks.0.")}
    assert len(added) == 4 and not any(added.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 300}, "a stream of 64 cannot become one of 300"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, "2 heads of 16 .* become 3 of 32"),
        ({"num_key_value_heads": 1, "num_attention_heads": 2}, "2 key/value heads are needed"),
        ({"num_hidden_layers": 2}, "num_layers is 2, .* has 3"),
        ({"vocab_size": 1000}, "vocab_size is 1000"),
    ],
)
def test_what_has_no_room_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        grow.grow(find_model(SMALL), {**SHAPES["odd"], **change}, tmp_path / "new")
    with pytest.raises(ValueError, match="no Llama with a head of its own"):
        grow.grown_shape("llama-3.2-1b")


def test_speculation_is_measured_beside_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = shape(5 * 256, 8, 4, 32, num_hidden_layers=5, intermediate_size=640)
    monkeypatch.setattr(speculation, "read_bandwidth", lambda *_: 1e9)
    monkeypatch.setitem(grow.DRAFT_SHAPES, "tiny", sizes)
    monkeypatch.setitem(grow.DRAFT_SHAPES, "tinier", SHAPES["odd"])
    options = (
        "--target=tiny --draft=tinier,ngram,layers:3 --speculate-k=3 --rounds=2 --prompts=1 "
        f"--new-tokens=12 --dtype=fp32 --work-dir={tmp_path} --out={tmp_path / 'found.json'}"
    )
    assert speculation.main(options.split()) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for work, entries in found["works"].items():
        assert list(entries) == ["plain", "tinier k=3", "ngram k=3", "layers:3 k=3"]
        drafted = entries["tinier k=3"]
        assert entries["plain"]["speedup"] == 1
        rounds = [each["tok_s"] / each["plain_tok_s"] for each in drafted["per_round"]]
        assert len(rounds) == 2 and drafted["speedup"] == pytest.approx(sum(rounds) / 2)
        # Three layers of five are two of the storyteller's four, which know something.
        assert 1 < drafted["mean_accepted_length"] <= 4
        assert entries["layers:3 k=3"]["mean_accepted_length"] > 1
        costs = sum(drafted[f"{part}_cost"] for part in ("draft", "verify", "rest"))
        assert costs > 0
        if work != "sampled":
            assert all(entries[name]["equal_tokens"] == 1 for name in list(entries)[1:])
    # A story that is written a second time is found in the text; others are not.
    lengths = {w: each["ngram k=3"]["mean_accepted_length"] for w, each in found["works"].items()}
    assert lengths["repeats"] > 2 > (lengths["stories"] or 1)


def test_costs_and_shares_are_what_they_are_called() -> None:
    def turn(seconds: float, tokens: list[list[int]], said: dict[str, Any] | None) -> Any:
        return spec_race.Turn(10, seconds, 1e9, tokens, said)

    said = {
        "rounds": 4,
        "plain_steps": 1,
        "mean_accepted_length": 2.5,
        "acceptance": 0.5,
        "acceptance_by_position": [0.75, None],
        "draft_s": 0.4,
        "verify_s": 1.2,
        "rest_s": 0.2,
        "note": "on",
    }
    work = spec_race.Work("stories", [], SamplingParams(temperature=0))
    plain, fast = (spec_race.Racer(name, None, {}) for name in ("plain", "fast"))
    plain.turns["stories"] = [turn(2.5, [[1, 2, 3], [4]], None)]  # 0.25 s a token
    fast.turns["stories"] = [turn(2.0, [[1, 2, 9], [4]], said)]
    found = spec_race.figures(fast, plain, work)
    assert found["speedup"] == pytest.approx(1.25) and found["tok_s"] == 5
    assert found["draft_cost"] == pytest.approx(0.4)  # 0.1 s a round, of 0.25
    assert found["verify_cost"] == pytest.approx(1.2)
    assert found["rest_cost"] == pytest.approx(0.2)
    assert found["equal_tokens"] == 0.75
    assert found["drafted_share"] == 0.8
    assert found["acceptance_by_position"] == [0.75, None]
    assert spec_race.equal_tokens([[1, 2, 3]], [[1, 2]]) == pytest.approx(2 / 3)
