"""Sampling against hand computations, a sort, exact distributions, and itself compiled."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import sampling
from gptfast.sampling import (
    SamplingParams,
    SamplingState,
    adjust,
    draw,
    first_argmax,
    probabilities,
    sample,
    token_logprobs,
    truncate,
    uniform,
)

INF = math.inf


def state_of(*rows: SamplingParams, vocab_size: int = 8, prompt=(), seed: int = 0) -> SamplingState:
    """One row for each of the params; row i has seed + i."""
    state = SamplingState(len(rows), vocab_size)
    for i, params in enumerate(rows):
        state.set_row(i, params, prompt, seed + i)
    return state


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of counts at least this far from expected; bins under 5 are put together."""
    large = expected >= 5
    counts = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).double()
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    distance = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, distance / 2))


# ---- parameters ----


def test_defaults_and_normal_forms():
    params = SamplingParams()
    assert (params.max_new_tokens, params.temperature, params.n) == (256, 1.0, 1)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2]).stop_token_ids == (1, 2)
    numpy = pytest.importorskip("numpy")
    params = SamplingParams(top_k=numpy.int64(3), temperature=numpy.float32(0.5), top_p=1)
    assert (params.top_k, params.temperature, params.top_p) == (3, 0.5, 1.0)
    assert type(params.top_k) is int and type(params.top_p) is float
    assert SamplingParams(max_new_tokens=None).max_new_tokens is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 4  # type: ignore[misc]
    assert dataclasses.replace(params, top_k=4).top_k == 4
    hash(params)


def test_logit_bias_is_a_copy():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}


HUGE = 10**400
WRONG_VALUES = [
    *[("max_new_tokens", value) for value in (0, -1, 2**31, HUGE)],
    *[("temperature", value) for value in (-0.1, 100.5, HUGE)],
    *[("top_k", value) for value in (-2, 2**31, HUGE)],
    *[("top_p", value) for value in (0, 0.0, -0.5, 1.01)],
    *[("min_p", value) for value in (-0.01, 1.01)],
    *[("repetition_penalty", value) for value in (0, -1.0, 101)],
    *[(f"{name}_penalty", value) for name in ("presence", "frequency") for value in (-2.1, 2.1)],
    *[
        (name, value)
        for name in "temperature top_p min_p repetition_penalty presence_penalty".split()
        for value in (math.nan, INF, -INF)
    ],
    *[("n", value) for value in (0, -1, 1025)],
    *[("seed", value) for value in (-1, 2**63)],
    *[("logprobs", value) for value in (-1, 21)],
    *[("logit_bias", value) for value in ({1: math.nan}, {1: 101}, {1: -INF}, {-1: 1.0})],
    ("logit_bias", {2**31: 1.0}),
    *[("stop", value) for value in ("", ["a", ""])],
    ("stop_token_ids", [-1]),
]
WRONG_TYPES = [
    *[("max_new_tokens", value) for value in (1.5, "3", True, math.nan)],
    *[("temperature", value) for value in (None, "1", True, [1.0], 1j)],
    *[("top_k", value) for value in (None, 1.0, False)],
    *[("top_p", None), ("min_p", "0"), ("repetition_penalty", None), ("presence_penalty", "x")],
    *[("n", value) for value in (None, 1.0, True)],
    *[("seed", value) for value in (1.0, "7", True)],
    *[("logprobs", value) for value in (True, 1.0)],
    *[("logit_bias", value) for value in (None, [1], {"1": 1.0}, {1: "2"}, {1: None}, {1.0: 1})],
    *[("stop", value) for value in (None, 3, [3], {"a"}, b"x")],
    *[("stop_token_ids", value) for value in (None, 3, "12", [1.0], [True])],
    *[("ignore_eos", value) for value in (None, 1, "yes")],
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda v: str(v)[:20])
def test_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda v: str(v)[:20])
def test_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


def test_message_has_name_value_and_range():
    with pytest.raises(ValueError, match=r"^temperature = -1 must be a number from 0 to 100$"):
        SamplingParams(temperature=-1)
    with pytest.raises(TypeError, match=r"^n = 1.0 must be a whole number from 1 to 1024$"):
        SamplingParams(n=1.0)  # type: ignore[arg-type]


