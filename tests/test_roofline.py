"""bench/roofline.py draws what benchmarks found; bench/context.py measures one of them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# 1e9 active weights of 2 bytes, on a device that reads 100 GB/s: a token costs 2e9 operations.
DECODE: dict[str, Any] = {
    "benchmark": "decode",
    "model": "a",
    "dtype": "bfloat16",
    "quant": None,
    "active_parameters": 10**9,
    "batch_size": 1,
    "bytes_per_token": 2 * 10**9,
    "decode_tok_s": 40.0,
    "prefill_tokens": 512,
    "prefill_tok_s": 500.0,
    "read_bandwidth_gb_s": 100.0,
}
KERNELS: dict[str, Any] = {
    "benchmark": "kernels",
    "results": [{"shape": "1000x2000", "format": "int8", "rows": 4, "us": 20.0, "gb_s": 100.0}],
}
LIMITS: dict[str, Any] = {
    "benchmark": "limits",
    "read_bandwidth_gb_s": 80.0,
    "matmul_tflop_s": 0.5,
}


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", BENCH / "roofline.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["roofline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points_by_hand(roofline: ModuleType) -> None:
    decode, prefill = roofline.points([DECODE])
    assert (decode.intensity, decode.speed) == (1.0, 8e10)
    assert (prefill.intensity, prefill.speed) == (512.0, 1e12)
    [linear] = roofline.points([KERNELS])  # 16e6 operations in 20 us over 2e6 bytes
    assert linear.intensity == pytest.approx(8.0) and linear.speed == pytest.approx(8e11)
    limits = roofline.limits_of([DECODE, KERNELS, LIMITS])
    assert limits == roofline.Limits(100e9, 0.5e12)
    assert decode.speed / limits.at(decode.intensity) == pytest.approx(0.8)
    assert limits.at(1000.0) == 0.5e12


def test_a_batch_shares_the_weights(roofline: ModuleType) -> None:
    """4 rows: a token reads a quarter of the bytes, so it has four times the intensity."""
    batch = DECODE | {"batch_size": 4, "bytes_per_token": 5 * 10**8}
    decode, prefill = roofline.points([batch])
    assert decode.intensity == 4.0 and prefill.intensity == 512.0


def test_files_of_one_object_or_many_among_text(roofline: ModuleType, tmp_path: Path) -> None:
    alone, lines = tmp_path / "alone.json", tmp_path / "lines.jsonl"
    alone.write_text(json.dumps(DECODE, indent=1))
    lines.write_text(f"a table\n1.5\n{json.dumps(DECODE)}\n\n{json.dumps(LIMITS)}\n")
    assert roofline.read_records(alone) == [DECODE]
    assert roofline.read_records(lines) == [DECODE, LIMITS]
    alone.write_text("no figures")
    with pytest.raises(ValueError, match="holds no JSON object"):
        roofline.read_records(alone)


def test_no_limit_and_no_points_are_said(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(BENCH / "roofline.py"), str(file)]
    for record, reason in ((LIMITS, "nothing to draw"), (KERNELS, "--measure")):
        file.write_text(json.dumps(record))
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 2 and reason in process.stderr


def test_a_plot_is_drawn(roofline: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench: pip install matplotlib")
    out = tmp_path / "plots" / "roofline.png"
    records = [DECODE, KERNELS, LIMITS]
    roofline.draw(list(roofline.points(records)), roofline.limits_of(records), out)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_contexts_are_measured_and_drawn(roofline: ModuleType) -> None:
    command = [sys.executable, str(BENCH / "context.py"), "--shape", "smollm-135m"]
    options = (
        "--num-layers 1 --contexts 16,4000 --steps 2 --rounds 1 --threads 1 --dtype fp32 --profile"
    )
    process = subprocess.run([*command, *options.split()], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    record = json.loads(process.stdout.splitlines()[-1])
    keys = [(each["kv_cache_dtype"], each["context"]) for each in record["results"]]
    assert keys == [("auto", 16), ("auto", 4000), ("int8", 16), ("int8", 4000)]
    short, long, _, eight_bits = record["results"]
    # 3 key/value heads of 64, keys and values, 4 bytes; or 1 byte and a scale for each vector.
    assert long["cache_bytes"] == 4000 * 2 * 3 * 64 * 4
    assert eight_bits["cache_bytes"] == 4000 * 2 * 3 * (64 + 4)
    assert [each["context"] for each in record["profiles"]] == [16, 4000]
    assert all(each["kernels"][0]["us"] > 0 for each in record["profiles"])
    assert short["cache_gb_s"] is None and long["ms_per_token"] > 0
    assert len(list(roofline.points([record]))) == 4


def test_contexts_refuse_what_is_no_length() -> None:
    command = [sys.executable, str(BENCH / "context.py"), "--contexts", "0,5"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and "at least 1" in process.stderr


def test_a_gpu_step_that_fails_loses_no_other(tmp_path: Path) -> None:
    """All of gpu.sh, with a python that knows no more than to fail at one of its steps."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        "#!/bin/sh\n"
        'echo "a table"\n'
        'echo "{\\"command\\": \\"$*\\"}"\n'
        'case "$*" in *llama-3.2-1b*) exit 3;; esac\n'
    )
    python.chmod(0o755)
    command = ["bash", str(BENCH / "gpu.sh"), str(out)]
    process = subprocess.run(command, env=os.environ | {"PY": str(python)}, capture_output=True)
    assert process.returncode == 3  # its table, its speculation and its start
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    commands = [record["command"] for record in records]
    assert len(commands) == 12 and "--measure" in commands[0] and "roofline.png" in commands[-1]
    assert "a table" in (out / "gpu.log").read_text()
    for command in commands:  # every file that it names is there
        named = [word for word in command.split() if word.endswith(".py")]
        assert all((BENCH.parent / word).is_file() for word in named)


def test_a_table_goes_on_after_a_format_that_fails() -> None:
    command = [sys.executable, str(BENCH / "tables.py"), "--shapes", "smollm-135m"]
    options = "--formats nonsense,fp32 --num-layers 1 --rounds 1 --new-tokens 2 --prefill-tokens 8"
    process = subprocess.run(
        [*command, *options.split(), "--threads", "1"], capture_output=True, text=True
    )
    assert process.returncode == 1 and "'nonsense' is unknown" in process.stderr
    [record] = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert record["benchmark"] == "decode" and record["dtype"] == "float32"
    last = process.stdout.splitlines()[-1]
    assert f"{record['decode_tok_s']:.1f}" in last and "float32" in last
