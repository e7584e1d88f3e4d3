"""`gptfast info`: what it says of experts, windows, latents, suggestions and what is left out; and
the table of families, which README.md repeats.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from family_cases import CASES, cases_of, raw_config, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from gptfast.commands import main
from gptfast.commands.info import families_table, proof_selector
from gptfast.convert import convert
from gptfast.families import FAMILIES
from gptfast.loading import load
from gptfast.quantization import quant_plan

REPOSITORY = Path(__file__).resolve().parents[1]
OCCASIONAL = (
    "active_parameters experts window_layers latent_cache quantized kv_cache_dtype "
    "suggested_sampling left_out"
)


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, str], Any]:
    """The lines of `gptfast info` by their first word, and the object of `--json`."""
    assert main(["info", *map(str, arguments), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert main(["info", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    printed = {key for key in facts if key in lines}
    occasional = {*OCCASIONAL.split(), "rope", "local_rope", "tensor_parallel_sizes"}
    assert facts.keys() - printed <= occasional
    return lines, facts


def test_a_plain_model_says_nothing_of_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, facts = info(capsys, tiny_llama(tmp_path))
    for key in OCCASIONAL.split():
        assert key not in lines and facts[key] is None
    assert lines["parameters"] == f"{facts['parameters']:,}"
    assert "local_rope" not in lines and lines["rope"] == "theta 10000.0"
    assert lines["facts"] == (
        "vocab_size 96, dim 32, num_layers 2, num_heads 4, num_kv_heads 2, head_dim 8, "
        "hidden_dim 48, max_seq_len 64, norm rms, norm_eps 1e-05, activation silu, "
        "gated_mlp True, tied_head False, bos_token_id 1, eos_token_ids (2,)"
    )


def test_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, facts = info(capsys, write_checkpoint(tmp_path, "deepseek_v2-lite"))
    config = load(tmp_path).config
    assert lines["experts"] == facts["experts"]
    assert lines["experts"] == (
        "3 of 8 active for a token, each of 20 units and a shared one of 40, in 2 of 3 layers"
    )
    assert facts["parameters"] == config.num_parameters
    assert facts["active_parameters"] == config.num_parameters - 2 * 5 * 3 * 32 * 20
    assert lines["active_parameters"] == f"{facts['active_parameters']:,}"


def test_the_cache_of_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 numbers of latent and 4 rotated ones, in place of 4 heads of 8 + 4 + 10."""
    lines, facts = info(capsys, write_checkpoint(tmp_path, "deepseek_v2-lite"))
    assert lines["latent_cache"] == facts["latent_cache"]
    assert lines["latent_cache"].startswith("16 numbers a token and layer")
    assert lines["latent_cache"].endswith("4 heads would be 88")
    assert facts["cache_bytes"] == 64 * 3 * 16 * 4


def test_windows_and_their_own_rope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, facts = info(capsys, write_checkpoint(tmp_path, "gemma3_text-two-ropes-pattern"))
    assert lines["window_layers"] == facts["window_layers"]
    assert lines["window_layers"] == "of 4 layers 2 see the latest 5 tokens"
    assert lines["local_rope"] == "theta 100.0"
    assert lines["rope"] == "theta 1000000.0, scaling linear, factor 8.0"
    assert facts["local_rope"]["theta"] == 100.0
    assert "norm_offset True" in lines["facts"] and "windows" not in lines["facts"]


def test_how_many_processes_can_share_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama(tmp_path / "plain")  # 4 heads, 48 hidden units
    lines, facts = info(capsys, folder)
    assert facts["tensor_parallel_sizes"] == [2, 4]
    assert lines["tensor_parallel_sizes"] == "2, 4 processes can share it"
    # Groups of 32 columns cannot be cut: of 48 no number of ranks has whole ones.
    assert main(["quantize", str(folder), str(tmp_path / "int4"), "--method", "rtn"]) == 0
    capsys.readouterr()
    lines, facts = info(capsys, tmp_path / "int4")
    assert facts["tensor_parallel_sizes"] is None and "tensor_parallel_sizes" not in lines