def test_ids_of_another_model():
    SamplingParams(logit_bias={7: 1.0}, stop_token_ids=[7]).validate_for(8)
    with pytest.raises(ValueError, match=r"logit_bias names token id 8.* 0 to 7"):
        SamplingParams(logit_bias={1: 1.0, 8: 1.0}).validate_for(8)
    with pytest.raises(ValueError, match=r"stop_token_ids names token id 9"):
        SamplingParams(stop_token_ids=[9]).validate_for(8)


@pytest.mark.parametrize(
    ("asked", "plan"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 1e-6, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, "greedy"),
        ({}, "plain"),
        ({"temperature": 0.7, "top_k": -1}, "plain"),
        ({"top_k": 5}, "full"),
        ({"top_p": 0.5}, "full"),
        ({"min_p": 0.1}, "full"),
        ({"temperature": 0, "logit_bias": {1: 1.0}}, "full"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "full"),
        ({"temperature": 0, "presence_penalty": 0.1}, "full"),
        ({"temperature": 0, "frequency_penalty": -0.1}, "full"),
    ],
)
def test_plan_is_the_cheapest_that_does_it(asked, plan):
    params = SamplingParams(**asked)
    assert params.plan == plan
    assert state_of(SamplingParams(temperature=0), params).plan() == plan


# ---- state ----


def test_rows_are_set_and_cleared_in_place():
    state = SamplingState(3, 8)
    clean = {name: tensor.clone() for name, tensor in state.tensors().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    params = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=2,
        presence_penalty=1, frequency_penalty=0.5, logit_bias={2: -3.0, 4: 5.0},
    )  # fmt: skip
    state.set_row(1, params, [1, 1, 6], seed=2**63 - 1)
    state.count(torch.tensor([1, 1, 1]), torch.tensor([False, True, False]))
    assert state.plan() == "full"
    found = [state.tensors()[name][1].item() for name in list(state.tensors())[:8]]
    assert found == [0.5, 3, 0.25, 0.125, 2, 1, 0.5, 2**63 - 1]
    assert state.bias[1].tolist() == [0, 0, -3, 0, 5, 0, 0, 0]
    assert state.prompt_seen[1].nonzero().flatten().tolist() == [1, 6]
    for name, tensor in state.tensors().items():
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor[::2], clean[name][::2]), "another row changed"
        assert not torch.equal(tensor[1], clean[name][1]), name
    state.set_row(1, SamplingParams(), torch.tensor([3]), seed=5)  # nothing of the last request
    assert state.prompt_seen[1].nonzero().flatten().tolist() == [3]
    assert not state.bias.any() and not state.output_counts.any()
    assert state.plan() == "plain"
    state.clear_row(1)
    assert all(torch.equal(state.tensors()[name], clean[name]) for name in clean)
    assert state.plan() == "greedy"


def test_a_row_is_a_view():
    state = SamplingState(3, 8)
    view = state.row(2)
    state.set_row(2, SamplingParams(top_k=4), [], seed=9)
    assert (view.top_k.item(), view.seed.item(), view.plan()) == (4, 9, "full")
    assert state.row(1).plan() == "greedy"
    view.count(torch.tensor([5]), torch.tensor([True]))
    assert state.output_counts[2].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    view.set_row(0, SamplingParams(), [], seed=1)
    assert state.seed.tolist() == [0, 0, 1] and state.plan() == "plain"


def test_idle_rows_count_nothing():
    state = SamplingState(3, 8)
    for tokens in ([1, 2, 3], [1, 5, 3]):
        state.count(torch.tensor(tokens), torch.tensor([True, False, True]))
    assert state.output_counts.nonzero().tolist() == [[0, 1], [2, 3]]
    assert state.output_counts[0, 1] == state.output_counts[2, 3] == 2


def test_foreign_ids_are_refused_before_anything_changes():
    state = state_of(SamplingParams(top_k=3))
    for params, prompt in [
        (SamplingParams(), [8]),
        (SamplingParams(), [-1]),
        (SamplingParams(logit_bias={8: 1.0}), [1]),
    ]:
        with pytest.raises(ValueError, match="0 to 7"):
            state.set_row(0, params, prompt, seed=0)
    assert state.top_k.item() == 3


