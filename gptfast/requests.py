"""Requests on the host, and the events of their tokens: what goes into an engine and comes out."""

from dataclasses import dataclass, field
from typing import Literal

from gptfast.sampling import SamplingParams
from gptfast.stats import RequestStats

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of the chosen token under the unmodified model, and likely alternatives."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Event:
    """New tokens of one request, its statistics so far, and with its last event why it ends."""

    request_id: int
    token_ids: tuple[int, ...]
    stats: RequestStats
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """A request on the host: `num_prefilled` prompt tokens are in the cache, `num_dispatched` new
    ones have been asked of the device, `num_drafted` more may come of it, `budget` are allowed.
    """

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    budget: int
    stats: RequestStats
    row: int = -1
    num_prefilled: int = 0
    num_dispatched: int = 0
    num_drafted: int = 0
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    reread: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of its row's text on the device, which may be ahead of what the host knows; with
        drafted tokens under way, the most that it may be.
        """
        return len(self.prompt_ids) + self.num_dispatched + self.num_drafted

    @property
    def decoding(self) -> bool:
        """In a row, its prompt read, with tokens still to be asked for."""
        return not self.finished and 0 < self.num_dispatched < self.budget
