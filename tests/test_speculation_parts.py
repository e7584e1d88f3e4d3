"""The parts of speculation, each without a model: the rule of acceptance against a plain loop and
exact distributions, prompt lookup against a search, the choice of k on simulated machines.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.sampling import PURPOSE_SAMPLE, draw, uniform
from gptfast.speculation import accept
from gptfast.speculation.accept import (
    PURPOSE_ACCEPT,
    PURPOSE_DRAFT,
    PURPOSE_RESIDUAL,
    accept_by_rejection,
    accept_equal,
)
from gptfast.speculation.ngram import MAX_MATCH, NgramIndex
from gptfast.stats import SpeculationStats

# ---- acceptance ----


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of counts at least this far from expected, which is 0 only where counts are."""
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    distance = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, distance / 2))


def bits(seed: int, position: int, purpose: int) -> float:
    return float(uniform(torch.tensor([seed]), torch.tensor([position]), purpose))


def accept_row(
    drafted: list[int], q: torch.Tensor, p: torch.Tensor, seed: int, positions: list[int]
) -> list[int]:
    """The new tokens of one row, q [k, V], p [k+1, V], as the papers write the rule."""
    tokens: list[int] = []
    for j, x in enumerate(drafted):
        if x >= 0 and bits(seed, positions[j], PURPOSE_ACCEPT) * q[j, x].item() < p[j, x].item():
            tokens.append(x)
            continue
        left = torch.clamp(p[j] - q[j], min=0) if x >= 0 else p[j]
        break
    else:
        left, j = p[-1], len(drafted)
    if left.sum() == 0:
        left = p[j]
    last = draw(left[None], torch.tensor([bits(seed, positions[j], PURPOSE_RESIDUAL)]))
    return [*tokens, int(last)]


def distribution(draw_from: st.DataObject, vocab_size: int) -> torch.Tensor:
    """[V]: with zeros, one-hot, or anything."""
    weights = draw_from.draw(
        st.lists(st.integers(0, 4), min_size=vocab_size, max_size=vocab_size).filter(any)
    )
    weights = torch.tensor(weights, dtype=torch.float32)
    if draw_from.draw(st.booleans()):
        weights = (weights == weights.max()).float() * (weights.cumsum(0) <= weights.max())
    weights = weights * torch.rand(vocab_size).add(0.5)
    return weights / weights.sum() if weights.sum() > 0 else torch.eye(vocab_size)[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), num_rows=st.integers(1, 4), k=st.integers(1, 8))
def test_rejection_is_a_loop_over_rows_and_places(data, num_rows, k):
    vocab_size = data.draw(st.integers(1, 6))
    q = torch.stack([distribution(data, vocab_size) for _ in range(num_rows * k)])
    q = q.view(num_rows, k, vocab_size)
    p = torch.stack([distribution(data, vocab_size) for _ in range(num_rows * (k + 1))])
    p = p.view(num_rows, k + 1, vocab_size)
    likeness = data.draw(st.sampled_from(["none", "equal", "nearly", "one row"]))
    if likeness == "equal":
        p[:, :k] = q
    if likeness == "nearly":
        p[:, :k] = q * (1 + 2**-20)
    if likeness == "one row":
        p[0, :k] = q[0]
    places = st.tuples(*[st.integers(-1, vocab_size - 1)] * k)
    wanted = [data.draw(places) for _ in range(num_rows)]
    # Mostly tokens that q can draw, some that it cannot, some that are none.
    drafted = torch.tensor(wanted)
    if data.draw(st.booleans()):
        drafted = torch.multinomial(q.view(-1, vocab_size), 1).view(num_rows, k)
        drafted[torch.tensor(wanted) == -1] = -1
    seed = torch.tensor([data.draw(st.integers(0, 2**63 - 1)) for _ in range(num_rows)])
    positions = data.draw(st.integers(0, 9)) + torch.arange(k + 1).expand(num_rows, -1)
    tokens, num_accepted = accept_by_rejection(drafted, q, p, seed, positions)
    assert tokens.shape == (num_rows, k + 1) and tokens.dtype == num_accepted.dtype == torch.int64
    assert int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size
    for row in range(num_rows):
        row_drafted, row_positions = drafted[row].tolist(), positions[row].tolist()
        expected = accept_row(row_drafted, q[row], p[row], int(seed[row]), row_positions)
        kept = int(num_accepted[row]) + 1
        assert tokens[row, :kept].tolist() == expected


