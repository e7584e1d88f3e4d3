"""docs/adding-a-family.md holds what it says: its code adds a family, in as few lines as it claims,
and that family computes what transformers computes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is the oracle here")

import family_cases
from test_engine import run
from test_parity import (
    LENGTH,
    PROMPT,
    Pair,
    assert_equal_logits,
    cached,
    load_theirs,
    random_ids,
    uncached,
)

from gptfast.engine import Engine
from gptfast.families import FAMILIES, Family, llama_line, model_config
from gptfast.loading import load
from gptfast.sampling import SamplingParams

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-family.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def entries(block: str, names: dict[str, Any]) -> dict[str, Any]:
    """A block of the page, entries of a dict literal, read where `names` are known."""
    return eval("{" + block + "}", dict(names))


FAMILY, SHARED, CASES = (
    entries(block, vars(module))
    for block, module in zip(BLOCKS, (llama_line, family_cases, family_cases), strict=True)
)
[MODEL_TYPE] = FAMILY


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The family and its cases, in the tables for the time of a test."""
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, FAMILY[MODEL_TYPE])
    monkeypatch.setitem(family_cases.FAMILY, MODEL_TYPE, SHARED[MODEL_TYPE])
    for name, case in CASES.items():
        monkeypatch.setitem(family_cases.CASES, name, case)
    with torch.no_grad():
        yield FAMILY[MODEL_TYPE]


def checkpoint(folder: Path, name: str) -> Pair:
    family_cases.write_checkpoint(folder, name)
    return Pair(folder, load(folder, torch.float32), load_theirs(folder))


def test_it_takes_fewer_lines_than_the_page_says() -> None:
    """All three blocks together; and none is wider than the code they go into."""
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert 10 < len(lines) < 40
    assert max(map(len, lines)) <= 100


def test_the_example_is_new_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(family_cases.cases_of(MODEL_TYPE)) == len(CASES) >= 2
    assert SHARED.keys() == FAMILY.keys()
    assert f"-k {MODEL_TYPE}-" in PAGE.read_text()
    monkeypatch.undo()
    assert MODEL_TYPE not in FAMILIES, "gptfast has it now: the page needs another example"
    with pytest.raises(ValueError, match=f"'{MODEL_TYPE}' is not supported"):
        model_config(SHARED[MODEL_TYPE] | {"model_type": MODEL_TYPE})


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, tmp_path: Path) -> None:
    pair, ids = checkpoint(tmp_path, name), random_ids(LENGTH)
    expected = pair.expected(ids)
    assert_equal_logits(uncached(pair.ours, ids), expected)
    assert_equal_logits(cached(pair.ours, ids, PROMPT, 8, torch.float32), expected)


@pytest.mark.parametrize("name", CASES)
def test_greedy_text(name: str, tmp_path: Path) -> None:
    pair, prompt = checkpoint(tmp_path, name), random_ids(PROMPT, 5)
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=32)
    [result] = run(Engine(pair.ours, 1, 64), (prompt, greedy))
    logits = pair.expected(prompt + result.token_ids[:-1])[PROMPT - 1 :]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "rounding could decide: choose another prompt"
    assert result.token_ids == logits.argmax(-1).tolist() and len(result.token_ids) == 32


@pytest.mark.parametrize("name", CASES)
def test_it_reads_what_transformers_saves(name: str, tmp_path: Path) -> None:
    pair = checkpoint(tmp_path, name)
    raw = family_cases.raw_config(name)
    assert pair.ours.config == model_config(raw)
    load_theirs(tmp_path).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved != raw and model_config(saved) == model_config(raw)
    count = sum(parameter.numel() for parameter in pair.theirs.parameters())
    assert model_config(raw).num_parameters == count


def test_absent_keys_mean_what_transformers_takes() -> None:
    import transformers

    defaults = "head_dim rms_norm_eps num_key_value_heads partial_rotary_factor attention_bias"
    raw = SHARED[MODEL_TYPE] | {"model_type": MODEL_TYPE, "hidden_size": 512}
    raw = {key: value for key, value in raw.items() if key not in defaults.split()}
    ours, theirs = model_config(raw), transformers.AutoConfig.for_model(**raw)
    assert (ours.head_dim, ours.norm_eps) == (theirs.head_dim, theirs.rms_norm_eps)
    assert (ours.num_kv_heads, ours.qkv_bias) == (theirs.num_key_value_heads, theirs.attention_bias)
    share = theirs.rope_parameters["partial_rotary_factor"]
    assert ours.rope is not None and ours.rope.dim == ours.head_dim * share


@pytest.mark.parametrize("fact", ["norms", "qkv_bias", "rope"])
def test_its_facts_are_needed(
    fact: str, added: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without one of them nothing loads, or something else is computed."""
    name = "glm4-biases"
    pair, ids = checkpoint(tmp_path, name), random_ids(PROMPT)
    facts = {key: reader for key, reader in added.facts.items() if key != fact}
    if fact == "rope":
        facts["rope"] = llama_line.rope(partial=0.5)  # the other pairs
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, replace(added, facts=facts))
    try:
        ours = load(tmp_path, torch.float32)
    except ValueError as error:
        assert fact != "rope" and "no place for" in str(error)
    else:
        assert (uncached(ours, ids) - pair.expected(ids)).abs().max() > 0.1
