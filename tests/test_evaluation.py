"""Perplexity and divergence against loops written out by hand, transformers' own logits, and models
whose probabilities are known.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_llm import write_byte_tokenizer, write_random_model
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor

from gptfast.cache import KVCache
from gptfast.checkpoint import read_config
from gptfast.evaluation import (
    Window,
    beginning_of,
    compare,
    continuation,
    documents,
    kl_divergence,
    measure_perplexity,
    reading,
    rolling,
    score,
    second_halves,
    strided,
    token_lengths,
)
from gptfast.llm import LLM
from gptfast.model import Transformer
from gptfast.parallel import ALONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return random_ids(150)


def random_ids(length: int, seed: int = 0, vocab_size: int = 96) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, [length], generator=generator).tolist()


class Bigram:
    """A model of which every probability is known: `table[a][b]` of b after a. Runs as a
    Transformer does, and knows only the token before.
    """

    def __init__(self, folder: Path, table: Sequence[Sequence[float]]) -> None:
        self.table = torch.tensor(table)
        tiny_llama(folder, vocab_size=len(table))
        self.config, _ = read_config(folder)
        self.dtype, self.device, self.group = torch.float32, torch.device("cpu"), ALONE

    def hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache, *_: Any) -> Tensor:
        return tokens.unsqueeze(-1)

    def own_logits(self, x: Tensor) -> Tensor:
        return self.table.log()[x.squeeze(-1)] + 3.0  # a softmax takes the constant away

    def gathered(self, logits: Tensor) -> Tensor:
        return logits


def as_model(bigram: Bigram) -> Transformer:
    return bigram  # type: ignore[return-value]


def nll_by_hand(llm: LLM, ids: Sequence[int], first: int) -> list[float]:
    """-log p of ids[first:], by teacher forcing without any of evaluation's code."""
    logprobs = llm.logits(ids).double().log_softmax(-1)
    return [-logprobs[place - 1, ids[place]].item() for place in range(first, len(ids))]


# --- how a text becomes windows ---


def test_strided_windows_by_hand() -> None:
    assert strided(range(9), 4, 2) == [
        Window(range(4), 1, 0),
        Window(range(2, 6), 2, 2),
        Window(range(4, 8), 2, 4),
        Window(range(6, 9), 2, 6),
    ]
    assert strided(range(5), 9, 3) == [Window(range(5), 1, 0)]


@given(st.integers(2, 40), st.integers(2, 12), st.data())
def test_strided_windows_score_everything_once(
    length: int, window: int, data: st.DataObject
) -> None:
    """Only where windows do not overlap the first of each has nothing before it."""
    stride = data.draw(st.integers(1, window))
    windows = strided(range(length), window, stride)
    scored = [token for each in windows for token in each.ids[each.first :]]
    heads = {each.start for each in windows} if stride == window else {0}
    assert scored == [place for place in range(length) if place not in heads]
    assert all(len(each.ids) <= window and each.ids[0] == each.start for each in windows)


def test_second_halves_by_hand() -> None:
    """llama.cpp: n_ctx = 5, first = 2, logits of places 2 and 3 are scored against 3 and 4; the
    text's end that fills no window is not read."""
    ids = list(range(10, 23))
    assert second_halves(ids, 5, bos=1) == [
        Window([1, 11, 12, 13, 14], 3, 0),
        Window([1, 16, 17, 18, 19], 3, 5),
    ]
    assert second_halves(ids[:10], 5, bos=1) == second_halves(ids, 5, bos=1)
    assert second_halves(ids, 6, bos=None) == [
        Window([10, 11, 12, 13, 14, 15], 4, 0),
        Window([16, 17, 18, 19, 20, 21], 4, 6),
    ]


def test_documents_are_cut_and_keep_their_places() -> None:
    windows = documents([[1, 2, 3], [4], [5, 6, 7, 8]], 3)
    assert windows == [Window([1, 2, 3], 1, 0), Window([4], 1, 3), Window([5, 6, 7], 1, 4)]


