"""How many tokens to draft in the next round: from measured acceptance and measured cost, down to
none where speculation loses.

Knows counts and seconds; no tensors, no models. The rule, per round: the k that maximises

    sum over rows of E[new tokens | k, kind of the row's draft] / cost(k)

where E = 1 + a1 + a1 a2 + ... + a1 ... ak, a_i being the chance that the i-th drafted token is
accepted once all before it are (`Acceptance`), and cost(k) is the time of k draft steps and a
verification of k tokens in plain steps, cost(0) = 1 (`Costs`).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median_low

# Priors of the first place, worth PRIOR_WEIGHT observations. A draft model's is a middling one's.
# Prompt lookup's are what was measured on five kinds of text behind matches of 1, 2, ... tokens
# (ngram.MAX_MATCH); its kind 0 drafts nothing.
MODEL_PRIORS = (0.7,)
LOOKUP_PRIORS = (0.0, 0.16, 0.28, 0.39, 0.51, 0.72)
LATER_PRIOR = 0.8  # of places behind an accepted one
PRIOR_WEIGHT = 2.0
KEPT = 0.95  # of the counts at each observation: about 20 of them matter

# What drafting must promise over plain steps: costs are known to a few percent.
WORTHWHILE = 1.02

# A kind that loses rests for a number of rounds, then is tried again for a few.
TRIAL_ROUNDS = 3
KEPT_AFTER_REST = 0.25
FIRST_REST = 32
LONGEST_REST = 1024

# A plain step among rounds that draft, so that both costs are known of one and the same time: after
# this many rounds, then twice as many and so on.
FIRST_PLAIN = 4
RAREST_PLAIN = 64


class Controller:
    """Chooses k for each round. `fixed_k`: always that k. `is_lookup`: kinds are lengths of a match
    (0 = nothing to draft); otherwise every row's kind is 0.
    """

    def __init__(self, max_k: int, fixed_k: int | None = None, is_lookup: bool = False) -> None:
        if max_k < 1:
            raise ValueError(f"max_k = {max_k} must be at least 1")
        if fixed_k is not None and not 0 <= fixed_k <= max_k:
            raise ValueError(f"fixed_k = {fixed_k} must be from 0 to max_k = {max_k}")
        priors = LOOKUP_PRIORS if is_lookup else MODEL_PRIORS
        self._max_k, self._fixed_k, self._is_lookup = max_k, fixed_k, is_lookup
        self._costs = Costs(max_k)
        self._kinds = [Kind(Acceptance(prior, max_k)) for prior in priors]
        self._num_tokens = 0
        self._off_since: int | None = None
        self._since_plain, self._plain_after = 0, FIRST_PLAIN
        self._k = 0  # the last that was drafted
        self._drafted = self._accepted = 0.0  # fading

    def calibrated(
        self, plain_s: float, draft_step_s: float, verify_s: Mapping[int, float]
    ) -> None:
        """Seconds of a plain step, of a draft step and of verifying k tokens for some k; between
        them and beyond, straight lines that never fall."""
        self._costs.calibrated(plain_s, draft_step_s, verify_s)

    def choose(self, kinds: Sequence[int]) -> int:
        """k for a round with rows of these kinds; 0 = a plain step."""
        if self._fixed_k is not None:
            return self._fixed_k
        drafting = [kind for kind in map(self._kind, kinds) if kind is not None]
        num_still = len(kinds) - len(drafting)
        awake = [kind.acceptance.expected for kind in drafting if not kind.rest]
        num_still += len(drafting) - len(awake)
        k = self._best(awake, num_still)
        if any(kind.trial for kind in drafting):
            k = max(k, 1)
        return 0 if self._since_plain >= self._plain_after else k

    def observe(
        self, k: int, outcomes: Sequence[tuple[int, int, int]], draft_s: float, verify_s: float
    ) -> None:
        """A round: k, of each row its kind, how many drafted tokens could be accepted and how many
        were, and its seconds. k = 0 is a plain step of verify_s."""
        self._num_tokens += sum(1 + num_accepted for _, _, num_accepted in outcomes)
        self._costs.observe(k, draft_s + verify_s)
        if k == 0:
            if self._since_plain >= self._plain_after:
                self._plain_after = min(2 * self._plain_after, RAREST_PLAIN)
            self._since_plain = 0
        else:
            self._since_plain += 1
            self._k = k
            self._drafted *= KEPT
            self._accepted *= KEPT
        cost = self._costs.of(k)
        seen = set()
        for number, num_drafted, num_accepted in outcomes:
            kind = self._kind(number)
            if kind is None:
                continue
            seen.add(kind)
            if k and num_drafted:
                self._drafted += num_drafted
                self._accepted += num_accepted
                kind.acceptance.observe(num_drafted, num_accepted)
                kind.gain += 1 + num_accepted - cost
        for kind in seen:
            kind.pass_round(k > 0, self._best([kind.acceptance.expected], 0) > 0)
        self._note_off()

    def _kind(self, number: int) -> "Kind | None":
        if self._is_lookup and number == 0:
            return None
        return self._kinds[min(number, len(self._kinds) - 1)]

    def _best(self, expected: Sequence[Sequence[float]], num_still: int) -> int:
        """The k of most tokens per second for rows with these expectations, and others that gain
        nothing from a draft."""
        best, most = 0, WORTHWHILE * (len(expected) + num_still)
        for k in range(1, self._max_k + 1):
            rate = (sum(tokens[k] for tokens in expected) + num_still) / self._costs.of(k)
            if rate > most:
                best, most = k, rate
        return best

    def _note_off(self) -> None:
        tried = [kind for kind in self._kinds if kind.was_tried]
        if not tried or not all(kind.rest or kind.trial for kind in tried):
            self._off_since = None
        elif self._off_since is None:
            self._off_since = self._num_tokens

    @property
    def is_off(self) -> bool:
        """Whether all kinds of drafts that were seen lose, and are tried only now and then."""
        return self._off_since is not None

    def reason(self) -> str:
        if not self._drafted:
            return "nothing has been drafted"
        share = f"{self._accepted / self._drafted:.0%} of drafted tokens were accepted"
        cost = f"{self._k} drafted in a round cost {self._costs.of(self._k):.2f} plain steps"
        if self.is_off:
            return f"speculation is off since token {self._off_since}: {share}, and {cost}"
        return f"speculation is on: {share}, and {cost}"


class Kind:
    """Drafts of one degree of confidence: their acceptance, and whether they pay."""

    def __init__(self, acceptance: "Acceptance") -> None:
        self.acceptance = acceptance
        self.was_tried = False
        self.rest = self.trial = 0  # rounds left
        self.gain = 0.0  # since it last woke, in plain steps
        self._next_rest = FIRST_REST

    def pass_round(self, is_drafted: bool, pays: bool) -> None:
        """A round with rows of this kind is over; `pays`: some k is better than none."""
        self.was_tried |= is_drafted
        if self.rest:
            self.rest = 0 if pays and is_drafted else self.rest - 1
            if self.rest == 0 and not pays:
                self.trial, self.gain = TRIAL_ROUNDS, 0.0
                self.acceptance.fade(KEPT_AFTER_REST)
            return
        self.trial = max(0, self.trial - is_drafted)
        if self.trial or pays:
            return
        if self.gain > 0:
            self._next_rest = FIRST_REST
        self.rest = min(max(self._next_rest, math.ceil(-100 * self.gain)), LONGEST_REST)
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        self.gain = 0.0


class Acceptance:
    """How often drafted tokens are accepted, place by place, of late.

    The first place stands for itself; a later one with few observations borrows from all later
    ones, as texts that are copied or easy go on being so.
    """

    def __init__(self, prior: float, max_k: int) -> None:
        self._tried, self._accepted = [0.0] * max_k, [0.0] * max_k
        self._tried[0], self._accepted[0] = PRIOR_WEIGHT, PRIOR_WEIGHT * prior
        self.expected = self._expect()

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        self.fade(KEPT)
        for i in range(min(num_drafted, num_accepted + 1)):
            self._tried[i] += 1
            self._accepted[i] += i < num_accepted
        self.expected = self._expect()

    def fade(self, kept: float) -> None:
        self._tried = [kept * count for count in self._tried]
        self._accepted = [kept * count for count in self._accepted]

    def _expect(self) -> list[float]:
        """Expected new tokens [max_k + 1] of a round with k = 0, 1, ... drafted."""
        later = sum(self._accepted[1:]) + PRIOR_WEIGHT * LATER_PRIOR
        later /= sum(self._tried[1:]) + PRIOR_WEIGHT
        reached = self._accepted[0] / self._tried[0]
        expected = [1.0, 1.0 + reached]
        for tried, accepted in zip(self._tried[1:], self._accepted[1:], strict=True):
            reached *= (accepted + PRIOR_WEIGHT * later) / (tried + PRIOR_WEIGHT)
            expected.append(expected[-1] + reached)
        return expected


class Costs:
    """What a round of k drafted tokens costs, in plain steps.

    A machine's speed changes, so a round is compared only with rounds of a moment ago: the ratio of
    a round to the plain steps just before it (or of rounds to the plain step behind them) corrects
    the calibrated one, as a running median.
    """

    def __init__(self, max_k: int) -> None:
        self._base = [1 + 0.1 * k for k in range(max_k + 1)]  # until calibrated
        self._recent: deque[tuple[int, float]] = deque(maxlen=8)  # k, seconds / base
        self._pooled = deque([1.0, 1.0], maxlen=7)  # measured / base, of any k
        self._own: list[deque[float]] = [deque(maxlen=6) for _ in range(max_k + 1)]
        self._cost = list(self._base)

    def calibrated(
        self, plain_s: float, draft_step_s: float, verify_s: Mapping[int, float]
    ) -> None:
        max_k = len(self._base) - 1
        points = sorted({0: plain_s, **verify_s}.items())
        for i in range(1, len(points)):
            points[i] = (points[i][0], max(points[i][1], points[i - 1][1]))
        verify = [_on_lines(points, k) for k in range(max_k + 1)]
        self._base = [(k * draft_step_s + verify[k]) / plain_s for k in range(max_k + 1)]
        self._update()

    def of(self, k: int) -> float:
        return self._cost[k]

    def observe(self, k: int, seconds: float) -> None:
        speed = seconds / self._base[k]
        other = next((j for j, _ in reversed(self._recent) if (j == 0) != (k == 0)), None)
        if other is not None:
            others = [each for j, each in self._recent if j == other]
            if len(others) >= 3:
                ratio = speed / median_low(others)
                sample, drafted = (ratio, k) if k else (1 / ratio, other)
                sample = max(sample, 0.9)
                self._own[drafted].append(sample)
                self._pooled.append(sample)
                self._update()
        self._recent.append((k, speed))

    def _update(self) -> None:
        pooled = median_low(self._pooled)
        for k in range(1, len(self._base)):
            self._cost[k] = max(1 + 0.02 * k, self._base[k] * median_low([pooled, *self._own[k]]))


def _on_lines(points: Sequence[tuple[int, float]], x: int) -> float:
    """The value at x of the lines through points (sorted), the last one extended."""
    if len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points)) if points[i][0] >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
