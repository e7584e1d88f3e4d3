"""The decoder against transformers on tiny random models, its cache against its own uncached pass,
and a real trained checkpoint against golden logits.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LLAMA, tiny_gpt2, tiny_llama
from torch import Tensor

from gptfast.cache import KVCache
from gptfast.families import model_config
from gptfast.loading import load
from gptfast.model import Transformer, fused_rows

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# Our maker, and what differs from LLAMA or GPT2 in tiny.py. At 24 tokens "dynamic" begins to grow.
CASES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama-gqa": (tiny_llama, {}),
    "llama-mqa": (tiny_llama, {"num_key_value_heads": 1}),
    "llama-mha": (tiny_llama, {"num_key_value_heads": 4}),
    "llama-tied": (tiny_llama, {"tie_word_embeddings": True}),
    "llama-biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (tiny_llama, {"head_dim": 16}),
    "llama-gelu": (tiny_llama, {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "llama-theta": (tiny_llama, {"rope_theta": 500.0}),
    "rope-linear": (tiny_llama, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "rope-dynamic": (
        tiny_llama,
        {"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ),
    "rope-dynamic-new-spelling": (
        tiny_llama,
        {
            "max_position_embeddings": 24,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
        },
    ),
    "rope-llama3": (tiny_llama, {"rope_scaling": LLAMA_3, "rope_theta": 100.0}),
    "rope-llama3-new-spelling": (
        tiny_llama,
        {"rope_theta": None, "rope_parameters": LLAMA_3 | {"rope_theta": 100.0}},
    ),
    "rope-yarn": (tiny_llama, {"rope_scaling": YARN}),
    "rope-yarn-old-spelling": (
        tiny_llama,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "rope-yarn-mscale": (
        tiny_llama,
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    ),
    "rope-yarn-attention-factor": (
        tiny_llama,
        {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "gpt2": (tiny_gpt2, {}),
    "gpt2-untied": (tiny_gpt2, {"tie_word_embeddings": False}),
    "gpt2-no-prefix": (tiny_gpt2, {"prefix": ""}),
    "gpt2-no-prefix-untied": (tiny_gpt2, {"prefix": "", "tie_word_embeddings": False}),
    "gpt2-n-inner-gelu": (tiny_gpt2, {"n_inner": 40, "activation_function": "gelu"}),
    "gpt2-relu": (tiny_gpt2, {"activation_function": "relu", "layer_norm_epsilon": 1e-2}),
}


@dataclass(frozen=True)
class Pair:
    """The same weights in our decoder and in transformers'."""

    folder: Path
    ours: Transformer
    theirs: Any

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Their logits [T, V] of one pass over `ids`."""
        return self.expected_decode(ids, len(ids))

    def expected_decode(self, ids: Sequence[int], prompt_length: int) -> Tensor:
        """Their logits [T, V] when the prompt is read at once and each later token alone."""
        self.theirs(torch.tensor([[0]]))  # brings frequencies grown by a longer prompt back
        state = self.theirs(torch.tensor([ids[:prompt_length]]), use_cache=True)
        logits = [state.logits[0]]
        for token in ids[prompt_length:]:
            state = self.theirs(
                torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True
            )
            logits.append(state.logits[0])
        return torch.cat(logits)


def make_pair(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Pair:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    maker, overrides = CASES[name]
    maker(folder, **overrides)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return Pair(folder, load(folder, dtype), theirs.eval())


@pytest.fixture(autouse=True)
def no_grad_and_one_thread() -> Iterator[None]:
    """Beside other work, two threads that wait for each other take 8 times as long (measured)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("model"), request.param)


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LLAMA["vocab_size"], (count,), generator=generator).tolist()


def assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


