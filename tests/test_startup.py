"""Starts: weights read by several threads at once are the weights, and nothing of a start outlives
it; what is compiled is kept where it is said to be.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from gptfast import compiler, loading
from gptfast.checkpoint import inspect
from gptfast.commands import main
from gptfast.convert import convert
from gptfast.loading import load, read_parameters
from gptfast.model import Transformer
from gptfast.quantization import quant_plan
from gptfast.sources import Source
from gptfast.tensor_files import _read_ahead
from quantize.packed import PackedLinear

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def weights(model: Transformer) -> dict[str, Tensor]:
    """Of every module, in whatever form it holds them."""
    found = dict(model.named_parameters())
    for name, module in model.named_modules():
        if hasattr(module, "dequantize"):
            found[f"{name}.weight"] = module.dequantize()
    return found


def assert_same(model: Transformer, expected: dict[str, Tensor]) -> None:
    found = weights(model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


# -- loading with several threads --


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_threads_read_what_one_reads(
    tmp_path: Path, make: Callable[..., Path], dtype: torch.dtype
) -> None:
    source = inspect(make(tmp_path / "model"))
    empty = load(source, dtype)
    plain = [(name, value) for name, value in read_parameters(source, _meta(source), dtype, CPU)]
    assert_same(empty, dict(plain))
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(empty.blocks[1].mlp.down, PackedLinear)


@pytest.mark.usefixtures("three_threads")
def test_a_bias_stays_with_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is slow to pack has taken its module's bias; no other thread may put it there
    meanwhile.
    """
    folder = tiny_gpt2(tmp_path)
    pack, expected = loading.pack_linears, weights(load(folder, torch.float32))

    def slow(model: torch.nn.Module, dtype: torch.dtype) -> None:
        pack(model, dtype)
        time.sleep(0.003)

    monkeypatch.setattr(loading, "pack_linears", slow)
    for _ in range(3):
        found = weights(load(folder, torch.bfloat16))
        for name, weight in found.items():
            assert torch.equal(weight.float(), expected[name].bfloat16().float()), name


