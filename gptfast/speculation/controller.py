"""How many tokens to draft in the next round: from measured acceptance and measured cost, down to
none where speculation loses.

Knows counts and seconds; no tensors, no models. The rule, per round: the k that maximises

    sum over rows of E[new tokens | k, kind of the row's draft] / cost(k)

where E = 1 + a1 + a1 a2 + ... + a1 ... ak, a_i being the chance that the i-th drafted token is
accepted once all before it are (`Acceptance`), and cost(k) is the time of k draft steps and a
verification of k tokens in plain steps, cost(0) = 1 (`Costs`).
"""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median_low

# The chance that a first drafted token is accepted, before anything is known; it counts as
# PRIOR_WEIGHT observations. Of a model it is a guess; of prompt lookup it was measured behind
# matches of 1, 2, ... tokens (see ngram.MAX_MATCH).
MODEL_PRIORS = (0.7,)
LOOKUP_PRIORS = (0.0, 0.16, 0.28, 0.39, 0.51, 0.72)
LATER_PRIOR = 0.7  # behind an accepted one
PRIOR_WEIGHT = 2.0
KEPT = 0.95  # of the counts at each observation, so that the last 20 matter
WORTHWHILE = 1.02  # times plain decoding's rate, or nothing is drafted: costs are not exact

# A kind of draft that does not pay is not made for a number of rounds, then for a few to see.
FIRST_REST, LONGEST_REST = 32, 1024
TRIAL_ROUNDS = 3
KEPT_AFTER_REST = 0.25

# Rounds that draft before a plain step shows what one costs now; doubled each time.
FIRST_PLAIN, RAREST_PLAIN = 4, 64

NUM_NEIGHBOURS, ENOUGH_NEIGHBOURS = 8, 3  # rounds that another is compared with
NUM_RATIOS = 7
LEAST_RATIO = 0.9  # to calibrated cost, which idle rows gave; a lower one is a change of speed
LEAST_COST = 0.02  # of a drafted token in plain steps: what cannot be measured is not free