def uncached(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of the plain causal pass."""
    return model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0]


def prefill(
    model: Transformer, cache: KVCache, row: int, ids: Sequence[int], chunk: int
) -> list[Tensor]:
    """Reads a prompt into a row as the engine does: pieces of a fixed length, the last one padded
    with the spare slot, the row's length known from the start -> logits [t, V] of each piece.
    """
    cache.lengths[row] = len(ids)
    logits = []
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        padding = chunk - len(piece)
        tokens = torch.tensor([[*piece, *([0] * padding)]])
        places = [*range(start, start + len(piece)), *([cache.max_seq_len] * padding)]
        logits.append(model(tokens, torch.tensor([places]), cache.row(row))[0, : len(piece)])
    return logits


def decode(model: Transformer, cache: KVCache, tokens: Sequence[int | None]) -> Tensor:
    """One token for every row (None: the row is idle) -> logits [B, V]."""
    active = torch.tensor([token is not None for token in tokens])
    cache.lengths.add_(active)
    positions = (cache.lengths - 1).where(active, cache.max_seq_len)
    ids = torch.tensor([token or 0 for token in tokens])
    return model(ids.unsqueeze(1), positions.unsqueeze(1), cache)[:, 0]


# -- against transformers --


@pytest.mark.parametrize("length", [1, 24, 25, 50])
def test_uncached_pass(pair: Pair, length: int) -> None:
    ids = random_ids(length)
    assert_equal_logits(uncached(pair.ours, ids), pair.expected(ids))


def test_chunked_prefill(pair: Pair) -> None:
    """37 tokens in pieces of 8 are four whole pieces and one with a padded tail."""
    ids = random_ids(37)
    cache = KVCache.allocate(pair.ours.config, 1, 50, torch.float32)
    logits = torch.cat(prefill(pair.ours, cache, 0, ids, chunk=8))
    assert_equal_logits(logits, pair.expected(ids))


@pytest.mark.parametrize(("prompt_length", "length"), [(1, 10), (20, 30), (30, 34)])
def test_token_by_token_decode(pair: Pair, prompt_length: int, length: int) -> None:
    """From 20 to 30 tokens the way leads across the boundary at which dynamic scaling begins."""
    ids = random_ids(length)
    cache = KVCache.allocate(pair.ours.config, 1, 40, torch.float32)
    logits = prefill(pair.ours, cache, 0, ids[:prompt_length], chunk=16)
    logits += [decode(pair.ours, cache, [token]) for token in ids[prompt_length:]]
    assert_equal_logits(torch.cat(logits), pair.expected_decode(ids, prompt_length))


@pytest.mark.parametrize("prompt_lengths", [(19, 4), (3, None, 30, 21)])
def test_rows_of_different_lengths(pair: Pair, prompt_lengths: tuple[int | None, ...]) -> None:
    """Rows share a cache and a step, an idle one (None) among them; each is as it would be alone.

    The last row starts to decode two steps after the others.
    """
    cache = KVCache.allocate(pair.ours.config, len(prompt_lengths), 40, torch.float32)
    rows = {row: length for row, length in enumerate(prompt_lengths) if length is not None}
    late = max(rows)
    ids = {row: random_ids(length + 6, seed=row) for row, length in rows.items()}
    logits = {row: prefill(pair.ours, cache, row, ids[row][:n], 16) for row, n in rows.items()}
    num_done = dict(rows)
    for step in range(8):
        ready = [r for r in rows if num_done[r] < len(ids[r]) and (r != late or step >= 2)]
        tokens = [ids[r][num_done[r]] if r in ready else None for r in range(cache.num_rows)]
        before = cache.lengths.clone()
        out = decode(pair.ours, cache, tokens)
        for row in range(cache.num_rows):
            assert cache.lengths[row] == before[row] + (row in ready)
        for row in ready:
            logits[row].append(out[row : row + 1])
            num_done[row] += 1
    for row, length in rows.items():
        assert len(ids[row]) == num_done[row]
        assert_equal_logits(torch.cat(logits[row]), pair.expected_decode(ids[row], length))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "rope-yarn", "gpt2"])
def test_bfloat16_rounds_no_worse_than_transformers(name: str, tmp_path: Path) -> None:
    """Root mean square error of the logits, without and with a cache."""
    exact = make_pair(tmp_path, name)
    rounded = make_pair(tmp_path, name, torch.bfloat16)
    errors = []
    for seed in range(3):
        ids = random_ids(40, seed)
        cache = KVCache.allocate(rounded.ours.config, 1, 40, torch.bfloat16)
        cached = prefill(rounded.ours, cache, 0, ids[:36], 8)
        cached += [decode(rounded.ours, cache, [token]) for token in ids[36:]]
        logits = (rounded.expected(ids), uncached(rounded.ours, ids), torch.cat(cached))
        errors.append(torch.stack([(x.float() - exact.expected(ids)).square() for x in logits]))
    theirs, plain, cached_error = torch.cat(errors, dim=1).mean((1, 2)).sqrt().tolist()
    assert 0 < plain <= 1.5 * theirs
    assert 0 < cached_error <= 1.5 * theirs


def test_what_transformers_saves_loads(tmp_path: Path) -> None:
    """Today's spelling of config.json and of the names, whatever this release of it writes."""
    for name in ("llama-tied", "rope-yarn-mscale", "gpt2", "gpt2-untied"):
        pair = make_pair(tmp_path / name, name)
        pair.theirs.save_pretrained(tmp_path / name / "saved")
        ids = random_ids(30)
        saved = load(tmp_path / name / "saved")
        assert torch.equal(uncached(saved, ids), uncached(pair.ours, ids)), name


# -- forward's contract --


@pytest.fixture(params=[tiny_llama, tiny_gpt2])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Transformer:
    return load(request.param(tmp_path / "model"))


def test_select_gives_the_logits_of_those_tokens_only(model: Transformer) -> None:
    tokens = torch.tensor([random_ids(9, 1), random_ids(9, 2)])
    positions = torch.arange(9).expand(2, -1)
    every = model(tokens, positions)
    select = torch.tensor([[8, 0, 3], [2, 2, 7]])
    some = model(tokens, positions, select=select)
    assert every.shape == (2, 9, 96) and every.dtype == torch.float32
    expected = every.gather(1, select.unsqueeze(-1).expand(-1, -1, 96))
    torch.testing.assert_close(some, expected)


def test_uncached_rows_do_not_see_each_other(model: Transformer) -> None:
    rows = [random_ids(12, seed) for seed in range(3)]
    together = model(torch.tensor(rows), torch.arange(12).expand(3, -1))
    for row, ids in enumerate(rows):
        torch.testing.assert_close(together[row], uncached(model, ids), rtol=0, atol=1e-5)


def test_several_tokens_a_row_at_different_positions(model: Transformer) -> None:
    """As in speculation: each row reads a few tokens at its own place, padded to the same count."""
    ids, given, counts = [random_ids(20, seed) for seed in range(3)], (3, 10, 15), (4, 1, 2)
    cache = KVCache.allocate(model.config, 3, 20, torch.float32)
    for row, length in enumerate(given):
        prefill(model, cache, row, ids[row][:length], 8)
    tokens, positions = torch.zeros(3, 4, dtype=torch.int64), torch.full((3, 4), 20)
    for row, (start, count) in enumerate(zip(given, counts, strict=True)):
        tokens[row, :count] = torch.tensor(ids[row][start : start + count])
        positions[row, :count] = torch.arange(start, start + count)
    logits = model(tokens, positions, cache)
    assert logits.isfinite().all()
    for row, (start, count) in enumerate(zip(given, counts, strict=True)):
        assert_equal_logits(logits[row, :count], uncached(model, ids[row][: start + count])[start:])


def test_a_row_reused_ignores_what_an_earlier_prompt_left(model: Transformer) -> None:
    cache = KVCache.allocate(model.config, 2, 40, torch.float32)
    prefill(model, cache, 1, random_ids(40, 1), 16)
    ids = random_ids(11, 2)
    logits = torch.cat(prefill(model, cache, 1, ids, 4))
    assert_equal_logits(logits, uncached(model, ids))


def test_the_spare_slot_is_never_read(model: Transformer) -> None:
    """Padding may write anything there, NaN too."""
    cache = KVCache.allocate(model.config, 2, 20, torch.float32)
    ids = random_ids(13)
    prefill(model, cache, 0, ids[:10], 8)
    for layer in cache.layers:
        layer.keys[:, :, -1] = float("nan")
        layer.values[:, :, -1] = float("nan")
    logits = [decode(model, cache, [token, None])[:1] for token in ids[10:]]
    assert_equal_logits(torch.cat(logits), uncached(model, ids)[10:])


def test_the_context_can_be_filled_to_its_end(model: Transformer) -> None:
    """The last position is max_seq_len - 1; the learned table has no entry for the spare slot."""
    size = model.config.max_seq_len
    ids = random_ids(size)
    cache = KVCache.allocate(model.config, 1, size, torch.float32)
    logits = prefill(model, cache, 0, ids[:-1], 16)
    logits.append(decode(model, cache, [ids[-1]]))
    assert_equal_logits(torch.cat(logits), uncached(model, ids))


def test_a_row_of_the_cache_shares_its_memory(model: Transformer) -> None:
    cache = KVCache.allocate(model.config, 3, 8, torch.float32)
    row = cache.row(1)
    row.lengths.fill_(5)
    row.layers[1].keys.fill_(2.0)
    assert cache.lengths.tolist() == [0, 5, 0]
    assert cache.layers[1].keys[1].eq(2.0).all()
    assert cache.layers[1].keys[[0, 2]].eq(0.0).all()
    assert (row.num_rows, row.max_seq_len) == (1, 8)
    slots = 3 * (8 + 1)
    assert cache.num_bytes == slots * model.config.cache_bytes_per_token(4)


def test_nothing_asks_for_gradients(model: Transformer) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())


