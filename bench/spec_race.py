"""The measuring half of bench/speculation.py: engines over one loaded model, plain and speculating,
that take turns at the same prompts. Prints nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from gptfast.engine import Engine
from gptfast.requests import Event
from gptfast.sampling import SamplingParams
from gptfast.stats import RequestStats

PLAIN = "plain"


@dataclass(frozen=True)
class Work:
    """Prompts that are continued one after the other, and how."""

    name: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0


@dataclass
class Racer:
    """An engine and what its turns have come to: of each work one entry a round."""

    name: str
    engine: Engine
    turns: dict[str, list["Turn"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """All prompts of one work continued once. `seconds` run from the first token of each to its
    last, and `num_tokens` are those behind the first. `speculation` as SpeculationStats has it,
    with the seconds that no draft, verification or plain step took as `rest_s`.
    """

    num_tokens: int
    seconds: float
    read_bandwidth: float
    token_ids: list[list[int]]
    speculation: dict[str, Any] | None

    @property
    def tok_s(self) -> float:
        return self.num_tokens / self.seconds


def race(
    racers: Sequence[Racer], works: Sequence[Work], num_rounds: int, probe: Callable[[], float]
) -> None:
    """Rounds of every work for every racer, with a probe of the memory (bytes/s) before and after
    each turn. The first round is short and not counted.
    """
    for racer in racers:
        for work in works:
            take_turn(racer.engine, Work(work.name, work.prompts[:1], work.params))
    before = probe()
    for _ in range(num_rounds):
        for work in works:
            for racer in racers:
                tokens, stats = take_turn(racer.engine, work)
                after = probe()
                turn = _turn(racer.engine, tokens, stats, (before + after) / 2)
                racer.turns.setdefault(work.name, []).append(turn)
                before = after


def take_turn(engine: Engine, work: Work) -> tuple[list[list[int]], list[RequestStats]]:
    """The new tokens of each prompt, and what each took."""
    engine.warm_up([work.params])
    engine.reset_counters()
    engine.forget()
    tokens, stats = [], []
    for prompt in work.prompts:
        engine.submit(prompt, work.params)
        events: list[Event] = []
        while engine.has_work:
            events += engine.step()
        tokens.append([token for event in events for token in event.token_ids])
        stats.append(events[-1].stats)
    return tokens, stats


def _turn(
    engine: Engine, tokens: list[list[int]], stats: Sequence[RequestStats], bandwidth: float
) -> Turn:
    seconds = sum(each.token_times[-1] - each.token_times[0] for each in stats)
    speculation = None
    if (found := engine.speculation) is not None:
        rest_s = seconds - found.draft_s - found.verify_s - found.plain_s
        speculation = {**found.as_dict(), "plain_s": found.plain_s, "rest_s": rest_s}
    num_tokens = sum(len(each.token_times) - 1 for each in stats)
    return Turn(num_tokens, seconds, bandwidth, tokens, speculation)


def figures(racer: Racer, plain: Racer, work: Work) -> dict[str, Any]:
    """Of one racer at one work, medians over the rounds. `speedup` compares turns of one round;
    costs are in plain steps of the same round, for each round of speculation.
    """
    pairs = list(zip(racer.turns[work.name], plain.turns[work.name], strict=True))
    found: dict[str, Any] = {
        "tok_s": median(turn.tok_s for turn, _ in pairs),
        "speedup": median(turn.tok_s / beside.tok_s for turn, beside in pairs),
        "read_bandwidth_gb_s": median(turn.read_bandwidth for turn, _ in pairs) / 1e9,
        "per_round": [
            {
                "tok_s": turn.tok_s,
                "plain_tok_s": beside.tok_s,
                "num_tokens": turn.num_tokens,
                "read_bandwidth_gb_s": turn.read_bandwidth / 1e9,
            }
            for turn, beside in pairs
        ],
    }
    if racer is plain:
        return found
    if work.is_greedy:
        found["equal_tokens"] = min(equal_tokens(t.token_ids, p.token_ids) for t, p in pairs)
    spoken = [turn.speculation for turn, _ in pairs if turn.speculation is not None]
    for name in ("mean_accepted_length", "acceptance"):
        values = [each[name] for each in spoken if each[name] is not None]
        found[name] = median(values) if values else None
    for name in ("draft", "verify", "rest"):
        costs = [
            turn.speculation[f"{name}_s"] / turn.speculation["rounds"] * beside.tok_s
            for turn, beside in pairs
            if turn.speculation and turn.speculation["rounds"]
        ]
        found[f"{name}_cost"] = median(costs) if costs else None
    found["acceptance_by_position"] = by_position(spoken)
    found["drafted_share"] = median(
        each["rounds"] / max(1, each["rounds"] + each["plain_steps"]) for each in spoken
    )
    found["note"] = spoken[-1]["note"]
    found["last_round"] = spoken[-1]
    return found


def by_position(spoken: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Acceptance at each drafted place, given all before it: medians over the rounds."""
    most = max((len(each["acceptance_by_position"]) for each in spoken), default=0)
    found: list[float | None] = []
    for place in range(most):
        values = [
            each["acceptance_by_position"][place]
            for each in spoken
            if place < len(each["acceptance_by_position"])
            and each["acceptance_by_position"][place] is not None
        ]
        found.append(median(values) if values else None)
    return found


def equal_tokens(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Share of the tokens before the first one that differs, over all prompts."""
    same = total = 0
    for ours, theirs in zip(tokens, others, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=False))
        same += next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        total += max(len(ours), len(theirs))
    return same / max(1, total)
