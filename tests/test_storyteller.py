"""The bundled storyteller and its draft: small, matched, coherent, and trained on what we say."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from gptfast.hub import BUNDLED
from gptfast.llm import LLM
from gptfast.sampling import SamplingParams

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # they are doors and their rooms, not a package
from story_grammar import PLOTS, compose  # noqa: E402
from train_storyteller import (  # noqa: E402
    RECIPES,
    first_story,
    held_out_story,
    story_ids,
    training_story,
)

# Composed text of the seeds below when the bundled weights were trained.
TRAINED_ON = "88df22610c25b903b4fc97a6a96e7dd49179b3c52cce964959071ac81686595a"
# Nats per token on stories that no reported number has used; the README reports about 0.02 less.
MAX_LOSS = {"storyteller": 0.30, "storyteller-draft": 0.75}
# Share of positions where both models' most likely token is the same; the README reports 0.83.
MIN_AGREEMENT = 0.75


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    return {name: LLM(name, dtype="fp32") for name in BUNDLED}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED["storyteller"] / "tokenizer.json"))


# -- the grammar --


def test_same_seed_same_story_in_another_process() -> None:
    code = "from story_grammar import compose; print(compose(7), end='')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPTS,
        env={**os.environ, "PYTHONHASHSEED": "3", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    assert run.stdout.decode() == compose(7) != compose(8)


def test_grammar_is_the_one_the_weights_learned_from() -> None:
    """Who edits a template must train again (scripts/train_storyteller.py) and renew this sum."""
    text = "\n".join(training_story(index) for index in range(500))
    assert hashlib.sha256(text.encode()).hexdigest() == TRAINED_ON


def test_stories_hardly_repeat_a_sentence() -> None:
    stories = [compose(index) for index in range(2000)]
    sentences = {s for story in stories for s in re.split(r"(?<=[.!?]) |\n\n", story)}
    assert len(set(stories)) == len(stories)
    assert len(sentences) > 10_000


def test_held_out_stories_are_not_in_the_training_text() -> None:
    held_out = {held_out_story(index) for index in range(1000)}
    first = first_story(RECIPES["storyteller"].seed)
    assert held_out.isdisjoint(training_story(first + index) for index in range(5000))


@pytest.mark.parametrize("index", range(2 * len(PLOTS)))
def test_story_is_well_formed(index: int) -> None:
    story = compose(f"form {index}")
    assert not re.search(r"[\[\]{}|<>_“”]|  | [.,!?]|[.,]{2}", story)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouhX]", story)
    assert not re.search(r"[.!?] [a-z]|(^|\n)\W*[a-z]", story), "a sentence begins in lower case"
    assert story.count('"') % 2 == 0
    assert 70 < len(story.split()) < 500


# -- the files --


def test_bundle_is_small_and_complete() -> None:
    files = [path for folder in BUNDLED.values() for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for folder in BUNDLED.values():
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= names


def test_draft_shares_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        one, other = (folder / name for folder in BUNDLED.values())
        assert one.read_bytes() == other.read_bytes()


def test_shapes_divide_between_two_ranks(llms: dict[str, LLM]) -> None:
    for llm in llms.values():
        config = llm.config
        assert config.dim % 64 == config.hidden_dim % 64 == 0
        assert config.num_heads >= 4
        assert config.num_kv_heads % 2 == 0


@pytest.mark.parametrize("text", ["", " a  b\n\n", "naïve 日本 🙂", "Once upon a time, Mia said:"])
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<s>")
    assert tokenizer.decode(ids) == text


# -- what it learned --


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_held_out_loss(name: str, llms: dict[str, LLM], tokenizer: Tokenizer) -> None:
    scores = [
        llms[name].score(story_ids(tokenizer, held_out_story(index))[:512])
        for index in range(1000, 1030)
    ]
    assert -torch.cat(scores).mean() < MAX_LOSS[name]


def test_draft_guesses_what_the_storyteller_says(
    llms: dict[str, LLM], tokenizer: Tokenizer
) -> None:
    equal = []
    for index in range(1000, 1010):
        ids = story_ids(tokenizer, held_out_story(index))[:512]
        best, guess = (llms[name].logits(ids).argmax(-1) for name in BUNDLED)
        equal.append(best == guess)
    assert torch.cat(equal).float().mean() > MIN_AGREEMENT


OPENINGS = {
    "Tilda": "Once upon a time, there was a little fox named Tilda. Tilda had a red kite.",
    "Lily": "Once upon a time, there was a girl named Lily. She had a red kite.",
    "Marvin": "One rainy morning, a brave dragon named Marvin woke up. Marvin had a red kite.",
    "Otto": "This is the story of Otto, a shy bear who lived in a small house. He had a red kite.",
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_hero_and_kite_stay_to_the_end(temperature: float, llms: dict[str, LLM]) -> None:
    """Tilda and Marvin are in no table of names: they can only be copied from the opening."""
    params = SamplingParams(temperature=temperature, seed=5, max_new_tokens=400)
    outputs = llms["storyteller"].generate(list(OPENINGS.values()), params)
    for name, output in zip(OPENINGS, outputs, strict=True):
        assert output.finish_reason == "stop", "the story should come to its own end"
        assert output.text.count(name) >= 4, output.text
        assert name in output.text[len(output.text) // 2 :], output.text
        assert "kite" in output.text, output.text


def test_cowriting_turns_extend_each_other(llms: dict[str, LLM]) -> None:
    """The second turn's ids begin with the first turn's and its reply's, so the cache is kept."""
    llm = llms["storyteller"]
    messages = [{"role": "user", "content": "Once upon a time, there was a fox named Ben."}]
    first = llm.encode_chat(messages)
    reply = llm.chat(messages, SamplingParams(temperature=0.8, seed=2, max_new_tokens=40))
    messages += [
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": "Then a dragon came."},
    ]
    second = llm.encode_chat(messages)
    known = first + reply.token_ids
    assert second[: len(known)] == known
    assert len(second) > len(known)