def _meta(source: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(source.config)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("form", ["int8", "int4-g16"])
def test_threads_read_stored_weights(tmp_path: Path, form: str) -> None:
    """Also in the order of the model, whichever thread is first."""
    plan = quant_plan(form)
    convert(tiny_llama(tmp_path / "model"), tmp_path / "own", quant=plan)
    model = load(tmp_path / "own", "fp32")
    torch.set_num_threads(1)
    alone = load(tmp_path / "own", "fp32")
    assert_same(model, weights(alone))
    assert list(model.formats.items()) == list(alone.formats.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_what_is_not_rounded_has_memory_of_its_own(tmp_path: Path, dtype: str) -> None:
    """Weights pass through the same memory on their way to another form; one that stays as it is
    would have become the next one.
    """
    folder = tiny_llama(tmp_path / "model")
    plan = quant_plan("int4", 16, exclude=["mlp.down", "attention.out"])
    found, expected = weights(load(folder, dtype, quant=plan)), weights(load(folder, dtype))
    same = [name for name in expected if "down" in name or "attention.out" in name]
    assert len(same) == 4
    for name in same:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.usefixtures("three_threads")
def test_threads_leave_the_number_of_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each computes with a share of them, which torch remembers for new threads of the process."""
    folder = tiny_llama(tmp_path / "model")

    def in_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    load(folder)
    assert (torch.get_num_threads(), in_new_thread()) == (3, 3)

    def broken(*args: Any) -> None:
        raise ValueError("unreadable")

    monkeypatch.setattr(Source, "read", broken)
    with pytest.raises(ValueError, match="unreadable"):
        load(folder)
    assert (torch.get_num_threads(), in_new_thread()) == (3, 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.usefixtures("three_threads")
def test_an_interrupted_load_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that no thread has begun are left unread."""
    folder = tiny_llama(tmp_path / "model", num_hidden_layers=40)
    num_read, read = 0, Source.read
    begun = threading.Event()

    def counted(self: Source, *args: Any) -> None:
        nonlocal num_read
        num_read += 1
        begun.wait(timeout=60)
        read(self, *args)

    def interrupted(items: Any) -> Iterator[Any]:
        begun.set()
        raise KeyboardInterrupt
        yield from items

    monkeypatch.setattr(Source, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=interrupted)
    assert num_read < 40 * 6


def test_rounding_and_unknown_files_take_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding needs several times the memory of a weight."""
    seen: list[str] = []
    read = Source.read

    def watched(self: Source, *args: Any) -> None:
        seen.append(threading.current_thread().name)
        read(self, *args)

    monkeypatch.setattr(Source, "read", watched)
    torch.set_num_threads(2)
    try:
        for plan in (None, quant_plan("int8")):
            seen.clear()
            load(tiny_llama(tmp_path / "model"), "bf16", quant=plan)
            is_main = {name == "MainThread" for name in seen}
            assert is_main == {plan is not None}
    finally:
        torch.set_num_threads(1)


def test_reading_ahead_is_no_promise(tmp_path: Path) -> None:
    _read_ahead([tmp_path / "absent"])


def test_peak_of_a_plain_load(tmp_path: Path) -> None:
    """The weights, and of one more at a time: not the weights twice, nor all of them unpacked."""
    folder = tiny_llama(
        tmp_path / "model",
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=64,
    )
    code = (
        "import sys, torch; from pathlib import Path; from gptfast.loading import load\n"
        "torch.set_num_threads(2)\n"
        "def held():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith('RssAnon'))\n"
        "seen = []\n"
        "def watched(items):\n"
        "    for item in items:\n"
        "        yield item\n"
        "        seen.append(held())\n"
        "before = held()\n"
        "model = load(Path(sys.argv[1]), 'bf16', progress=watched)\n"
        "print(max(*seen, held()) - before, 2 * model.config.num_parameters)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    peak, size = map(int, found.stdout.split())
    assert peak < 1.25 * size, (peak, size)


# -- the compiler --


def test_the_compiler_starts_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that the block outlives, whatever happens in it; the collector sleeps."""
    begun, ended = threading.Event(), threading.Event()

    def start(device: torch.device) -> None:
        begun.wait(timeout=60)
        ended.set()

    monkeypatch.setattr(compiler, "_start", start)
    assert gc.isenabled()
    with pytest.raises(KeyError), compiler.started_early(CPU):
        assert not gc.isenabled() and not ended.is_set()
        begun.set()
        raise KeyError
    assert ended.is_set() and gc.isenabled()


def test_a_sleeping_collector_stays_asleep() -> None:
    gc.disable()
    try:
        with compiler.without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_options_are_known() -> None:
    """torch.compile refuses unknown ones at the first call; names have changed before."""
    from torch._inductor import config

    known = config.get_config_copy()
    for device in ("cpu", "cuda"):
        assert compiler.options(torch.device(device)).keys() <= known.keys()


@pytest.mark.slow
def test_graphs_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process compiled, saved to a file and loaded into another cache, is all that another
    process needs: no graph is lowered and no C++ compiled.
    """
    code = (
        "import json, torch\n"
        "from torch import nn\n"
        "from gptfast.compiler import compile_alone, started_early\n"
        "cpu = torch.device('cpu')\n"
        "with started_early(cpu): pass\n"
        "def function(x): return nn.functional.silu(x) * 3\n"
        "found = compile_alone(function, cpu)(torch.arange(64.0))\n"
        "from torch._dynamo.utils import counters\n"
        "print(json.dumps([found.tolist(), counters['inductor'], counters['aot_autograd']]))"
    )
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def use(cache: Path) -> None:
        monkeypatch.setenv("GPTFAST_CACHE_DIR", str(cache))

    def compiled() -> Any:
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert not found.returncode, found.stderr
        return json.loads(found.stdout)

    def libraries(cache: Path) -> set[str]:
        return {str(path.relative_to(cache)) for path in cache.rglob("*.so")}

    first, second, file = tmp_path / "first", tmp_path / "second", str(tmp_path / "file")
    use(first)
    expected, *_ = compiled()
    assert libraries(first / "graphs")
    assert main(["cache", "save", file]) == 0
    use(second)
    assert main(["cache", "load", file]) == 0
    before = libraries(second)
    found, inductor, autograd = compiled()
    assert found == expected == nn.functional.silu(torch.arange(64.0)).mul(3).tolist()
    assert libraries(second) == before == libraries(first)
    assert not inductor.get("fxgraph_cache_miss") and not autograd.get("autograd_cache_miss")
    assert autograd.get("autograd_cache_hit", 0) + inductor.get("fxgraph_cache_hit", 0) >= 2


@pytest.mark.slow
def test_the_benchmark_measures_starts() -> None:
    """Every kind of start has its stages, which add up, and its memory."""
    command = [sys.executable, "bench/startup.py", "--rounds=1", "--threads=1", "--json"]
    command += ["--eager-only", "--drop", "--max-seq-len=64", "--device=cpu"]
    environment = {**os.environ, "GPTFAST_NO_KERNELS": "1"}
    output = subprocess.check_output(command, text=True, cwd=ROOT, env=environment)
    result = json.loads(output)
    found = result["variants"]["as stored"]
    for start in ("eager", "eager_dropped"):
        stages = {key: seconds for key, seconds in found[start].items() if key != "total_s"}
        assert stages.keys() == {
            *("import_torch_s", "import_gptfast_s", "load_s", "compile_s", "first_token_s")
        }
        assert min(stages.values()) >= 0 and stages["compile_s"] == 0
        assert sum(stages.values()) == pytest.approx(found[start]["total_s"])
    memory = found["memory"]
    assert memory["weights_bytes"] == 2 * result["parameters"] and memory["within"]
    assert memory["baseline_bytes"] > 100e6 and 0 < memory["cache_bytes"] < 10e6
