"""The engine against the uncached model: every request as it would run alone, whatever runs beside
it, before it or after it in its row.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor

from gptfast.cached import LARGEST_PIECE, PREFILL_SHAPES
from gptfast.engine import Engine
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.requests import Event, TokenLogprob
from gptfast.sampling import SamplingParams
from gptfast.stats import RequestStats

VOCAB = 96
CONTEXT = 2048
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=8)
# Both sides of a padded shape, of one piece and of two.
LENGTHS = (1, 2, 16, 17, 511, 512, 513, 700, 1100)


def lively_llama(folder: Path, context: int = CONTEXT, **facts: Any) -> Transformer:
    """Louder embeddings: the bare random model soon repeats one token, which would hide errors."""
    model = load(tiny_llama(folder, max_position_embeddings=context, **facts))
    model.embed.weight.mul_(3)
    return model


def lively_gpt2(folder: Path, context: int = CONTEXT) -> Transformer:
    model = load(tiny_gpt2(folder, n_positions=context, tie_word_embeddings=False))
    model.embed.weight.mul_(5)
    assert model.positions is not None
    model.positions.weight.mul_(10)
    return model


@pytest.fixture(scope="module", params=[lively_llama, lively_gpt2])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return request.param(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return lively_llama(tmp_path_factory.mktemp("llama"))


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


Change = Callable[[Tensor, list[int], list[int]], Tensor]


def uncached(
    model: Transformer, prompt: Sequence[int], num_new: int, change: Change | None = None
) -> list[int]:
    """Step by step, the whole text through the plain model each time, the largest logit taken.

    `change` (logits [V], prompt, output so far) -> logits [V] stands for bias and penalties.
    """
    prompt, output = list(prompt), []
    for _ in range(num_new):
        logits = plain_logits(model, prompt + output)[-1]
        output.append(most_likely(change(logits, prompt, output) if change else logits))
    return output


def plain_logits(model: Transformer, ids: list[int]) -> Tensor:
    """[T, V] without a cache."""
    return model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]


def most_likely(scores: Tensor) -> int:
    first, second = scores.topk(2).values.tolist()
    assert first - second > 1e-4, "rounding could decide here: choose another prompt"
    return int(scores.argmax())


def assert_greedy(model: Transformer, prompt: list[int], token_ids: list[int]) -> None:
    """What `uncached` would give, in one pass: if each token is the most likely one after all
    before it, then so it is step by step.
    """
    logits = plain_logits(model, prompt + token_ids[:-1])[len(prompt) - 1 :]
    assert token_ids == [most_likely(row) for row in logits]


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    stats: RequestStats | None = None

    def add(self, event: Event) -> None:
        assert self.reason is None, "an event after the last one"
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.reason, self.stats = event.finish_reason, event.stats


def finish(engine: Engine, results: dict[int, Result] | None = None) -> dict[int, Result]:
    """Runs what is queued to its end."""
    results = {} if results is None else results
    steps = 0
    while engine.has_work:
        take(engine, results)
        steps += 1
        assert steps < 10_000, "the engine does not come to an end"
    return results


def take(engine: Engine, results: dict[int, Result]) -> None:
    for event in engine.step():
        results.setdefault(event.request_id, Result()).add(event)


Work = tuple[list[int], SamplingParams]


def run(engine: Engine, *work: Work) -> list[Result]:
    ids = [engine.submit(prompt, params) for prompt, params in work]
    results = finish(engine)
    return [results[request_id] for request_id in ids]


def tokens_alone(model: Transformer, prompt: list[int], params: SamplingParams) -> list[int]:
    [result] = run(Engine(model, 1), (prompt, params))
    return result.token_ids


# --- greedy: the uncached model is the oracle ---


@pytest.mark.parametrize("lag", [0, 1])
def test_a_batch_of_prompts_equals_the_uncached_model(model: Transformer, lag: int) -> None:
    """More prompts than rows, lengths at the borders of shapes and pieces, rows that end at
    different times and are filled again. With a lag of 1 the host reads one step behind, as it
    does on CUDA.
    """
    engine = Engine(model, 3)
    engine._lag = lag
    work = [
        (random_prompt(length), replace(GREEDY, max_new_tokens=1 + 5 * number % 9))
        for number, length in enumerate(LENGTHS)
    ]
    for result, (prompt, params) in zip(run(engine, *work), work, strict=True):
        assert len(result.token_ids) == params.max_new_tokens and result.reason == "length"
        assert_greedy(model, prompt, result.token_ids)
    assert not engine.has_work


def test_one_row_equals_the_uncached_model(model: Transformer) -> None:
    engine = Engine(model, 1)
    for length in LENGTHS:
        prompt = random_prompt(length, seed=1)
        [result] = run(engine, (prompt, GREEDY))
        assert len(result.token_ids) == 8
        assert_greedy(model, prompt, result.token_ids)


def test_pieces_and_shapes_are_what_the_tests_cross() -> None:
    assert LARGEST_PIECE == 512 and PREFILL_SHAPES[0] == 16


def test_nothing_but_used_slots_is_written(llama: Transformer) -> None:
    """Padding and idle rows write to the spare slot: every slot that no token owns stays zero."""
    engine = Engine(llama, 3, max_seq_len=64)
    run(engine, (random_prompt(5), GREEDY), (random_prompt(17), GREEDY))
    for layer in engine.runner.cache.layers:
        for slots in (layer.keys, layer.values):
            used = slots[:, :, :64].abs().sum((1, 3)) > 0  # [B, S]
            # The last token is never run through the model.
            assert used.sum(1).tolist() == [5 + 7, 17 + 7, 0]
            assert used[0, :12].all() and used[1, :24].all()


def test_max_new_tokens_none_runs_to_the_end_of_the_context(llama: Transformer) -> None:
    prompt = random_prompt(5)
    [result] = run(Engine(llama, max_seq_len=21), (prompt, replace(GREEDY, max_new_tokens=None)))
    assert result.token_ids == uncached(llama, prompt, 16)
    assert result.reason == "length"


# --- sampling, alone and together ---

MIXED = [
    SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True),
    SamplingParams(seed=1, max_new_tokens=20, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.7, top_k=5, max_new_tokens=11, ignore_eos=True),
    SamplingParams(
        seed=1, temperature=3, top_p=0.9, min_p=0.01, max_new_tokens=20, ignore_eos=True
    ),
    SamplingParams(
        seed=3,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=0.5,
        max_new_tokens=40,
        ignore_eos=True,
    ),
    SamplingParams(temperature=0, frequency_penalty=2, max_new_tokens=30, ignore_eos=True),
    SamplingParams(seed=4, logit_bias={5: 8.0, 6: -100}, max_new_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True),
]


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_rows_each_run_as_alone(llama: Transformer, order: int) -> None:
    """Greedy and sampled, plain and penalised: the same tokens alone, together, in another row."""
    work = [(random_prompt(3 + 40 * number), params) for number, params in enumerate(MIXED)]
    alone = [tokens_alone(llama, *one) for one in work]
    together = run(Engine(llama, 3), *work[::order])[::order]
    assert [result.token_ids for result in together] == alone


def test_a_seed_decides_and_only_a_seed(llama: Transformer) -> None:
    prompt = random_prompt(4)
    params = SamplingParams(temperature=5, seed=7, max_new_tokens=30, ignore_eos=True)
    engine = Engine(llama, 2)
    same, again, other, free, free2 = run(
        engine,
        *((prompt, replace(params, seed=seed)) for seed in (7, 7, 8, None, None)),
    )
    assert same.token_ids == again.token_ids
    sampled = [same.token_ids, other.token_ids, free.token_ids, free2.token_ids]
    assert all(a != b for a, b in itertools.combinations(sampled, 2))


def test_random_bits_belong_to_the_place_of_a_token(llama: Transformer) -> None:
    """No two places share them, and a text continues in the same way wherever it is cut."""
    params = SamplingParams(temperature=100, seed=5, max_new_tokens=40, ignore_eos=True)
    prompt, engine = random_prompt(4), Engine(llama)
    tokens = run(engine, (prompt, params))[0].token_ids
    # Nearly every token is equally likely: neighbours that are equal had equal bits.
    assert sum(a == b for a, b in itertools.pairwise(tokens)) < 4
    for cut in (1, 2, 17):
        rest = replace(params, max_new_tokens=40 - cut)
        [result] = run(engine, (prompt + tokens[:cut], rest))
        assert result.token_ids == tokens[cut:]


def penalised(params: SamplingParams) -> Change:
    """The definitions, token by token."""

    def change(logits: Tensor, prompt: list[int], output: list[int]) -> Tensor:
        scores = logits.tolist()
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        for token in {*prompt, *output}:
            factor = params.repetition_penalty
            scores[token] *= 1 / factor if scores[token] > 0 else factor
        for token in set(output):
            scores[token] -= params.presence_penalty
            scores[token] -= params.frequency_penalty * output.count(token)
        return torch.tensor(scores)

    return change


@pytest.mark.parametrize(
    "changed",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.75},
        {"logit_bias": {11: 3.0, 12: -5.0}},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "logit_bias": {20: 1.5}},
    ],
)
def test_bias_and_penalties_change_the_right_tokens(
    llama: Transformer, changed: dict[str, Any]
) -> None:
    """In a row that served another request before, beside a row that wants nothing of it."""
    params = replace(GREEDY, max_new_tokens=24, **changed)
    plain, prompt = replace(GREEDY, max_new_tokens=24), random_prompt(6, seed=3)
    engine = Engine(llama, 2)
    run(engine, *[(random_prompt(9), replace(params, presence_penalty=2))] * 2)
    result, beside = run(engine, (prompt, params), (prompt, plain))
    assert result.token_ids == uncached(llama, prompt, 24, penalised(params))
    assert beside.token_ids == uncached(llama, prompt, 24) != result.token_ids
    assert engine.runner.sampling.plan() == "greedy", "idle rows make greedy ones pay"


def test_a_bias_of_100_leaves_one_token(llama: Transformer) -> None:
    params = SamplingParams(logit_bias={40: 100}, max_new_tokens=10, seed=0)
    assert tokens_alone(llama, [3, 4], params) == [40] * 10


# --- log probabilities ---


def test_logprobs_are_those_of_the_unchanged_model(llama: Transformer, tmp_path: Path) -> None:
    """Different numbers of alternatives in one batch, also where sampling is bent."""
    work = [
        (random_prompt(5), replace(GREEDY, logprobs=3)),
        (random_prompt(20), replace(GREEDY, logprobs=0)),
        (random_prompt(7), replace(GREEDY, logprobs=None)),
        (random_prompt(600), SamplingParams(seed=0, logprobs=20, max_new_tokens=8, temperature=2)),
        (random_prompt(9), replace(GREEDY, logprobs=1, logit_bias={9: 50.0})),
    ]
    few = load(tiny_llama(tmp_path, vocab_size=12))
    [result] = run(Engine(few), ([3], replace(GREEDY, logprobs=20)))
    assert all(len(entry.top) == 12 for entry in result.logprobs), "more asked than there are"
    for result, (prompt, params) in zip(run(Engine(llama, 3), *work), work, strict=True):
        if params.logprobs is None:
            assert result.logprobs == []
            continue
        expected = plain_logits(llama, prompt + result.token_ids).log_softmax(-1)
        assert [entry.token_id for entry in result.logprobs] == result.token_ids
        for place, entry in enumerate(result.logprobs, start=len(prompt) - 1):
            assert entry.logprob == pytest.approx(expected[place, entry.token_id].item(), abs=1e-4)
            best = expected[place].topk(params.logprobs)
            assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
            assert list(entry.top) == best.indices.tolist()


# --- ends ---


def with_eos(model: Transformer, *eos_token_ids: int) -> Transformer:
    """The same weights, other facts."""
    model = copy.copy(model)
    model.config = replace(model.config, eos_token_ids=eos_token_ids)
    return model


@pytest.mark.parametrize("lag", [0, 1])
def test_several_eos_ids_and_stop_token_ids_end_a_request(llama: Transformer, lag: int) -> None:
    prompts = [random_prompt(6, seed) for seed in range(6)]
    free = [uncached(llama, prompt, 20) for prompt in prompts]
    eos, stop = {free[0][4], free[1][9]}, {free[2][2]}
    engine = Engine(with_eos(llama, *eos), 2)
    engine._lag = lag
    params = replace(GREEDY, max_new_tokens=20, ignore_eos=False)

    def until(ends: set[int], tokens: list[int]) -> tuple[list[int], str]:
        """The token that ends belongs to the output."""
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        return (tokens, "length") if end is None else (tokens[: end + 1], "stop")

    for change, ends in (
        ({}, eos),
        ({"stop_token_ids": tuple(stop)}, eos | stop),
        ({"ignore_eos": True}, set()),
        ({"ignore_eos": True, "stop_token_ids": tuple(stop)}, stop),
    ):
        results = run(engine, *((prompt, replace(params, **change)) for prompt in prompts))
        found = [(result.token_ids, result.reason) for result in results]
        assert found == [until(ends, tokens) for tokens in free]
        assert change.get("ignore_eos") or any(reason == "stop" for _, reason in found)


def test_an_end_at_the_first_and_at_the_last_token(llama: Transformer) -> None:
    prompt = random_prompt(8)
    first, *_, last = tokens = uncached(llama, prompt, 5)
    params = replace(GREEDY, max_new_tokens=5)
    [result] = run(Engine(llama), (prompt, replace(params, stop_token_ids=[first])))
    assert (result.token_ids, result.reason) == ([first], "stop")
    assert last not in tokens[:-1]
    [result] = run(Engine(llama), (prompt, replace(params, stop_token_ids=[last])))
    assert (result.token_ids, result.reason) == (tokens, "stop")


@pytest.mark.parametrize("lag", [0, 1])
def test_the_end_of_the_context_is_a_length_not_a_crash(model: Transformer, lag: int) -> None:
    """Rows that are full beside rows that go on; a prompt that leaves no room gives no token."""
    engine = Engine(model, 2, max_seq_len=40)
    engine._lag = lag
    lengths = (40, 39, 30, 1, 40)
    work = [(random_prompt(n), replace(GREEDY, max_new_tokens=100)) for n in lengths]
    for length, result, (prompt, _) in zip(lengths, run(engine, *work), work, strict=True):
        assert result.token_ids == uncached(model, prompt, 40 - length)
        assert len(prompt) + len(result.token_ids) == 40 and result.reason == "length"


def test_the_whole_context_of_the_model_can_be_used(tmp_path: Path) -> None:
    """Learned positions end where the context ends: the spare slot lies beyond their table."""
    for make in (lively_llama, lively_gpt2):
        model = make(tmp_path / make.__name__, context=64)
        engine = Engine(model, 2)
        assert engine.max_seq_len == model.config.max_seq_len == 64
        prompt, short = random_prompt(50), random_prompt(3)
        full, beside = run(engine, (prompt, replace(GREEDY, max_new_tokens=None)), (short, GREEDY))
        assert full.token_ids == uncached(model, prompt, 14)
        assert beside.token_ids == uncached(model, short, 8)


# --- cancel ---


@pytest.mark.parametrize("lag", [0, 1])
def test_cancel_in_the_queue_in_a_prompt_and_while_decoding(llama: Transformer, lag: int) -> None:
    """Others do not notice, and the rows serve those that wait."""
    engine = Engine(llama, 2)
    engine._lag = lag
    kept = [(random_prompt(length, seed=5), GREEDY) for length in (30, 600, 4)]
    long = replace(GREEDY, max_new_tokens=500)
    decoding = engine.submit(random_prompt(20), long)
    first = engine.submit(*kept[0])
    reading = engine.submit(random_prompt(1500), long)
    second = engine.submit(*kept[1])
    waiting = engine.submit(random_prompt(10), long)
    third = engine.submit(*kept[2])
    results: dict[int, Result] = {}

    def cancel(request_id: int) -> Event:
        event = engine.cancel(request_id)
        assert event is not None and event.finish_reason == "cancelled" and event.token_ids == ()
        assert engine.cancel(request_id) is None, "cancelled twice"
        return event

    cancel(waiting)
    while first not in results or results[first].reason is None:
        take(engine, results)
    take(engine, results)  # the first piece of the 1500 tokens
    request = next(r for r in engine._rows if r is not None and r.id == reading)
    assert 0 < request.num_prefilled < 1500
    cancel(reading)
    for _ in range(3):
        take(engine, results)
    assert len(results[decoding].token_ids) >= 3 and results[decoding].reason is None
    cancel(decoding)
    so_far = list(results[decoding].token_ids)
    finish(engine, results)
    assert results[decoding].token_ids == so_far, "tokens after the cancellation"
    for request_id, (prompt, _) in zip((first, second, third), kept, strict=True):
        assert len(results[request_id].token_ids) == 8
        assert_greedy(llama, prompt, results[request_id].token_ids)
    assert waiting not in results and reading not in results
    assert engine.cancel(12345) is None
    assert not engine.has_work


def test_an_engine_whose_only_request_is_cancelled_is_idle(llama: Transformer) -> None:
    """On CUDA a token is still on its way then; that must not keep `all_logits` from running."""
    engine = Engine(llama)
    engine._lag = 1
    request_id = engine.submit(random_prompt(5), GREEDY)
    engine.step()
    engine.cancel(request_id)
    assert not engine.has_work
    assert sum(len(piece) for piece in engine.all_logits([1, 2, 3])) == 3
    [result] = run(engine, (random_prompt(5), GREEDY))
    assert result.token_ids == uncached(llama, random_prompt(5), 8)


# --- reuse of what a row holds ---


def test_a_prompt_that_continues_an_earlier_one_reads_only_what_is_new(model: Transformer) -> None:
    engine = Engine(model, 1)
    first = random_prompt(600)
    [answer] = run(engine, (first, GREEDY))
    assert answer.stats is not None and answer.stats.num_cached_tokens == 0
    # The newest token was never run, so its slot is empty: it is read with what follows.
    held = first + answer.token_ids[:-1]
    for tail in (random_prompt(5), random_prompt(513)):
        second = first + answer.token_ids + tail
        [result] = run(engine, (second, GREEDY))
        assert result.stats is not None and result.stats.num_cached_tokens == len(held)
        assert_greedy(model, second, result.token_ids)
        held = first + answer.token_ids  # the second time the answer's last token is there too


@pytest.mark.parametrize("shared", [0, 1, 15, 16, 300, 599, 600])
def test_a_prompt_that_parts_from_an_earlier_one(llama: Transformer, shared: int) -> None:
    """Also an equal prompt: its last token is run again, for its logits."""
    engine = Engine(llama, 1)
    first = random_prompt(600)
    run(engine, (first, GREEDY))
    second = first[:shared] + [1 + token % 94 for token in first[shared : shared + 20]]
    [result] = run(engine, (second, GREEDY))
    assert result.stats is not None
    assert result.stats.num_cached_tokens == min(shared, len(second) - 1)
    assert_greedy(llama, second, result.token_ids)


def test_the_row_that_shares_most_is_taken(llama: Transformer) -> None:
    """A conversation keeps its row, while a stranger takes the row that remembers least."""
    engine = Engine(llama, 3)
    talks = [random_prompt(length) for length in (30, 40)]
    run(engine, *((talk, GREEDY) for talk in talks))
    stranger, second, first = run(
        engine,
        (random_prompt(50), GREEDY),
        (talks[1] + random_prompt(3), GREEDY),
        (talks[0] + random_prompt(3), GREEDY),
    )
    cached = [r.stats.num_cached_tokens for r in (stranger, second, first) if r.stats]
    assert cached == [0, 40, 30]
    assert first.token_ids == uncached(llama, talks[0] + random_prompt(3), 8)


def test_a_cancelled_prompt_leaves_what_was_read_of_it(llama: Transformer) -> None:
    engine = Engine(llama, 1)
    prompt = random_prompt(1100)
    request_id = engine.submit(prompt, GREEDY)
    engine.step()
    engine.cancel(request_id)
    [result] = run(engine, (prompt, GREEDY))
    assert result.stats is not None and result.stats.num_cached_tokens == LARGEST_PIECE
    assert_greedy(llama, prompt, result.token_ids)


def test_a_row_forgets_what_was_overwritten_and_what_it_is_told_to(llama: Transformer) -> None:
    engine = Engine(llama, 1)
    first, other = random_prompt(40), random_prompt(30)
    results = [run(engine, (prompt, GREEDY))[0] for prompt in (first, other, first)]
    engine.forget()
    results += run(engine, (first, GREEDY))
    assert [result.stats.num_cached_tokens for result in results if result.stats] == [0] * 4
    assert results[0].token_ids == results[2].token_ids == results[3].token_ids


def test_teacher_forcing_leaves_no_prefix_behind(llama: Transformer) -> None:
    engine = Engine(llama, 2)
    prompt = random_prompt(40)
    run(engine, (prompt, GREEDY))
    list(engine.all_logits(random_prompt(600, seed=8)))
    [result] = run(engine, (prompt, GREEDY))
    assert result.token_ids == uncached(llama, prompt, 8)


def test_dynamic_rope_reads_a_prompt_as_a_fresh_engine_does(tmp_path: Path) -> None:
    """Keys cached with a short text were turned by other angles than a long one asks for."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    model = lively_llama(tmp_path, context=32, rope_scaling=scaling)
    engine = Engine(model, 1)
    assert engine.max_seq_len == 128
    params = replace(GREEDY, logprobs=0)
    run(engine, (random_prompt(20), params))
    prompt = random_prompt(20) + random_prompt(40)
    [result], [fresh] = run(engine, (prompt, params)), run(Engine(model), (prompt, params))
    assert result.token_ids == fresh.token_ids
    chosen = [[entry.logprob for entry in one.logprobs] for one in (result, fresh)]
    assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)