# -- parameters --

SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 24]),
        "num_attention_heads": st.sampled_from([2, 4]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([None, 6]),
        "intermediate_size": st.integers(1, 20),
        "num_hidden_layers": st.integers(1, 3),
        "vocab_size": st.integers(1, 30),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
    }
)
GPT2_SIZES = st.fixed_dictionaries(
    {
        "model_type": st.just("gpt2"),
        "n_embd": st.sampled_from([8, 24]),
        "n_head": st.sampled_from([1, 2, 4]),
        "n_layer": st.integers(1, 3),
        "n_positions": st.integers(1, 20),
        "n_inner": st.sampled_from([None, 5]),
        "vocab_size": st.integers(1, 30),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(st.one_of(SIZES.map(lambda sizes: LLAMA | sizes), GPT2_SIZES))
def test_counts_agree_with_the_parameters(raw: dict[str, Any]) -> None:
    config = model_config(raw)
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())  # a shared one once
    assert config.num_parameters == sum(tensor.numel() for tensor in parameters.values())
    fused = {name: rows for name in parameters if (rows := fused_rows(config, name)) is not None}
    assert sum(".qkv.weight" in name for name in fused) == config.num_layers
    assert sum(".gate_up.weight" in name for name in fused) == config.num_layers * config.gated_mlp
    for name, rows in fused.items():
        assert sum(rows) == parameters[name].size(0)
    tables = [] if config.tied_head else [model.embed.weight]
    tables += [] if model.positions is None else [model.positions.weight]
    read = sum(t.nbytes for t in parameters.values()) - sum(t.nbytes for t in tables)
    assert model.bytes_per_step == read


# -- a real trained checkpoint --


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Transformer, dict[str, Any], Path]:
    folder = shared_data / "checkpoints"
    golden = folder / "stories260K-golden"
    greedy = json.loads((golden / "golden_greedy.json").read_text())
    return load(folder / "stories260K-hf"), greedy, golden / "golden_logits_first32.npz"