class Controller:
    """Chooses k for each round, up to `max_k`; always `fixed_k` where that is given. `is_lookup`: a
    row's kind is the length of a match, 0 = nothing to draft. Otherwise it is 0.
    """

    def __init__(self, max_k: int, fixed_k: int | None = None, is_lookup: bool = False) -> None:
        if max_k < 1:
            raise ValueError(f"max_k = {max_k} must be at least 1")
        if fixed_k is not None and not 0 <= fixed_k <= max_k:
            raise ValueError(f"fixed_k = {fixed_k} must be from 0 to max_k = {max_k}")
        self._max_k, self._fixed_k, self._is_lookup = max_k, fixed_k, is_lookup
        self._costs = Costs(max_k)
        priors = LOOKUP_PRIORS if is_lookup else MODEL_PRIORS
        self._kinds = [Kind(Acceptance(prior, max_k)) for prior in priors]
        self._since_plain, self._plain_after = 0, FIRST_PLAIN
        self._num_tokens = 0
        self._off_since: int | None = None  # of these tokens
        self._last_k = 1
        self._num_drafted = self._num_accepted = 0.0  # of late

    def calibrated(
        self, plain_s: float, draft_step_s: float, verify_s: Mapping[int, float]
    ) -> None:
        """Seconds of a plain step, of a draft step, and of verifying k tokens for some k; for the
        others straight lines are drawn, never falling.
        """
        self._costs.calibrated(plain_s, draft_step_s, verify_s)

    def choose(self, kinds: Sequence[int]) -> int:
        """k for a round with a row of each of these kinds; 0 = a plain step."""
        if self._fixed_k is not None:
            return self._fixed_k
        if self._since_plain >= self._plain_after:
            return 0
        drafting = Counter(kind for kind in map(self._kind, kinds) if kind is not None)
        k = self._best(drafting, len(kinds))
        return max(k, 1) if any(kind.trial for kind in drafting) else k

    def observe(
        self, k: int, outcomes: Sequence[tuple[int, int, int]], draft_s: float, verify_s: float
    ) -> None:
        """What a round was like: of each row its kind, how many drafted tokens could have been
        accepted, and how many were; and its seconds. k = 0: a plain step, of `verify_s`.
        """
        self._costs.observe(k, draft_s + verify_s)
        self._pass_plain(k == 0)
        if k:
            self._last_k = k
            self._num_drafted *= KEPT
            self._num_accepted *= KEPT
        seen = set()
        for number, num_drafted, num_accepted in outcomes:
            self._num_tokens += 1 + num_accepted
            kind = self._kind(number)
            if kind is None:
                continue
            seen.add(kind)
            if num_drafted:
                self._num_drafted += num_drafted
                self._num_accepted += num_accepted
                kind.acceptance.observe(num_drafted, num_accepted)
                kind.gain += (1 + num_accepted - self._costs.of(k)) / len(outcomes)
        for kind in seen:
            kind.pass_round(k > 0, self._best({kind: 1}, 1) > 0)
        if not all(kind.is_off for kind in self._kinds if kind.is_seen):
            self._off_since = None
        elif seen and self._off_since is None:
            self._off_since = self._num_tokens

    @property
    def is_off(self) -> bool:
        """Whether no draft pays at present: one is made now and then, to see."""
        return self._fixed_k is None and self._off_since is not None

    def reason(self) -> str:
        """One sentence for people."""
        k = self._last_k
        tokens = "1 drafted token costs" if k == 1 else f"{k} drafted tokens cost"
        found = f"{tokens} {self._costs.of(k):.2f} plain steps"
        if self._num_drafted:
            share = self._num_accepted / self._num_drafted
            found = f"{share:.0%} of drafted tokens were accepted, and {found}"
        if self._fixed_k is not None:
            return f"k is fixed at {self._fixed_k}: {found}"
        if self.is_off:
            return f"speculation is off since token {self._off_since}: {found}"
        return f"speculation is on: {found}"

    def _kind(self, number: int) -> "Kind | None":
        if self._is_lookup and number == 0:
            return None
        return self._kinds[min(number, len(self._kinds) - 1)]

    def _best(self, drafting: "Mapping[Kind, int]", num_rows: int) -> int:
        """The k of most tokens per second for `num_rows` rows, of which so many of each kind draft
        and the others take one token whatever k is.
        """
        weighted = [(n, kind.acceptance.expected) for kind, n in drafting.items()]
        best, most = 0, WORTHWHILE * num_rows
        for k in range(1, self._max_k + 1):
            num_tokens = num_rows + sum(n * (expected[k] - 1) for n, expected in weighted)
            rate = num_tokens / self._costs.of(k)
            if rate > most:
                best, most = k, rate
        return best

    def _pass_plain(self, is_plain: bool) -> None:
        if not is_plain:
            self._since_plain += 1
            return
        if self._since_plain >= self._plain_after:
            self._plain_after = min(2 * self._plain_after, RAREST_PLAIN)
        self._since_plain = 0


class Kind:
    """Drafts of one degree of confidence: how they fare, and whether they are made."""

    def __init__(self, acceptance: "Acceptance") -> None:
        self.acceptance = acceptance
        self.is_seen = False
        self.rest = self.trial = 0  # rounds left of either
        self.gain = 0.0  # plain steps a row, since it last woke
        self._next_rest = FIRST_REST

    @property
    def is_off(self) -> bool:
        return bool(self.rest or self.trial)

    def pass_round(self, is_drafted: bool, pays: bool) -> None:
        """A round with rows of this kind is over. `pays`: for them alone, some k beats none."""
        self.is_seen = True
        if self.rest:
            is_good = is_drafted and pays  # drafted for the sake of other rows
            self.rest = 0 if is_good else self.rest - 1
            if self.rest == 0:
                self.gain = 0.0
                self.trial = 0 if is_good else TRIAL_ROUNDS
                self.acceptance.fade(KEPT_AFTER_REST)
            return
        self.trial = max(0, self.trial - is_drafted)
        if self.trial or pays:
            return
        if self.gain > 0:
            self._next_rest = FIRST_REST
        # What has been lost shall be under a percent of the rounds until the next loss.
        self.rest = min(max(self._next_rest, math.ceil(-100 * self.gain)), LONGEST_REST)
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)