# ---- adjust ----


def test_adjustments_by_hand():
    """Bias first, then repetition, then presence and frequency, each in its own row and all."""
    params = [
        SamplingParams(logit_bias={0: 1.5, 1: -2.0}),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=0.25),
        SamplingParams(
            logit_bias={0: -6.0},
            repetition_penalty=2.0,
            presence_penalty=0.5,
            frequency_penalty=0.25,
        ),
        SamplingParams(),
    ]
    state = state_of(*params, vocab_size=5, prompt=[0, 1])
    everyone = torch.ones(6, dtype=torch.bool)
    for token in (1, 2, 2, 3, 3, 3):
        state.count(torch.full((6,), token), everyone)
    logits = torch.tensor([4.0, -4.0, 1.0, 0.0, 2.0]).repeat(6, 1)
    assert adjust(logits, state).tolist() == [
        [5.5, -6.0, 1.0, 0.0, 2.0],
        [2.0, -8.0, 0.5, 0.0, 2.0],  # prompt 0, 1 and output 1, 2, 3
        [4.0, -4.5, 0.5, -0.5, 2.0],  # output only
        [4.0, -4.25, 0.5, -0.75, 2.0],  # once for each time
        [-4.0, -8.75, -0.5, -1.25, 2.0],  # 4 - 6 = -2, doubled because it is negative now
        [4.0, -4.0, 1.0, 0.0, 2.0],
    ]
    assert adjust(logits.bfloat16(), state).dtype == torch.float32


# ---- truncate ----


def reference_kept(x: list[float], k: int, p: float, min_p: float) -> list[bool]:
    """Walks down the sorted tokens. p and min_p as float32 hold them."""
    weights = (torch.tensor(x) - max(x)).exp().double().tolist()
    order = sorted(range(len(x)), key=lambda i: -x[i])
    least = x[order[min(k, len(x)) - 1]] if k > 0 else -INF
    order = [i for i in order if x[i] >= least]
    if p < 1:
        total = math.fsum(weights[i] for i in order)
        num_kept = 1
        while math.fsum(weights[i] for i in order[:num_kept]) < p * total:
            num_kept += 1
        least = x[order[num_kept - 1]]
    return [value >= least and weight >= min_p for value, weight in zip(x, weights, strict=True)]


def as_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -INF, -1.0, -3.5]),  # ties
    st.floats(-30, 5, width=32),
    st.floats(-(2.0**120), 2.0**120, width=32),
    st.sampled_from([3.4e38, -3.4e38, 1e-45, -1e-45, 1.1754944e-38]).map(as_float32),
)
ROWS = st.tuples(
    st.one_of(
        st.lists(LOGITS, min_size=1, max_size=40),
        st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40),
    ).filter(lambda x: max(x) > -INF),
    st.one_of(st.integers(-1, 45), st.just(2**31 - 1)),
    st.one_of(st.floats(1e-6, 1), st.sampled_from([1.0, 0.5, 0.75, 0.25, 1e-6, 0.9999999])),
    st.one_of(st.just(0.0), st.floats(0, 1), st.just(1.0)),
)