def test_continuation_loses_the_beginning_of_its_context() -> None:
    assert continuation([1, 2, 3], [4, 5], 8) == Window([1, 2, 3, 4, 5], 3)
    assert continuation([1, 2, 3], [4, 5], 3) == Window([2, 3, 4, 5], 2)
    assert continuation([1, 2, 3], [4, 5], 2) == Window([3, 4, 5], 1)
    for context, text in (([], [1]), ([1], []), ([1], [2, 3, 4])):
        with pytest.raises(ValueError, match="1 to 2"):
            continuation(context, text, 2)


def test_rolling_windows_by_hand() -> None:
    """The harness's: full windows after one token, the last one after as much as fits."""
    assert rolling(range(10), 99, 4) == [
        Window([99, 0, 1, 2, 3], 1, 0),
        Window([3, 4, 5, 6, 7], 1, 4),
        Window([5, 6, 7, 8, 9], 3, 6),
    ]
    assert rolling(range(3), 99, 4) == [Window([99, 0, 1, 2], 1, 0)]
    assert rolling([], 99, 4) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strided([1, 2], 1, 1), "window is 1"),
        (lambda: strided([1, 2], 4, 5), "stride is 5"),
        (lambda: strided([1, 2], 4, 0), "stride is 0"),
        (lambda: second_halves([1, 2], 2, None), "window is 2"),
        (lambda: second_halves([1, 2, 3], 4, None), "has 3 tokens.*window of 4"),
    ],
)
def test_windows_that_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- perplexity ---


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (48, 16), (17, 5), (64, 1)])
def test_strided_perplexity_by_hand(llm: LLM, ids: list[int], window: int, stride: int) -> None:
    scored, nlls = 0, []
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        nlls += nll_by_hand(llm, ids[start:end], max(1, scored - start))
        scored = end
        if end == len(ids):
            break
    result = measure_perplexity(llm.model, strided(ids, window, stride))
    mean = sum(nlls) / len(nlls)
    assert result.num_tokens == len(nlls)
    assert result.nats_per_token == pytest.approx(mean, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    variance = sum(nll**2 for nll in nlls) / len(nlls) - mean**2
    expected = math.sqrt(variance / (len(nlls) - 1))  # as llama.cpp has it
    assert result.standard_error == pytest.approx(expected, rel=1e-4)
    assert result.perplexity_error == pytest.approx(expected * math.exp(mean), rel=1e-4)


def test_strided_perplexity_as_transformers(folder: Path, llm: LLM, ids: list[int]) -> None:
    """The loop of Hugging Face's guide; each window's mean counts by the tokens it is of."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text, window, stride = torch.tensor([ids]), 40, 24
    total, num_tokens, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs, labels = text[:, begin:end], text[:, begin:end].clone()
        labels[:, : before - begin if before else 0] = -100
        num_scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(inputs, labels=labels).loss.item() * num_scored
        num_tokens, before = num_tokens + num_scored, end
        if end == len(ids):
            break
    result = measure_perplexity(llm.model, strided(ids, window, stride))
    assert result.num_tokens == num_tokens == len(ids) - 1
    assert result.nats_per_token == pytest.approx(total / num_tokens, abs=1e-5)


def test_perplexity_of_llama_cpp_with_known_probabilities(tmp_path: Path) -> None:
    """Tokens 0, 1, 2; after each the same token comes with 1/2 and the others with 1/4. BOS (2) in
    a window's first place has no part: of five tokens only the last two are scored."""
    model = as_model(Bigram(tmp_path, [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]))
    ids = [0, 1, 1, 1, 0, *(1, 1, 0, 0, 0), 2, 2]
    result = measure_perplexity(model, second_halves(ids, 5, bos=2))
    bits = [1, 2, 1, 1]  # 1 after 1, 0 after 1; 0 after 0, twice
    assert result.num_tokens == 4
    assert result.nats_per_token == pytest.approx(math.log(2) * sum(bits) / 4)
    mean_of_squares, mean = math.log(2) ** 2 * 7 / 4, math.log(2) * 5 / 4
    assert result.standard_error == pytest.approx(math.sqrt((mean_of_squares - mean**2) / 3))


def test_only_the_token_before_a_window_half_is_replaced_by_bos(llm: LLM, ids: list[int]) -> None:
    """llama.cpp's windows through a real model, whose scores depend on BOS in the first place."""
    window, bos = 32, 1
    nlls = [
        nll
        for start in range(0, len(ids) - window + 1, window)
        for nll in nll_by_hand(llm, [bos, *ids[start + 1 : start + window]], window // 2 + 1)
    ]
    result = measure_perplexity(llm.model, second_halves(ids, window, bos))
    assert result.num_tokens == len(nlls) == 4 * 15
    assert result.nats_per_token == pytest.approx(sum(nlls) / len(nlls), abs=1e-5)
    without = measure_perplexity(llm.model, second_halves(ids, window, None))
    assert without.nats_per_token != pytest.approx(result.nats_per_token, abs=1e-4)


# --- rows, pieces and parts ---


def mixed(num_windows: int = 7) -> list[Window]:
    """Windows of many lengths, scored from different places on."""
    lengths = [2 + 9 * (number * 5 % 7) for number in range(num_windows)]
    return [Window(random_ids(n, seed), max(1, n // 3)) for seed, n in enumerate(lengths)]


FAMILIES = {
    "llama": lambda folder: tiny_llama(folder),
    "learned positions": lambda folder: tiny_gpt2(folder),
    "rotation that depends on the length": lambda folder: tiny_llama(
        folder,
        max_position_embeddings=20,  # of 80 once stretched
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_together_are_rows_alone(tmp_path: Path, family: str) -> None:
    """In the order in which they were given, whatever the order in which they ran."""
    llm = LLM(FAMILIES[family](tmp_path), device="cpu", dtype="fp32")
    windows = mixed()
    alone = [llm.score(window.ids)[window.first - 1 :] for window in windows]
    for batch_size in (1, 3, 7, 100):
        scores = score(llm.model, windows, batch_size)
        for window, found, expected in zip(windows, scores, alone, strict=True):
            torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=0)
            top = llm.logits(window.ids).argmax(-1)[window.first - 1 : -1]
            assert (
                found.is_top.tolist() == (top == torch.tensor(window.ids[window.first :])).tolist()
            )


@pytest.mark.parametrize(("piece", "num_bytes"), [(16, 1 << 26), (7, 1 << 26), (512, 96 * 4 * 5)])
def test_pieces_are_the_whole(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, piece: int, num_bytes: int
) -> None:
    """Prompts in pieces and logits in parts change no score; logits stay within their budget."""
    whole, sizes = score(llm.model, mixed()), []
    monkeypatch.setattr(reading, "LARGEST_PIECE", piece)
    monkeypatch.setattr(reading, "LOGITS_BYTES", num_bytes)
    logits = llm.model.own_logits

    def spy(x: Tensor) -> Tensor:
        sizes.append(x.size(1))
        return logits(x)

    monkeypatch.setattr(llm.model, "own_logits", spy)
    for found, expected in zip(score(llm.model, mixed()), whole, strict=True):
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert max(sizes) * 96 * 4 <= num_bytes
    assert sum(sizes) == sum(window.num_scored for window in mixed())  # and none that nobody needs


def test_padding_sits_at_the_spare_slot() -> None:
    """Where nobody reads it, and experts do no work for it."""
    rows = reading._Rows([Window([5, 6, 7, 8], 2), Window([9, 4], 1)])
    assert rows.tokens.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2], [0, 3, 3]]
    assert rows.predicts.tolist() == [[False, True, True], [True, False, False]]


def test_the_cache_says_how_far_it_is_filled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices that cannot look at positions read: up to the piece's end, not all slots."""
    hidden, bounds = llm.model.hidden, []

    def spy(tokens: Tensor, positions: Tensor, cache: KVCache, *rest: Any) -> Tensor:
        bounds.append(int(cache.bound))
        assert cache.lengths.tolist() == [60]
        return hidden(tokens, positions, cache, *rest)

    monkeypatch.setattr(reading, "LARGEST_PIECE", 25)
    monkeypatch.setattr(llm.model, "hidden", spy)
    score(llm.model, [Window(random_ids(60), 1)])
    assert bounds == [25, 50, 59]


def test_no_batch_has_more_rows_than_asked(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has a cache of its own rows and of its longest window's inputs."""
    allocate, shapes = KVCache.allocate, []

    def spy(config: Any, num_rows: int, max_seq_len: int, *rest: Any) -> KVCache:
        shapes.append((num_rows, max_seq_len))
        return allocate(config, num_rows, max_seq_len, *rest)

    monkeypatch.setattr(KVCache, "allocate", spy)
    score(llm.model, mixed(), batch_size=3)
    assert shapes == [(3, 55), (3, 28), (1, 1)]


def test_what_the_cache_rounds_counts(llm: LLM, ids: list[int]) -> None:
    exact = measure_perplexity(llm.model, strided(ids, 64, 32))
    rounded = measure_perplexity(llm.model, strided(ids, 64, 32), kv_cache_dtype="int8")
    difference = rounded.nats_per_token - exact.nats_per_token
    assert 0 < abs(difference) < 0.05


def test_progress_sees_the_batches(llm: LLM) -> None:
    seen: list[int] = []

    def progress(batches: Any) -> Any:
        seen.append(len(batches))
        return batches

    score(llm.model, mixed(7), 3, progress=progress)
    assert seen == [3]


def test_windows_with_nothing_to_score(llm: LLM) -> None:
    scores = score(llm.model, [Window([5], 1), Window([5, 6, 7], 2), Window([5, 6], 2)])
    assert [len(each.logprobs) for each in scores] == [0, 1, 0]
    assert score(llm.model, []) == []


# --- comparison ---


def test_a_model_beside_itself(llm: LLM, ids: list[int]) -> None:
    result = compare(llm.model, llm.model, strided(ids, 48, 24))
    divergences = result.kl_mean, result.kl_median, result.kl_p99, result.kl_max
    assert divergences == (0, 0, 0, 0) and result.top1_agreement == 1
    assert result.nll_difference == 0 and result.model == result.reference
    assert result.model == measure_perplexity(llm.model, strided(ids, 48, 24))


def test_distance_by_hand(folder: Path, llm: LLM, ids: list[int]) -> None:
    """A model in bfloat16 beside itself in float32, every figure from both models' logits."""
    short = ids[:60]
    narrow = LLM(folder, device="cpu", dtype="bf16")
    p, q = (each.logits(short)[:-1].double().log_softmax(-1) for each in (llm, narrow))
    divergences = sorted((p.exp() * (p - q)).sum(-1).tolist())
    pays = [-table[torch.arange(59), torch.tensor(short[1:])] for table in (q, p)]
    result = compare(narrow.model, llm.model, strided(short, 64, 32))
    close = partial(
        pytest.approx, rel=2e-2, abs=1e-6
    )  # parts of another size round otherwise in bfloat16
    assert result.kl_mean == close(sum(divergences) / 59)
    assert result.kl_median == close(divergences[29])
    assert result.kl_p99 == result.kl_max == close(divergences[-1])
    assert result.top1_agreement == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )
    difference = pays[0] - pays[1]
    assert result.nll_difference == pytest.approx(difference.mean().item(), abs=1e-3)
    assert result.nll_difference_error == pytest.approx(
        difference.std().item() / math.sqrt(59), rel=5e-2
    )
    assert result.model.nats_per_token == pytest.approx(pays[0].mean().item(), abs=1e-3)
    assert result.reference.nats_per_token == pytest.approx(pays[1].mean().item(), abs=1e-5)


def test_divergence_of_known_probabilities(tmp_path: Path) -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log(2/sqrt(3)), and KL((1, 0) || (1/2, 1/2)) = log 2: what the
    reference excludes counts nothing. Of 200 tokens two follow token 1: the 99th percentile by
    nearest rank is the 198th, so still the smaller."""
    reference = as_model(Bigram(tmp_path / "reference", [[0.5, 0.5], [1.0, 0.0]]))
    model = as_model(Bigram(tmp_path / "model", [[0.25, 0.75], [0.5, 0.5]]))
    small, large = math.log(2 / math.sqrt(3)), math.log(2)
    for num_large, p99 in ((2, small), (3, large)):
        pairs = [[1, 0]] * num_large + [[0, 0]] * (200 - num_large)
        result = compare(model, reference, [Window(pair, 1) for pair in pairs])
        assert result.kl_p99 == pytest.approx(p99, rel=1e-6)
        assert result.kl_median == pytest.approx(small, rel=1e-6)
        assert result.kl_max == pytest.approx(large, rel=1e-6)
        mean = (num_large * large + (200 - num_large) * small) / 200
        assert result.kl_mean == pytest.approx(mean, rel=1e-6)
        # After 0 the reference holds both likely (the lower id leads), the model does not.
        assert result.top1_agreement == pytest.approx(num_large / 200)
        paid = num_large * math.log(2) + (200 - num_large) * math.log(2)
        assert result.nll_difference == pytest.approx(paid / 200, rel=1e-6)


def test_divergence_has_a_direction_and_no_sign() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]]).log()
    q = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4]]).log()
    expected = [0.7 * math.log(7) + 0.1 * math.log(1 / 7), math.log(2), 0.0]
    assert kl_divergence(p, q).tolist() == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(q, p)[1].item() == math.inf
    noise = torch.randn(500, 64).log_softmax(-1)
    assert (kl_divergence(noise, noise + 1e-7 * torch.randn(500, 64)) >= 0).all()


# --- bytes ---


def test_bits_per_byte_of_a_byte_tokenizer(tmp_path: Path) -> None:
    """Every token is a byte, so bits per byte are bits per token; BOS is no byte and not scored."""
    write_byte_tokenizer(write_random_model(tmp_path))
    llm = LLM(tmp_path, device="cpu", dtype="fp32")
    assert llm.tokenizer is not None
    text = " naïve 🦙!\n"
    ids = llm.encode(text)
    lengths = token_lengths(llm.tokenizer, ids)
    assert lengths == [0] + [1] * len(text.encode())
    assert beginning_of(llm.tokenizer) == ids[0]
    whole = measure_perplexity(llm.model, strided(ids, 64, 32), lengths)
    assert whole.num_bytes == whole.num_tokens == len(text.encode())
    assert whole.bits_per_byte == pytest.approx(whole.nats_per_token / math.log(2))
    assert measure_perplexity(llm.model, strided(ids, 64, 32)).bits_per_byte is None


def test_bytes_are_those_of_scored_tokens_only(llm: LLM, ids: list[int]) -> None:
    """Each place has a weight of its own: 2 ** place, so a sum says which places are in it."""
    short, lengths = ids[:12], [2**place for place in range(12)]
    halves = measure_perplexity(llm.model, second_halves(short, 5, bos=1), lengths)
    assert halves.num_bytes == sum(2**place for place in (3, 4, 8, 9))
    moved = measure_perplexity(llm.model, strided(short, 5, 3), lengths)
    assert moved.num_bytes == sum(2**place for place in range(1, 12))
    texts = [short[:4], short[4:6], short[6:]]
    alone = measure_perplexity(llm.model, documents(texts, 3), lengths)
    assert alone.num_bytes == sum(2**place for place in (1, 2, 5, 7, 8))


TEXTS = [
    "Once upon a time",
    "  two spaces",
    " ",
    "naïve 🦙 日本\n\n\ttabs",
    "a",
    "x" * 50 + " . , !",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["llama2", "llama3", "gpt2", "qwen2", "gpt-neox-20b"])
def test_token_lengths_add_up_to_the_text(shared_data: Path, name: str, text: str) -> None:
    """Sentencepiece's space before a text is no byte of it; a space that was written is."""
    from gptfast.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    assert sum(token_lengths(tokenizer, ids)) == len(text.encode())


# --- errors ---


def test_too_little_text(llm: LLM) -> None:
    for ids, num_scored in (([], 0), ([3], 0), ([3, 4], 1)):
        with pytest.raises(ValueError, match=f"{len(ids)} tokens, of which {num_scored} .* 2 are"):
            measure_perplexity(llm.model, strided(ids, 8, 4))


def test_windows_beyond_the_context(llm: LLM, ids: list[int]) -> None:
    """A window of 64 fits a context of 64. One more may be scored, as it is not read, but is no
    window of a perplexity."""
    assert measure_perplexity(llm.model, strided(ids, 64, 64)).num_tokens == 147
    with pytest.raises(ValueError, match="65 tokens and the model's context holds 64"):
        measure_perplexity(llm.model, strided(ids, 65, 32))
    assert len(score(llm.model, [Window(ids[:65], 1)])[0].logprobs) == 64
    with pytest.raises(ValueError, match="reads 65 tokens and the model's context holds 64"):
        score(llm.model, [Window(ids[:66], 1)])


def test_other_vocabularies(tmp_path: Path, llm: LLM, ids: list[int]) -> None:
    other = LLM(tiny_llama(tmp_path, vocab_size=100), device="cpu", dtype="fp32")
    with pytest.raises(ValueError, match="96 tokens and the reference one of 100"):
        compare(llm.model, other.model, strided(ids, 8, 4))


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    broken = LLM(tiny_llama(tmp_path), device="cpu", dtype="fp32").model
    broken.head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="9 of 9 tokens have no finite score"):
        measure_perplexity(broken, strided(range(10), 10, 10))


@pytest.mark.parametrize(
    ("window", "batch_size", "words"),
    [
        (Window([1, 96], 1), 1, "0 to 95"),
        (Window([-1, 9], 1), 1, "0 to 95"),
        (Window([1, 2], 0), 1, "nothing before it"),
        (Window([1, 2], 1), 0, "batch size is 0"),
    ],
)
def test_what_cannot_be_scored(llm: LLM, window: Window, batch_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        score(llm.model, [window], batch_size)


def test_a_cache_that_does_not_fit(llm: LLM, ids: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr("gptfast.capacity.free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="a cache of 4 x 63 tokens needs"):
        score(llm.model, strided(ids, 64, 32), batch_size=8)


# --- a trained model ---


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> LLM:
    folder = shared_data / "checkpoints" / "stories260K-hf"
    return LLM(folder, device="cpu", dtype="fp32")


def test_strided_perplexity_of_a_story(stories: LLM, shared_data: Path) -> None:
    """A real text, long enough for three windows, scored token by token from the definition."""
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    assert stories.tokenizer is not None
    ids = stories.encode(text)[:420]
    nlls = []
    for place in range(1, 420):  # windows of 200 begin every 100: which is the first to show it?
        start = 0 if place < 200 else 100 * ((place - 200) // 100 + 1)
        nlls.append(-stories.score(ids[start : place + 1])[-1].item())
    lengths = token_lengths(stories.tokenizer, ids)
    result = measure_perplexity(stories.model, strided(ids, 200, 100), lengths)
    assert result.nats_per_token == pytest.approx(sum(nlls) / 419, abs=1e-4)
    num_bytes = len(stories.tokenizer.decode(ids).encode())
    assert result.bits_per_byte == pytest.approx(sum(nlls) / num_bytes / math.log(2), abs=1e-4)


@pytest.mark.slow
def test_golden_perplexity(stories: LLM, shared_data: Path) -> None:
    """BOS and the first 511 tokens of each story: 1.50566 nats over 127,850 tokens."""
    text = (shared_data / "text" / "tinystories.txt").read_text()
    parts = [part.strip() for part in text.split("<|endoftext|>")]
    texts = [stories.encode(part) for part in parts if part]
    result = measure_perplexity(stories.model, documents(texts, 512))
    assert result.num_tokens == 127850
    assert result.nats_per_token == pytest.approx(1.50566, abs=2e-5)