def test_a_token_is_distributed_as_p_whatever_the_draft_says(monkeypatch):
    """Both uniforms on a grid of midpoints, the drafted token weighted by q: the exact sum."""
    num = 64
    grid = (torch.arange(num) + 0.5) / num
    u = {PURPOSE_ACCEPT: grid.repeat_interleave(num), PURPOSE_RESIDUAL: grid.repeat(num)}
    monkeypatch.setattr(
        accept,
        "uniform",
        lambda seed, positions, purpose: u[purpose][:, None] if positions.ndim == 2 else u[purpose],
    )
    p = torch.tensor([0.125, 0.5, 0.0, 0.25, 0.125])
    drafts = {
        "right": p,
        "never right": torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]),
        "surest of the least likely": torch.tensor([0.75, 0.0, 0.0, 0.0, 0.25]),
        "near": torch.tensor([0.25, 0.25, 0.125, 0.125, 0.25]),
        "one-hot": torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]),
    }
    ones = torch.ones(num * num, 1, 1)
    positions = torch.zeros(num * num, 2, dtype=torch.int64)
    for name, q in drafts.items():
        mass = torch.zeros(5)
        for x in range(5):
            tokens, num_accepted = accept_by_rejection(
                torch.full((num * num, 1), x),
                ones * q,
                ones * torch.stack([p, p]),
                *[positions] * 2,
            )
            mass += q[x] * tokens[:, 0].bincount(minlength=5) / num**2
            if q[x] > 0:
                rate = num_accepted.float().mean()
                assert float(rate) == pytest.approx(min(1.0, float(p[x] / q[x])), abs=1 / num)
        torch.testing.assert_close(mass, p, atol=2 / num, rtol=0, msg=f"{name}: {mass} for {p}")