# --- what cannot run ---


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([1, VOCAB], {}, f"token id {VOCAB} is outside the vocabulary \\(0 to {VOCAB - 1}\\)"),
        ([-1], {}, "token id -1 is outside the vocabulary"),
        ([1] * 41, {}, "41 tokens and the context holds 40 .* allows 2048.*; shorten"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, f"logit_bias names token id {VOCAB}"),
        ([1], {"stop_token_ids": [VOCAB]}, f"stop_token_ids names token id {VOCAB}"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    llama: Transformer, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine = Engine(llama, max_seq_len=40)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    assert not engine.has_work


def test_an_engine_refuses_sizes_that_make_no_sense(llama: Transformer) -> None:
    with pytest.raises(ValueError, match=r"batch size.* is 0; at least 1"):
        Engine(llama, 0)
    for asked in (0, -1, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"max_seq_len is {asked}; .* 1 to {CONTEXT}"):
            Engine(llama, max_seq_len=asked)


def test_an_engine_needs_its_memory_before_it_allocates(
    llama: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 bytes a token (2 layers, keys and values, 2 heads of 8 numbers), and a spare slot."""
    for module in ("capacity", "device"):
        monkeypatch.setattr(f"gptfast.{module}.free_memory", lambda device: 100_000)
    with pytest.raises(
        MemoryError, match=r"3 x 2048 tokens.* needs 1\.58 MB.* 100\.00 kB are free"
    ):
        Engine(llama, 3, max_seq_len=CONTEXT)
    context = Engine(llama, 3).max_seq_len
    assert 100 < context < 0.9 * 100_000 / (3 * 256)
    assert Engine(llama, 1).max_seq_len > 3 * context
    with pytest.raises(MemoryError, match=r"1000 x 1 tokens needs 1\.38 MB.* batch size"):
        Engine(llama, 1000)


def test_teacher_forcing_refuses_what_it_cannot_read(llama: Transformer) -> None:
    engine = Engine(llama, max_seq_len=40)
    for ids, message in (([], "0 tokens"), ([1] * 41, "41 tokens"), ([VOCAB], "vocabulary")):
        with pytest.raises(ValueError, match=message):
            list(engine.all_logits(ids))
    engine.submit([1], GREEDY)
    with pytest.raises(RuntimeError, match="running requests"):
        list(engine.all_logits([1]))


# --- teacher forcing and statistics ---


@pytest.mark.parametrize("length", [1, 16, 512, 513, 1100])
def test_teacher_forced_logits_equal_the_uncached_model(model: Transformer, length: int) -> None:
    ids = random_prompt(length)
    pieces = list(Engine(model, 2).all_logits(ids))
    assert max(len(piece) for piece in pieces) <= LARGEST_PIECE
    torch.testing.assert_close(torch.cat(pieces), plain_logits(model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lag", [0, 1])
def test_statistics_tell_the_life_of_a_request(llama: Transformer, lag: int) -> None:
    engine = Engine(llama, 2)
    engine._lag = lag
    work = [(random_prompt(n), GREEDY) for n in (10, 600, 20)]
    results = run(engine, *work)
    for result, (prompt, _) in zip(results, work, strict=True):
        stats = result.stats
        assert stats is not None and stats.started_at is not None
        times = [stats.submitted_at, stats.started_at, *stats.token_times]
        assert times == sorted(times)
        assert stats.num_prompt_tokens == len(prompt) and stats.num_new_tokens == 8
        assert stats.ttft_s == stats.token_times[0] - stats.submitted_at
        assert stats.ttft_s >= (stats.prefill_s or math.inf) > 0
        assert len(stats.gaps_s) == 7
    assert results[2].stats is not None and results[2].stats.started_at is not None
    assert results[0].stats is not None
    assert results[2].stats.started_at > results[0].stats.token_times[-1], "it waited for a row"
    # A first token comes with the prompt; seven more each are decoded.
    assert engine.counters.num_tokens == 3 * 7
    assert 7 < engine.counters.num_steps <= 21 and engine.counters.seconds > 0
    engine.counters.reset()
    run(engine, *((random_prompt(n), replace(GREEDY, max_new_tokens=1)) for n in (10, 600)))
    assert engine.counters.num_tokens == engine.counters.seconds == 0, "that was prefill alone"


def test_new_prompts_do_not_starve_a_row_that_decodes(llama: Transformer) -> None:
    """A first token is reported at once; with one in every step nothing else ever ran."""
    engine = Engine(llama, 2)
    long = engine.submit(random_prompt(5), replace(GREEDY, max_new_tokens=40))
    short = [(random_prompt(6, seed), replace(GREEDY, max_new_tokens=1)) for seed in range(30)]
    ids = [engine.submit(*one) for one in short]
    results: dict[int, Result] = {}
    for _ in range(20):
        take(engine, results)
    assert len(results[long].token_ids) >= 19
    finish(engine, results)
    assert results[long].token_ids == uncached(llama, random_prompt(5), 40)
    assert [results[i].token_ids for i in ids] == [uncached(llama, p, 1) for p, _ in short]


def test_the_first_token_is_reported_before_the_second_is_made(
    llama: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once waited for the decode step behind it: the time to it grew by that step, and the gap
    to the second token was nothing, which made two tokens millions of tokens/sec.
    """
    engine = Engine(llama)
    clock = itertools.count()
    monkeypatch.setattr("gptfast.engine.perf_counter", lambda: float(next(clock)))
    decoded_at: list[float] = []
    decode = engine.runner.decode

    def timed(num_used: int) -> tuple[Tensor, Tensor]:
        decoded_at.append(float(next(clock)))
        return decode(num_used)

    monkeypatch.setattr(engine.runner, "decode", timed)
    engine.submit(random_prompt(5), replace(GREEDY, max_new_tokens=3))
    [event] = engine.step()
    assert len(event.token_ids) == 1 and decoded_at == []
    [result] = finish(engine).values()
    assert result.stats is not None
    first, second, third = result.stats.token_times
    assert first < decoded_at[0] < second < decoded_at[1] < third


# -- rotation that depends on the length of a text --

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 9.0, 30.0],
    "original_max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("longrope")
    return lively_llama(folder, context=1200, rope_scaling=LONGROPE)


@pytest.mark.parametrize("compile", [False, True])
def test_longrope_rows_are_read_anew_where_their_rotation_changes(
    stretched: Transformer, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that cross the length at various steps, together: each as in one pass over all of it.
    (transformers drops its cache there too.)
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    work = [
        (random_prompt(length), replace(GREEDY, max_new_tokens=14))
        for length in (20, 30, 38, 39, 40, 41, 600)
    ]
    engine = Engine(stretched, 3, compile=compile)
    for result, (prompt, _) in zip(run(engine, *work), work, strict=True):
        assert len(result.token_ids) == 14
        assert result.token_ids == uncached(stretched, prompt, 14)


def test_longrope_prefixes_are_reused_on_the_short_side_only(stretched: Transformer) -> None:
    engine = Engine(stretched, 1)
    [first] = run(engine, (random_prompt(12), GREEDY))  # 20 tokens in all
    longer = random_prompt(12) + first.token_ids[:-1] + random_prompt(5)
    [second] = run(engine, (longer, replace(GREEDY, max_new_tokens=30)))  # 54: crosses
    assert second.stats is not None and second.stats.num_cached_tokens == 19
    again = longer + second.token_ids
    [third] = run(engine, (again, GREEDY))
    assert third.stats is not None and third.stats.num_cached_tokens == 0
    assert third.token_ids == uncached(stretched, again, 8)


def test_longrope_request_that_ends_where_it_would_cross(stretched: Transformer) -> None:
    prompt = random_prompt(36)
    expected = uncached(stretched, prompt, 12)
    for num_new in range(3, 8):
        params = replace(GREEDY, max_new_tokens=num_new)
        [result] = run(Engine(stretched, 2), (prompt, params))
        assert result.token_ids == expected[:num_new]
        stop = replace(GREEDY, max_new_tokens=12, stop_token_ids=[expected[num_new - 1]])
        [result] = run(Engine(stretched, 2), (prompt, stop))
        first = expected.index(expected[num_new - 1])
        assert result.token_ids == expected[: first + 1]


def test_a_longrope_row_that_crossed_is_read_anew_once_and_serves_no_short_text(
    stretched: Transformer,
) -> None:
    """Its keys are those of long texts: a short prompt with the same beginning needs its own."""
    engine = Engine(stretched, 1)
    reread, lengths = engine.runner.reread, []
    engine.runner.reread = lambda ids, row: (lengths.append(len(ids)), reread(ids, row))[1]
    run(engine, (random_prompt(36), replace(GREEDY, max_new_tokens=14)))
    assert lengths == [40]
    short = random_prompt(36)[:20]
    [result] = run(engine, (short, GREEDY))
    assert result.stats is not None and result.stats.num_cached_tokens == 0
    assert result.token_ids == uncached(stretched, short, 8)