@settings(max_examples=400, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_truncation_is_what_a_walk_down_the_sorted_tokens_keeps(rows):
    width = max(len(row[0]) for row in rows)
    x = torch.tensor([row[0] + [-INF] * (width - len(row[0])) for row in rows])
    top_k = torch.tensor([row[1] for row in rows])
    top_p, min_p = (torch.tensor([row[i] for row in rows]) for i in (2, 3))
    mask = [
        reference_kept(x[i].tolist(), int(top_k[i]), top_p[i].item(), min_p[i].item())
        for i in range(len(rows))
    ]
    expected = torch.where(torch.tensor(mask), x, -INF)
    assert torch.equal(truncate(x, top_k, top_p, min_p), expected)
    # The compiled path, run eagerly: the same threshold to the bit (0.0 equals -0.0).
    k = torch.where(top_k > 0, top_k.clamp(max=width), width)[:, None]
    p = top_p.double()[:, None]
    assert torch.equal(sampling._find_by_search(x, k, p), sampling._find_by_sort(x, k, p))


def kept(x: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    cut = truncate(
        torch.tensor([x]), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    )
    return (cut[0] > -INF).nonzero().flatten().tolist()


def test_truncation_by_hand():
    x = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(x, top_k=1) == [1]
    assert kept(x, top_k=3) == [1, 2, 3]
    assert kept(x, top_p=0.39) == [1]
    assert kept(x, top_p=0.69) == [1, 3]
    assert kept(x, top_p=0.71) == [1, 2, 3]
    assert kept(x, min_p=0.49) == [1, 2, 3]  # 0.2 is half of the most likely
    assert kept(x, min_p=0.51) == [1, 3]
    assert kept(x, min_p=1.0) == [1]
    assert kept(x, top_k=2, top_p=0.56) == [1]  # of the two, 0.4 is 0.571
    assert kept(x, top_k=2, top_p=0.58) == [1, 3]
    assert kept(x, top_p=1e-6) == [1]


def test_ties_at_the_boundary_are_all_kept():
    assert kept([1.0, 2.0, 1.0, 0.0, 1.0], top_k=2) == [0, 1, 2, 4]
    assert kept([0.0, 0.0, 0.0, -1e9], top_p=0.3) == [0, 1, 2]
    assert kept([0.0, -0.0, -1.0], top_k=1) == [0, 1]


def test_off_keeps_everything_to_the_bit():
    """A sum of masses that rounds below its total must not cost the tail."""
    x = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * 30
    x[0, 17] = -INF
    for top_k in (0, -1, 20_000, 2**31 - 1):
        assert torch.equal(truncate(x, torch.full((2,), top_k), torch.ones(2), torch.zeros(2)), x)
    all_of_them, off = torch.full((2, 1), 20_000), torch.ones(2, 1).double()
    assert torch.equal(sampling._find_by_search(x, all_of_them, off)[:, 0], x.amin(-1))


def test_search_at_a_large_vocabulary():
    x = torch.randn(4, 128_256, generator=torch.Generator().manual_seed(1)) * 3
    k = torch.tensor([[50], [128_256], [1000], [1]])
    p = torch.tensor([[0.9], [0.999], [0.5], [0.99]], dtype=torch.float64)
    assert torch.equal(sampling._find_by_search(x, k, p), sampling._find_by_sort(x, k, p))


# ---- random bits ----

MANY = torch.arange(1 << 16)
ONE = torch.zeros_like(MANY)


def test_uniform_is_a_function_of_its_arguments():
    """The numbers are this project's own: a change would change the text of every seed."""
    seeds = torch.tensor([0, 1, 2**32, 2**63 - 1, 0])
    positions = torch.tensor([0, 0, 0, 2**31, 1])
    u = uniform(seeds, positions, 0)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert (u * 2**24).tolist() == [1534157, 4238352, 8683377, 12085358, 8105613]
    assert torch.equal(u * 2**24, (u * 2**24).round())
    alone = [uniform(seeds[i : i + 1], positions[i : i + 1], 0).item() for i in range(5)]
    assert alone == u.tolist()


STREAMS = {
    "positions": uniform(ONE + 7, MANY, 0),
    "far positions": uniform(ONE + 7, MANY * 4096, 0),
    "seeds": uniform(MANY, ONE + 3, 0),
    "high seeds": uniform(MANY << 32, ONE + 3, 0),
    "purposes": torch.cat([uniform(ONE[:64], MANY[:64], purpose) for purpose in range(1024)]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_uniform_fills_its_range_and_forgets_its_neighbours(name):
    u = STREAMS[name]
    bits = (u.double() * 2**24).long()
    flat = torch.full((1024,), len(u) / 1024)
    assert chi_square_p((bits >> 14).bincount(minlength=1024), flat) > 0.001, "high bits"
    assert chi_square_p((bits & 1023).bincount(minlength=1024), flat) > 0.001, "low bits"
    for distance in (1, 2, 64):
        pairs = (bits[:-distance] >> 19) * 32 + (bits[distance:] >> 19)
        flat = torch.full((1024,), len(pairs) / 1024)
        assert chi_square_p(pairs.bincount(minlength=1024), flat) > 0.001, distance


@pytest.mark.parametrize(
    "other",
    [uniform(ONE + 7, MANY, 1), uniform(ONE + 8, MANY, 0), uniform(ONE + 7 + 2**40, MANY, 0)],
    ids=["purpose", "seed", "high seed"],
)
def test_streams_are_independent(other):
    pairs = (STREAMS["positions"] * 32).long() * 32 + (other * 32).long()
    assert chi_square_p(pairs.bincount(minlength=1024), torch.full((1024,), 64.0)) > 0.001


def test_avalanche():
    """Each bit of seed and position flips each bit of the result half the time."""
    seeds, positions = MANY[:16384] % 97, MANY[:16384] // 97
    base = (uniform(seeds, positions, 0) * 2**24).long()
    flips = [(1 << bit, 0) for bit in range(63)] + [(0, 1 << bit) for bit in range(32)]
    for in_seed, in_position in flips:
        changed = (uniform(seeds ^ in_seed, positions ^ in_position, 0) * 2**24).long() ^ base
        rates = torch.stack([(changed >> bit & 1).double().mean() for bit in range(24)])
        # 5 standard deviations of a fair coin
        assert (rates - 0.5).abs().max() < 5 * 0.5 / 128, (in_seed, in_position)


# ---- from logits to tokens ----


def test_first_argmax():
    x = torch.zeros(3, 5000)
    x[0, 4321] = x[0, 1234] = 1
    x[1, 4999] = 1
    x[2] = torch.nan
    assert first_argmax(x)[:2].tolist() == [1234, 4999]
    assert 0 <= first_argmax(x)[2] < 5000
    assert first_argmax(torch.tensor([[-0.0, 0.0], [-INF, -1.0]])).tolist() == [0, 1]


def test_draw_by_hand():
    odds = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    below = 1 - 2.0**-24
    for u, token in [(0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below, 4)]:
        assert draw(odds[None], torch.tensor([u])).tolist() == [token]


def test_draw_is_exact_at_a_large_vocabulary():
    """In float32 the running sum of 128k odds would be off by whole tokens."""
    odds = torch.rand(1, 128_256, generator=torch.Generator().manual_seed(0))
    running = odds.double().cumsum(-1)
    u = torch.rand(200, generator=torch.Generator().manual_seed(1))
    expected = torch.searchsorted(running[0], u.double() * running[0, -1], right=True)
    assert torch.equal(draw(odds.expand(200, -1), u), expected)


@settings(max_examples=200, deadline=None)
@given(
    odds=st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 0.1, 1.0]), min_size=1, max_size=30),
    u=st.one_of(st.just(0), st.just(2**24 - 1), st.integers(0, 2**24 - 1)),
)
def test_draw_never_takes_what_has_no_odds(odds, u):
    if any(odds):
        assert odds[draw(torch.tensor([odds]), torch.tensor([u * 2.0**-24])).item()] > 0


def test_draw_survives_a_running_sum_that_wobbles(monkeypatch):
    """A parallel scan may add in another order at each token: the sum then rises a little where
    there are no odds, and u may fall right there."""
    running = torch.tensor([[1.0, 1.0 + 2.0**-52, 2.0]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_, **__: running)
    assert draw(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([0.5])).tolist() == [2]


@pytest.mark.parametrize("plan", sampling.PLANS)
def test_broken_logits_still_give_an_id(plan):
    """An id outside the vocabulary would take the whole device down at the next embedding."""
    logits = torch.tensor([[0.0, math.nan, 1.0], [math.nan] * 3])
    tokens = sample(logits, state_of(*[SamplingParams()] * 2, vocab_size=3), ONE[:2], plan)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < 3


def test_probabilities_by_hand():
    """softmax(log(1, 4, 9) / 2) = 1/6, 2/6, 3/6; then cut; then one row at temperature 0."""
    logits = torch.tensor([1.0, 4.0, 9.0]).log().repeat(5, 1)
    state = state_of(
        SamplingParams(temperature=2),
        SamplingParams(temperature=2, top_k=2),
        SamplingParams(temperature=2, top_p=0.5),
        SamplingParams(temperature=0.5, min_p=0.1),  # 1, 16, 81
        SamplingParams(temperature=0, logit_bias={0: 3.0}),
        vocab_size=3,
    )
    expected = [
        [1 / 6, 2 / 6, 3 / 6],
        [0, 0.4, 0.6],
        [0, 0, 1],
        [0, 16 / 97, 81 / 97],
        [1, 0, 0],
    ]
    torch.testing.assert_close(probabilities(logits, state), torch.tensor(expected))
    plain = probabilities(logits[:1], state.row(0), "plain")
    torch.testing.assert_close(plain, torch.tensor(expected[:1]))


@pytest.mark.parametrize(
    ("cut", "odds"),
    [
        ({}, [16, 8, 4, 2]),
        ({"top_k": 2}, [16, 8, 0, 0]),
        ({"top_p": 0.84}, [16, 8, 4, 0]),  # 24 of 30 is 0.8
        ({"top_k": 3, "top_p": 0.84}, [16, 8, 0, 0]),  # 24 of the 28 that top_k kept is 0.857
        ({"min_p": 0.2}, [16, 8, 4, 0]),
        ({"min_p": 0.3, "top_p": 0.84}, [16, 8, 0, 0]),
    ],
)
def test_a_whole_chain_by_hand(cut, odds):
    """Odds 16, 8, 4, 1; the last is doubled twice by its bias and halved by its penalty."""
    log2 = math.log(2)
    params = SamplingParams(logit_bias={3: 2 * log2}, presence_penalty=log2, **cut)
    state = state_of(params, vocab_size=4)
    state.count(torch.tensor([3]), torch.tensor([True]))
    found = probabilities(torch.tensor([[4 * log2, 3 * log2, 2 * log2, 0.0]]), state)
    torch.testing.assert_close(found, torch.tensor([odds]) / sum(odds))


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 100])
def test_extreme_temperatures_and_logits_stay_finite(temperature):
    logits = torch.tensor([[3.4e38, -3.4e38, 0.0, 3.3e38, -INF], [5.0, 4.0, -4.0, 4.5, 5.0]])
    state = state_of(*[SamplingParams(temperature=temperature, top_p=0.99)] * 2, vocab_size=5)
    found = probabilities(logits, state)
    assert found.isfinite().all() and found[0].tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.3},
    "top_k": {"temperature": 0.8, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "all": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "logit_bias": {3: 2.0}},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution(name):
    """Chi-square of 20 000 positions; the exact distribution is worked out in float64 here."""
    params, num_draws, vocab_size = SamplingParams(**DISTRIBUTIONS[name]), 20_000, 40
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    state = state_of(params, vocab_size=vocab_size, prompt=[5, 6], seed=11)
    state.count(torch.tensor([6]), torch.tensor([True]))
    x = logits[0].double().clone()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in (5, 6):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    x[6] -= params.presence_penalty + params.frequency_penalty
    x = x / params.temperature
    mask = reference_kept(x.tolist(), params.top_k, as_float32(params.top_p), params.min_p)
    exact = x.where(torch.tensor(mask), torch.tensor(-INF, dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(probabilities(logits, state)[0].double(), exact)

    many = SamplingState(num_draws, vocab_size)
    for field, tensor in many.tensors().items():
        tensor.copy_(state.tensors()[field].expand_as(tensor))
    tokens = sample(logits.expand(num_draws, -1), many, torch.arange(num_draws), state.plan())
    counts = tokens.bincount(minlength=vocab_size)
    assert chi_square_p(counts, exact * num_draws) > 0.001
    assert counts[exact == 0].sum() == 0


def test_greedy_takes_the_lowest_of_ties_under_every_plan():
    logits = torch.zeros(3, 5000)
    logits[0, [77, 4000]] = 3.0
    logits[1, [4999, 4998]] = 1e-30
    requests = [SamplingParams(temperature=value, top_k=3) for value in (0, 0, 9e-6)]
    state = state_of(*requests, vocab_size=5000)
    for plan in sampling.PLANS:
        assert sample(logits, state, ONE[:3], plan).tolist() == [77, 4998, 0]


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.2),
    SamplingParams(temperature=0.8, top_k=20),
    SamplingParams(top_p=0.7, min_p=0.01, frequency_penalty=1.0),
    SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias={9: -100.0}),
]