class Acceptance:
    """How often drafted tokens have been accepted of late, place by place.

    The first place stands for itself. A later one with few observations borrows from all later
    ones: a text that is easy, or copied, goes on being so.
    """

    def __init__(self, prior: float, max_k: int) -> None:
        self._tried, self._accepted = [0.0] * max_k, [0.0] * max_k
        self._tried[0], self._accepted[0] = PRIOR_WEIGHT, PRIOR_WEIGHT * prior
        self._expected: list[float] | None = None

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """One row's draft, of at least one token."""
        self.fade(KEPT)
        for i in range(min(num_drafted, num_accepted + 1)):
            self._tried[i] += 1
            self._accepted[i] += i < num_accepted

    def fade(self, kept: float) -> None:
        self._tried = [kept * count for count in self._tried]
        self._accepted = [kept * count for count in self._accepted]
        self._expected = None

    @property
    def expected(self) -> list[float]:
        """E[new tokens] [max_k + 1] with k = 0, 1, ... drafted."""
        if self._expected is None:
            self._expected = self._expect()
        return self._expected

    def _expect(self) -> list[float]:
        later = sum(self._accepted[1:]) + PRIOR_WEIGHT * LATER_PRIOR
        later /= sum(self._tried[1:]) + PRIOR_WEIGHT
        reached = self._accepted[0] / self._tried[0]
        expected = [1.0, 1.0 + reached]
        for tried, accepted in zip(self._tried[1:], self._accepted[1:], strict=True):
            reached *= (accepted + PRIOR_WEIGHT * later) / (tried + PRIOR_WEIGHT)
            expected.append(expected[-1] + reached)
        return expected


class Costs:
    """What a round with k drafted tokens costs, in plain steps.

    A machine's speed changes by the minute, so a round is compared only with rounds just before it:
    one that drafts with plain steps, a plain step with some that draft. The running median of such
    ratios corrects the calibrated costs.
    """

    def __init__(self, max_k: int) -> None:
        self._base = [1 + 0.1 * k for k in range(max_k + 1)]  # until calibrated
        self._recent: deque[tuple[int, float]] = deque(maxlen=NUM_NEIGHBOURS)  # k, seconds / base
        # Ratios over base: of every k together, begun as calibrated, and of each k.
        self._all: deque[float] = deque([1.0], maxlen=NUM_RATIOS)
        self._each: list[deque[float]] = [deque(maxlen=NUM_RATIOS) for _ in self._base]
        self._cost = self._corrected()

    def calibrated(
        self, plain_s: float, draft_step_s: float, verify_s: Mapping[int, float]
    ) -> None:
        known = {**verify_s, 0: plain_s}
        if not all(time > 0 for time in known.values()) or not draft_step_s >= 0:
            found = f"plain_s = {plain_s}, draft_step_s = {draft_step_s}, verify_s = {verify_s}"
            raise ValueError(f"times must be above 0 seconds (a draft step's may be 0): {found}")
        places = sorted(known)
        times = list(accumulate((known[k] for k in places), max))
        self._base = [
            (k * draft_step_s + _on_lines(places, times, k)) / plain_s
            for k in range(len(self._base))
        ]
        self._cost = self._corrected()

    def of(self, k: int) -> float:
        return self._cost[k]

    def observe(self, k: int, seconds: float) -> None:
        if seconds <= 0:  # a clock too coarse to say
            return
        time = seconds / self._base[k]
        others = [(j, each) for j, each in self._recent if (j == 0) != (k == 0)]
        if len(others) >= ENOUGH_NEIGHBOURS:
            typical = median_low(each for _, each in others)
            ratio = time / typical if k else typical / time
            for ratios in (self._all, self._each[k or others[-1][0]]):
                ratios.append(max(ratio, LEAST_RATIO))
            self._cost = self._corrected()
        self._recent.append((k, time))

    def _corrected(self) -> list[float]:
        shared = median_low(self._all)
        costs = [1.0]
        for k, ratios in enumerate(self._each[1:], start=1):
            # The lower median: a ratio of its own counts once a second one confirms it.
            cost = self._base[k] * median_low([shared, *ratios])
            costs.append(max(cost, 1 + LEAST_COST * k))
        return costs


def _on_lines(places: Sequence[int], times: Sequence[float], k: int) -> float:
    """The time at k on the lines through (place, time), the last line going on."""
    if len(places) == 1:
        return times[0]
    i = next((i for i in range(1, len(places)) if places[i] >= k), len(places) - 1)
    slope = (times[i] - times[i - 1]) / (places[i] - places[i - 1])
    return times[i] + slope * (k - places[i])