def test_suggested_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llama(tmp_path)
    suggestion = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(suggestion))
    lines, facts = info(capsys, folder)
    assert facts["suggested_sampling"] == {"temperature": 0.6, "top_p": 0.95}
    assert lines["suggested_sampling"] == "temperature 0.6, top_p 0.95 (never applied)"


def test_what_a_multimodal_checkpoint_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, "mistral-window")
    path = folder / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    norm = tensors["language_model.model.norm.weight"]
    tensors |= {f"vision_tower.{name}.weight": norm.clone() for name in ("one", "two")}
    save_file(tensors | {"multi_modal_projector.weight": norm.clone()}, path)
    raw = {"model_type": "mistral3", "text_config": raw_config("mistral-window")}
    (folder / "config.json").write_text(json.dumps(raw | {"vision_config": {}}))
    lines, facts = info(capsys, folder)
    assert lines["left_out"] == facts["left_out"]
    assert lines["left_out"] == "3 tensors of multi_modal_projector, vision_tower"
    assert lines["family"].startswith("mistral ")


# -- the table of families --


def test_the_table_is_made_from_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--families"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head == "| `model_type` | models | special | proved by |" and rule == "|---|---|---|---|"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [f"`{model_type}`" for model_type in FAMILIES]
    for row, family in zip(cells, FAMILIES.values(), strict=True):
        assert len(row) == 4 and all(row)
        assert row[1:3] == [family.examples, family.special]


def test_the_table_in_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text()
    _, table = text.split("<!-- families -->\n")
    table, _ = table.split("\n<!-- /families -->")
    assert table == families_table(), (
        "README.md is behind: put the output of `gptfast info --families` between the markers"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_selector_selects_the_cases_of_its_family(model_type: str) -> None:
    selected = [name for name in CASES if proof_selector(model_type) in name]
    assert selected == cases_of(model_type) and len(selected) >= 2


def test_the_command_of_the_table_selects_tests() -> None:
    """One row's, as a reader would run it: the tests of two cases, and none of qwen2_moe."""
    pytest.importorskip("transformers", reason="transformers is the oracle there")
    [row] = [row for row in families_table().splitlines() if row.startswith("| `qwen2` |")]
    program, *options = row.split("|")[4].strip().strip("`").split()
    assert program == "pytest"
    result = subprocess.run(
        [sys.executable, "-m", program, "--collect-only", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    ids = [line for line in result.stdout.splitlines() if "::" in line]
    assert result.returncode == 0, result.stdout + result.stderr
    for name in cases_of("qwen2"):
        assert any("test_greedy_text" in line and name in line for line in ids)
    assert ids and all("qwen2-" in line for line in ids)


def test_quantized_weights_are_counted_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 by 64 + 32 + 96 + 48 numbers a layer in int4, a head of 96 rows in int8 with float32
    scales, and embedding and norms in float32.
    """
    plain = tiny_llama(tmp_path / "plain")
    convert(plain, tmp_path / "own", quant=quant_plan("int4", 16))
    in_groups = 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48)
    rest = 96 * 32 + 96 * 4 + (96 * 32 + 5 * 32) * 4
    _, planned = info(capsys, plain, "--quant", "int4", "--group-size", "16")
    lines, stored = info(capsys, tmp_path / "own")
    assert planned["weights_bytes"] == stored["weights_bytes"] == in_groups * 5 // 8 + rest
    assert planned["quantized"] == "int4-g16, head int8"
    assert lines["quantized"] == "rtn, int4-g16, int8"
    _, widened = info(capsys, tmp_path / "own", "--quant", "none")
    assert widened["weights_bytes"] == info(capsys, plain)[1]["weights_bytes"]