def step(logits, state, positions, active, plan):
    tokens = sample(logits, state, positions, plan)
    state.count(tokens, active)
    return tokens


def run(state: SamplingState, logits: torch.Tensor, plan, step=step) -> list[list[int]]:
    """Tokens [T][B] of B rows over T steps of logits [T, B, V]; idle rows have the seed 0."""
    tokens = []
    for position, of_rows in enumerate(logits):
        positions = torch.full((len(of_rows),), position)
        tokens.append(step(of_rows, state, positions, state.seed > 0, plan).clone())
    return torch.stack(tokens).tolist()


def test_a_row_does_not_see_the_others():
    """Alone with its own plan, or beside any rows: the same tokens from the same seed."""
    logits = torch.randn(30, 5, 64, generator=torch.Generator().manual_seed(0)) * 2
    together = run(state_of(*MIXED, vocab_size=64, seed=5), logits, "full")
    for i, params in enumerate(MIXED):
        alone = state_of(params, vocab_size=64, seed=5 + i)
        own = run(alone, logits[:, i : i + 1], alone.plan())
        assert [step[0] for step in own] == [step[i] for step in together]
    other_seed = run(state_of(*MIXED, vocab_size=64, seed=6), logits, "full")
    same = [all(a[i] == b[i] for a, b in zip(together, other_seed, strict=True)) for i in range(5)]
    assert same == [True, False, False, False, True]  # only the greedy rows