VOCAB, NUM_DRAWS = 4, 20_000
NEXT = torch.tensor(  # the target's p(next | last token)
    [[0.1, 0.2, 0.3, 0.4], [0.7, 0.0, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.05, 0.05, 0.9]]
)
DRAFTS = {
    "always right": NEXT,
    "never right": (NEXT == 0).float() + 1e-6 * (NEXT.amin(-1, keepdim=True) == NEXT).float(),
    "adversarial": NEXT.flip(-1) ** 2,
    "unsure": torch.full((VOCAB, VOCAB), 1 / VOCAB),
    "sure": (NEXT.amax(-1, keepdim=True) == NEXT).float(),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_three_tokens_over_several_rounds_are_distributed_as_plain_ones(name, k):
    """A place that was drafted in vain is drafted again with its old bits: nothing must depend on
    them. 20,000 texts of three tokens are counted as one of 64 outcomes.
    """
    q_next = DRAFTS[name] / DRAFTS[name].sum(-1, keepdim=True)
    seed = torch.arange(NUM_DRAWS) + 1000 * k
    rows = torch.arange(NUM_DRAWS)
    text = torch.zeros(NUM_DRAWS, 1 + 3 + k + 1, dtype=torch.int64)  # all begin with token 0
    length = torch.ones(NUM_DRAWS, dtype=torch.int64)
    for _ in range(3):
        last = text[rows, length - 1]
        drafted, q = [], []
        for j in range(k):
            q.append(q_next[last])
            last = draw(q[-1], uniform(seed, length + j, PURPOSE_DRAFT))
            drafted.append(last)
        ids = torch.stack([text[rows, length - 1], *drafted], 1)
        positions = length[:, None] + torch.arange(k + 1)
        tokens, num_accepted = accept_by_rejection(
            ids[:, 1:], torch.stack(q, 1), NEXT[ids], seed, positions
        )
        for j in range(k + 1):
            is_new = (j <= num_accepted) & (length + j < 4)
            text[rows, torch.where(is_new, length + j, text.shape[1] - 1)] = tokens[:, j]
        length = (length + num_accepted + 1).clamp(max=4)
    a, b, c = text[:, 1:4].T
    expected = NEXT[0][:, None, None] * NEXT[:, :, None] * NEXT[None, :, :]
    counts = (a * VOCAB**2 + b * VOCAB + c).bincount(minlength=VOCAB**3)
    assert chi_square_p(counts, NUM_DRAWS * expected.flatten()) > 0.01
    if name == "always right" and k == 3:
        assert bool((num_accepted == k).all())


def test_one_hot_rows_are_greedy_and_take_no_chance():
    p_best, q_best = torch.randint(3, (2, 500, 5)) * 2
    p, q = torch.eye(6)[p_best], torch.eye(6)[q_best[:, :4]]
    seed, positions = torch.arange(500), torch.arange(5).expand(500, -1)
    tokens, num_accepted = accept_by_rejection(q_best[:, :4], q, p, seed, positions)
    assert torch.equal(num_accepted, accept_equal(q_best[:, :4], p_best))
    is_kept = torch.arange(5) <= num_accepted[:, None]
    assert torch.equal(tokens[is_kept], p_best[is_kept])
    assert set(num_accepted.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_equal_probabilities_stay_at_every_u(monkeypatch, u):
    monkeypatch.setattr(
        accept, "uniform", lambda seed, positions, _: torch.full(positions.shape, u)
    )
    q = torch.tensor([1e-45, 1 / 3, 1.0000001, 1.9999999, 2**-126]).view(5, 1, 1)
    zeros = torch.zeros(5, 2, dtype=torch.int64)
    _, num_accepted = accept_by_rejection(zeros[:, :1], q, q.expand(-1, 2, -1), zeros[:, 0], zeros)
    assert num_accepted.tolist() == [1] * 5


def test_zero_probability_never_stays_and_an_empty_residual_is_p(monkeypatch):
    def run(u: float, p: list[float], q: list[float]) -> tuple[list[int], int]:
        monkeypatch.setattr(accept, "uniform", lambda _, at, __: torch.full(at.shape, u))
        zeros = torch.zeros(1, 2, dtype=torch.int64)
        rows = torch.tensor([p, p])[None], torch.tensor([q])[None]
        tokens, num = accept_by_rejection(zeros[:, :1], rows[1], rows[0], zeros[0, :1], zeros)
        return tokens[0].tolist(), int(num)

    assert run(0.0, [0.0, 0.25, 0.75], [1.0, 0.0, 0.0])[1] == 0
    almost = [0.5 - 2**-24, 0.0, 0.5 - 2**-24]  # as q, but for rounding
    tokens, num_accepted = run(1 - 2**-24, almost, [0.5, 0.0, 0.5])
    assert num_accepted == 0 and tokens[0] == 2
    tokens, num_accepted = run(0.5, [math.nan] * 3, [0.5, 0.0, 0.5])
    assert all(0 <= token < 3 for token in tokens)


def test_equal_tokens_are_counted_up_to_the_first_that_differs():
    drafted = torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 3], [1, 2, -1], [-1, 2, 3]])
    sampled = torch.tensor([[1, 2, 3, 9]] * 5)
    num_accepted = accept_equal(drafted, sampled)
    assert num_accepted.tolist() == [3, 1, 0, 2, 0] and num_accepted.dtype == torch.int64
    assert accept_equal(drafted[:, :0], sampled[:, :1]).tolist() == [0] * 5


def test_a_draft_that_is_not_drawn_leaves_the_text_of_plain_decoding():
    """Prompt lookup at a temperature: the bits are those that plain decoding uses at each place."""
    seed, rows = torch.arange(300), torch.arange(300)
    plain = [torch.zeros(300, dtype=torch.int64)]
    for place in range(1, 5):
        plain.append(draw(NEXT[plain[-1]], uniform(seed, rows + place, PURPOSE_SAMPLE)))
    text = torch.stack(plain, 1)
    drafted = torch.where(torch.rand(300, 3) < 0.6, text[:, 1:4], torch.randint(4, (300, 3)))
    before = torch.cat([text[:, :1], drafted], 1)
    sampled = torch.stack(
        [draw(NEXT[before[:, j]], uniform(seed, rows + j + 1, PURPOSE_SAMPLE)) for j in range(4)],
        1,
    )
    num_accepted = accept_equal(drafted, sampled)
    is_new = torch.arange(4) <= num_accepted[:, None]
    assert torch.equal(sampled[is_new], text[:, 1:][is_new])
    assert set(num_accepted.tolist()) == {0, 1, 2, 3}


