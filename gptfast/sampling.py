"""From logits to tokens: what a request asks for, its state per row, and the mathematics.

Knows logits [B, V] and token ids; knows nothing of models, text or who calls. Everything below
`SamplingState` is pure, works row by row (no row sees another), has no branch on a tensor and no
host sync, so that greedy and sampled rows mix in one batch and one compiled graph serves all
values. Random bits are a function of (seed, position, purpose) alone.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Plan = Literal["greedy", "plain", "full"]
PLANS: tuple[Plan, ...] = ("greedy", "plain", "full")

MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # a temperature this small is 0: every other token's weight underflows
PURPOSE_SAMPLE = 0  # `purpose` of the one uniform that picks a token; others are free


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Checks itself: a wrong value is a ValueError (a wrong type a
    TypeError) that names field, value and range.

    The order of operations: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, temperature, top_k, top_p (of what top_k kept), min_p.

    max_new_tokens      1 or more; None = until the context ends
    temperature         0 to 100; 0 (below 1e-5) = the most likely token, ties to the lowest id
    top_k               1 or more: keep the k most likely; 0 or -1 = off
    top_p               above 0, up to 1: keep the smallest set with at least this probability
    min_p               0 to 1: keep tokens at least this likely relative to the most likely one
    repetition_penalty  0.01 to 100: divides positive and multiplies negative logits of tokens in
                        the prompt or the output (Keskar et al., 1909.05858); 1 = off
    presence_penalty    -2 to 2: subtracted once from the logit of tokens in the output
    frequency_penalty   -2 to 2: subtracted once per occurrence in the output
    logit_bias          token id -> -100 to 100, added to the logit
    stop                text, or several, that ends the output and is not part of it
    stop_token_ids      ids that end the output, besides the model's own end tokens
    ignore_eos          the model's own end tokens do not end the output
    n                   1 to 1024: outputs for each prompt
    seed                0 to 2**63 - 1; None = a fresh one
    logprobs            0 to 20: alternatives reported for each token (0 = only the chosen token);
                        None = no log probabilities
    """

    max_new_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: str | Sequence[str] = ()  # always a tuple once constructed, as is the next
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                put(name, _integer(name, value, low, high))
        for name, low, high in _REALS:
            put(name, _real(name, getattr(self, name), low, high))
        if self.top_p == 0:
            raise ValueError(
                "top_p = 0 keeps no token; it must be above 0 and at most 1"
                " (for the most likely token use temperature = 0)"
            )
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos = {self.ignore_eos!r} must be True or False")
        put("logit_bias", _bias(self.logit_bias))
        put("stop", _stop(self.stop))
        put("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))

    def validate_for(self, vocab_size: int) -> None:
        """ValueError when a token id named here is not below vocab_size."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            outside = [token for token in ids if token >= vocab_size]
            if outside:
                raise ValueError(
                    f"{name} names token id {outside[0]}; this model has ids 0 to {vocab_size - 1}"
                )

    @property
    def plan(self) -> Plan:
        """The cheapest graph that does what is asked."""
        adjusted = (
            bool(self.logit_bias)
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )
        if not adjusted and self.temperature < GREEDY_BELOW:
            return "greedy"
        truncated = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return "full" if adjusted or truncated else "plain"


_INTEGERS = (
    ("max_new_tokens", 1, 2**31 - 1),
    ("top_k", -1, 2**31 - 1),
    ("n", 1, 1024),
    ("seed", 0, 2**63 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
)
_OPTIONAL = ("max_new_tokens", "seed", "logprobs")
_REALS = (
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} = {value!r} must be a whole number from {low} to {high}")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"{name} = {value!r} must be from {low} to {high}")
    return operator.index(value)


def _real(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} = {value!r} must be a number from {low} to {high}")
    if not low <= value <= high:  # also false for NaN
        raise ValueError(f"{name} = {value!r} must be from {low} to {high}")
    return float(value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} = {value!r} must be a list of token ids")
    return tuple(_integer(f"a token id in {name}", token, 0, 2**31 - 1) for token in value)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias = {value!r} must map token ids to numbers from -100 to 100")
    ids = _ids("logit_bias", tuple(value))
    return {
        token: _real(f"logit_bias[{token}]", bias, -100, 100)
        for token, bias in zip(ids, value.values(), strict=True)
    }


def _stop(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"stop = {value!r} must be a text or a list of texts")
    if "" in texts:
        raise ValueError(f"stop = {value!r} contains an empty text, which would stop at once")
    return tuple(texts)


class SamplingState:
    """Sampling parameters of B rows as device tensors whose addresses never change.

    Idle rows are greedy. Of the three plans, each a graph of its own that serves every value:
    "greedy" is argmax alone, "plain" adds temperature and the draw, "full" does everything.
    `count` is needed only under "full": no other plan reads the counts.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        def rows(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((num_rows, *shape), value, dtype=dtype, device=device)

        self.temperature = rows(0, torch.float32)
        self.top_k = rows(0, torch.int64)
        self.top_p = rows(1, torch.float32)
        self.min_p = rows(0, torch.float32)
        self.repetition_penalty = rows(1, torch.float32)
        self.presence_penalty = rows(0, torch.float32)
        self.frequency_penalty = rows(0, torch.float32)
        self.seed = rows(0, torch.int64)
        self.bias = rows(0, torch.float32, vocab_size)
        self.prompt_seen = rows(0, torch.bool, vocab_size)
        self.output_counts = rows(0, torch.int32, vocab_size)
        self._plans = [0] * num_rows  # on the host, shared with the views of `row`
        self._rows = range(num_rows)

    def row(self, row: int) -> "SamplingState":
        """Row `row` as a state of one row, which shares its memory and its plan."""
        view = object.__new__(SamplingState)
        for name, value in vars(self).items():
            setattr(view, name, value[row : row + 1] if isinstance(value, Tensor) else value)
        view._rows = self._rows[row : row + 1]
        return view

    def tensors(self) -> dict[str, Tensor]:
        """Every device tensor by name, e.g. to mark their addresses static for CUDA graphs."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def plan(self) -> Plan:
        """The cheapest plan that serves all rows."""
        return PLANS[max(self._plans[row] for row in self._rows)]

    def set_row(
        self, row: int, params: SamplingParams, prompt_ids: Sequence[int] | Tensor, seed: int
    ) -> None:
        """Give a row to a request; its output is empty so far."""
        vocab_size = self.bias.shape[1]
        params.validate_for(vocab_size)
        prompt = torch.as_tensor(prompt_ids, dtype=torch.int64)
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
            raise ValueError(f"prompt_ids go outside this model's ids, 0 to {vocab_size - 1}")
        self.clear_row(row)
        greedy = params.temperature < GREEDY_BELOW
        self.temperature[row] = 0.0 if greedy else params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.repetition_penalty[row] = params.repetition_penalty
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.seed[row] = seed
        for token, bias in params.logit_bias.items():
            self.bias[row, token] = bias
        self.prompt_seen[row, prompt.to(self.bias.device)] = True
        self._plans[self._rows[row]] = PLANS.index(params.plan)

    def clear_row(self, row: int) -> None:
        """Make a row idle: greedy and without any adjustment."""
        for name, value in self.tensors().items():
            value[row] = 1 if name in ("top_p", "repetition_penalty") else 0
        self._plans[self._rows[row]] = 0

    def count(self, tokens: Tensor, active: Tensor) -> None:
        """Add tokens [B] to the output of the rows where active [B] is true."""
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        ones = active.to(torch.int32)
        self.output_counts.index_put_((rows, tokens), ones, accumulate=True)


def sample(logits: Tensor, state: SamplingState, positions: Tensor, plan: Plan = "full") -> Tensor:
    """Next tokens [B] from logits [B, V]; positions [B] index the random bits.

    The plan may do more than a row needs, never less: pass `state.plan()`.
    """
    if plan == "greedy":
        return first_argmax(logits.float())
    return draw(weights(logits, state, plan), uniform(state.seed, positions, PURPOSE_SAMPLE))


def probabilities(logits: Tensor, state: SamplingState, plan: Plan = "full") -> Tensor:
    """The distribution [B, V] that `sample` draws from, one-hot where the temperature is 0."""
    unscaled = weights(logits, state, plan)
    return unscaled / unscaled.sum(-1, keepdim=True, dtype=torch.float64).float()


def weights(logits: Tensor, state: SamplingState, plan: Plan = "full") -> Tensor:
    """Probabilities [B, V] before division by their sum: the most likely token has 1."""
    x = adjust(logits, state) if plan == "full" else logits.float()
    greedy = (state.temperature == 0)[:, None]
    temperature = torch.where(greedy, 1, state.temperature[:, None])
    scaled = (x - x.amax(-1, keepdim=True)) / temperature  # at most 0: cannot overflow to inf
    if plan == "full":
        scaled = truncate(scaled, state.top_k, state.top_p, state.min_p)
    one_hot = torch.arange(x.shape[-1], device=x.device) == first_argmax(x)[:, None]
    return torch.where(greedy, one_hot.float(), scaled.exp())


def adjust(logits: Tensor, state: SamplingState) -> Tensor:
    """Logits [B, V] after bias and penalties, float32."""
    x = logits.float() + state.bias
    in_output = state.output_counts > 0
    repetition = state.repetition_penalty[:, None]
    penalised = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where(state.prompt_seen | in_output, penalised, x)
    x = x - state.presence_penalty[:, None] * in_output
    return x - state.frequency_penalty[:, None] * state.output_counts


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [B, V], already divided by temperature, with -inf where a token is cut off.

    top_k [B] (below 1 = off), then top_p [B] of the mass that is left (Holtzman et al.,
    1904.09751; 1 = off), then min_p [B] relative to the largest (2407.01082). Tokens that tie
    with the last one kept are all kept, so no set depends on the order of ids. Masses are summed
    in float64: the set is the same however the sum is split (eager, compiled, any B).
    """
    x = logits.float()
    vocab_size = x.shape[-1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)[:, None]
    p = top_p.double()[:, None]
    find = _threshold_by_search if torch.compiler.is_compiling() else _threshold_by_sort
    threshold = find(x, k, p)
    likely = (x - x.amax(-1, keepdim=True)).exp() >= min_p[:, None]
    return torch.where((x >= threshold) & likely, x, -math.inf)


def _threshold_by_sort(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The smallest logit [B, 1] that top-k [B, 1] and top-p [B, 1] keep. The plain twin of
    `_threshold_by_search`, and the faster one without a compiler."""
    ordered = x.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, k - 1)
    mass = torch.where(ordered >= kth, (ordered - ordered[:, :1]).exp(), 0)
    mass = mass.cumsum(-1, dtype=torch.float64)
    num_below = (mass < p * mass[:, -1:]).sum(-1, keepdim=True)
    return torch.where(p < 1, ordered.gather(-1, num_below), kth)


def _threshold_by_search(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """What `_threshold_by_sort` finds, without a sort: see `_search`."""
    kth = _search(x, torch.ones_like(x), k.double())
    mass = torch.where(x >= kth, (x - x.amax(-1, keepdim=True)).exp(), 0)
    # The largest weight is 1: any need up to 1 means that one, and 0 would mean none.
    need = (p * mass.sum(-1, keepdim=True, dtype=torch.float64)).clamp(min=1)
    return torch.where(p < 1, _search(x, mass, need), kth)


def _search(x: Tensor, mass: Tensor, need: Tensor) -> Tensor:
    """The largest threshold [B, 1] with mass[x >= threshold].sum() >= need [B, 1], exactly.

    The bits of a float, seen as an integer (negative ones reversed), keep the order of floats;
    so two bits of the answer are found in each of 16 passes over x and mass.
    """
    low = torch.full_like(need, -(2**31), dtype=torch.int64)
    width = torch.full_like(low, 2**30)
    for _ in range(16 // _PASSES):
        low, width = _narrow(x, mass, need, low, width)
    return _float_of_key(low)


_PASSES = 4


@torch.compiler.nested_compile_region
def _narrow(
    x: Tensor, mass: Tensor, need: Tensor, low: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:
    for _ in range(_PASSES):
        num_true = torch.zeros_like(low)
        for step in (1, 2, 3):  # three sums that the compiler makes in one loop
            kept = torch.where(x >= _float_of_key(low + step * width), mass, 0)
            num_true = num_true + (kept.sum(-1, keepdim=True, dtype=torch.float64) >= need)
        low, width = low + num_true * width, width >> 2
    return low, width


def _float_of_key(key: Tensor) -> Tensor:
    """int64 keys from -2**31 -> the float32 with that rank; below -inf lie NaNs: -inf instead."""
    bits = key.clamp(min=-0x7F800001).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def first_argmax(x: Tensor) -> Tensor:
    """argmax [B] of x [B, V] with ties to the lowest id on every device and in every graph."""
    vocab_size = x.shape[-1]
    ids = torch.arange(vocab_size, device=x.device)
    first = torch.where(x == x.amax(-1, keepdim=True), ids, vocab_size).amin(-1)
    return first.clamp(max=vocab_size - 1)  # NaN equals nothing: stay inside the vocabulary


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Tokens [B] where the cumulative sum of weights [B, V] first exceeds u [B] of its total.

    Never a token of weight 0, also where a parallel scan rounds its way past the end.
    """
    vocab_size = weights.shape[-1]
    ids = torch.arange(vocab_size, device=weights.device)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    possible = weights > 0
    passed = possible & (cumulative > u.double()[:, None] * cumulative[:, -1:])
    first = torch.where(passed, ids, vocab_size).amin(-1)
    last = torch.where(possible, ids, 0).amax(-1)
    return torch.minimum(first, last)


def uniform(seed: Tensor, position: Tensor, purpose: int) -> Tensor:
    """float32 [B] in [0, 1), multiples of 2**-24, from seed [B], position [B] (int64, the latter
    below 2**32) and purpose: the same bits on every device, in every batch and graph.

    Two 32-bit keys from the seed, so that streams of two seeds meet with chance 2**-64 only.
    """
    seed_low, seed_high = seed & _WORD, (seed >> 32) & _WORD
    start = _mix(purpose + 1)
    first = _mix(_mix(seed_low ^ start) ^ seed_high)
    second = _mix(_mix(seed_high ^ start) ^ seed_low)
    bits = _mix(_mix(first ^ (position & _WORD)) ^ second)
    return (bits >> 8).float() * 2.0**-24


_WORD = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def _mix(word: Word) -> Word:
    """A bijection of 32-bit words in which each input bit flips each output bit half the time.

    Held in int64: the factors are below 2**31, so no product overflows.
    """
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x31848BAB) & _WORD
    word = word ^ (word >> 14)
    word = (word * 0x2C1B3C6D) & _WORD
    return word ^ (word >> 16)


def token_logprobs(
    logits: Tensor, tokens: Tensor, num_alternatives: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of tokens [B], and the best alternatives and their ids [B, n], under the
    model's own logits [B, V]: before bias, penalties, temperature and truncation, as in vLLM.

    A graph for each num_alternatives: callers fix one (`MAX_LOGPROBS`) and slice.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    values, ids = logprobs.topk(num_alternatives, dim=-1)
    return chosen, values, ids