@pytest.mark.parametrize("case", range(6))
def test_stories260k_golden_tokens(
    stories: tuple[Transformer, dict[str, Any], Path], case: int
) -> None:
    """Teacher-forced argmax is every golden greedy token, through cache and without it."""
    model, golden, _ = stories
    assert len(golden["cases"]) == 6
    ids, given = golden["cases"][case]["token_ids"], golden["cases"][case]["prompt_ids"]
    assert ids[: len(given)] == given
    logits = uncached(model, ids)
    assert logits.argmax(-1)[len(given) - 1 : -1].tolist() == ids[len(given) :]
    cache = KVCache.allocate(model.config, 1, len(ids), torch.float32)
    cached = prefill(model, cache, 0, ids[:-8], 32)
    cached += [decode(model, cache, [token]) for token in ids[-8:]]
    torch.testing.assert_close(torch.cat(cached), logits, rtol=0, atol=1e-4)


def test_stories260k_golden_logits(stories: tuple[Transformer, dict[str, Any], Path]) -> None:
    numpy = pytest.importorskip("numpy", reason="the golden logits are a numpy file")
    model, _, path = stories
    golden = numpy.load(path)
    logits = uncached(model, golden["token_ids"].tolist())
    assert_equal_logits(logits, torch.from_numpy(golden["logits"]))
    assert model.config.num_parameters == 260_032