def test_acceptance_is_one_graph_without_a_look_at_a_tensor():
    q, p = torch.rand(2, 3, 5).softmax(-1), torch.rand(2, 4, 5).softmax(-1)
    drafted, positions = torch.tensor([[1, 2, -1], [0, 4, 4]]), torch.arange(4).expand(2, -1)
    arguments = (drafted, q, p, torch.tensor([3, 4]), positions)
    compiled = torch.compile(accept_by_rejection, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(*arguments), accept_by_rejection(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---- prompt lookup ----


def search(text: list[int], num_tokens: int) -> tuple[list[int], int]:
    """`NgramIndex.propose` by looking everywhere."""
    for length in range(min(MAX_MATCH, len(text) - 1), 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                candidate = list(text)
                for i in range(num_tokens):
                    candidate.append(candidate[start + length + i])
                return candidate[len(text) :], length
    return [], 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=6),
    num_tokens=st.integers(0, 9),
    offset=st.sampled_from([0, 255, 2**32 - 3]),
)
def test_lookup_is_a_search(pieces, num_tokens, offset):
    index, text = NgramIndex(), []
    for piece in pieces:
        ids = [offset + i for i in piece]
        index.extend(ids)
        text += ids
        assert index.propose(num_tokens) == search(text, num_tokens)


def test_lookup_prefers_long_matches_then_late_ones_and_goes_on_with_a_period():
    index = NgramIndex()
    assert index.propose(3) == ([], 0)
    index.extend([1, 2, 3, 9, 2, 4])
    assert index.propose(3) == ([], 0)
    index.extend([2])
    assert index.propose(2) == ([4, 2], 1)  # the later of two
    index.extend([3])
    assert index.propose(3) == ([9, 2, 4], 2)  # not what stood behind a 3 alone
    index.clear()
    index.extend(range(100, 150))
    index.extend([7, 8, 7, 8])
    assert index.propose(5) == ([7, 8, 7, 8, 7], 2)
    index.extend([7, 8, 7, 8])
    assert index.propose(3) == ([7, 8, 7], MAX_MATCH)
    index.clear()
    index.extend([7])
    assert index.propose(3) == ([], 0)


def test_lookup_takes_a_text_token_by_token_or_as_a_whole():
    text = torch.randint(3, (400,)).tolist()
    whole, single = NgramIndex(), NgramIndex()
    whole.extend(text)
    for token in text:
        single.extend([token])
    for token in range(3):
        for index in (whole, single):
            index.extend([token, 0, 1, token])
        assert whole.propose(20) == single.propose(20)


# ---- statistics ----


def test_statistics_by_hand():
    stats = SpeculationStats("a draft", plain_step_s=0.1)
    empty = stats.as_dict()
    assert empty["acceptance"] is empty["mean_accepted_length"] is empty["speedup"] is None
    assert empty["draft_cost"] is None and empty["acceptance_by_position"] == []
    stats.add(3, [(0, 3, 3), (0, 3, 1)], 0.06, 0.12)
    stats.add(5, [(0, 2, 0), (0, 4, 4)], 0.08, 0.14)
    stats.add(0, [(0, 0, 0), (0, 0, 0)], 0.0, 0.1)
    stats.add(2, [], 1.0, 1.0)
    numbers = stats.as_dict()
    assert (numbers["rounds"], numbers["plain_steps"]) == (2, 1)
    assert (numbers["drafted"], numbers["accepted"]) == (12, 8)
    assert numbers["acceptance"] == pytest.approx(8 / 12)
    assert stats.by_position == [(4, 3), (3, 2), (2, 2), (1, 1)]
    assert numbers["acceptance_by_position"] == pytest.approx([3 / 4, 2 / 3, 1, 1])
    assert numbers["mean_accepted_length"] == pytest.approx((4 + 2 + 1 + 5) / 4)
    assert numbers["draft_s"] == pytest.approx(0.14) and numbers["verify_s"] == pytest.approx(0.26)
    assert numbers["draft_cost"] == pytest.approx(0.7)
    assert numbers["verify_cost"] == pytest.approx(1.3)
    # Two rows took 3 + 3 + 1 plain steps' worth of tokens each.
    assert numbers["speedup"] == pytest.approx(7 * 0.1 / 0.5)
    never = SpeculationStats("a draft")
    never.add(2, [(0, 2, 1)], 0.1, 0.1)
    assert never.as_dict()["speedup"] is never.as_dict()["verify_cost"] is None