def test_token_logprobs_by_hand():
    logits = torch.tensor([[1.0, 2.0, 5.0], [6.0, 1.0, 1.0]]).log() + 3
    chosen, values, ids = token_logprobs(logits, torch.tensor([0, 0]), 2)
    torch.testing.assert_close(chosen.exp(), torch.tensor([1 / 8, 6 / 8]))
    torch.testing.assert_close(values.exp(), torch.tensor([[5 / 8, 2 / 8], [6 / 8, 1 / 8]]))
    assert ids[:, 0].tolist() == [2, 0] and ids[0, 1] == 1
    assert token_logprobs(logits, torch.tensor([0, 0]), 0)[1].shape == (2, 0)


# ---- compiled ----


def test_compiled_equals_eager_and_nothing_recompiles():
    """One graph for all values, idle rows and plans of others; 5 x 1024 logits are searched."""
    vocab_size = 1024
    logits = torch.randn(6, 5, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 0, [700, 300]] = 50.0  # a tie
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    with torch.no_grad():
        run(SamplingState(5, vocab_size), logits[:1], "full", compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, requests in enumerate([MIXED, MIXED[::-1], [MIXED[2]] * 5], start=1):
                states = [state_of(*requests, vocab_size=vocab_size, seed=seed) for _ in range(2)]
                for state in states:
                    state.clear_row(3)
                found = run(states[0], logits, "full", compiled)
                assert found == run(states[1], logits, "full")
                assert torch.equal(states[0].output_counts, states[1].output_counts)
                assert states[0].output_counts.sum(-1).tolist() == [6, 6, 6, 0, 6]
                assert seed > 1 or [tokens[0] for tokens in found] == [300] * 6


def test_compiled_truncation_is_exact_and_one_graph_serves_every_row():
    torch._dynamo.reset()
    x = torch.randn(3, 1, 5000, generator=torch.Generator().manual_seed(0)) * 3
    x[1] = x[1].round()  # many ties
    state = SamplingState(3, 5000)
    requests = [(50, 1.0, 0.0), (0, 0.95, 0.01), (4999, 0.3, 0.5)]
    compiled = torch.compile(truncate, fullgraph=True, dynamic=False)
    for row, (top_k, top_p, min_p) in enumerate(requests):
        state.set_row(row, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p), [], seed=0)
        view = state.row(row)
        with torch._dynamo.config.patch(error_on_recompile=row > 0), torch.no_grad():
            found = compiled(x[row], view.top_k, view.top_p, view.min_p)
        assert torch.equal(found, truncate(x[row], view.top_k, view.top_p, view.min_p))
