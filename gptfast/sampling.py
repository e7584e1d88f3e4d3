"""From logits to tokens: what a request asks for, its state per row, and the mathematics.

Knows logits [B, V] and token ids; knows nothing of models, text or who calls. All below
`SamplingState` is pure and works row by row (no row sees another), without a branch on a tensor
or a host sync: greedy and sampled rows mix in one batch, and one graph serves all values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

Plan = Literal["greedy", "plain", "full"]
PLANS: tuple[Plan, ...] = ("greedy", "plain", "full")  # each does all that the one before does
GREEDY_BELOW = 1e-5  # a lower temperature counts as 0
PURPOSE_SAMPLE = 0  # `purpose` of the uniform that picks a token; other callers take others
MAX_LOGPROBS = 20

_RANGES = (
    ("max_new_tokens", Integral, 1, 2**31 - 1),
    ("temperature", Real, 0, 100),
    ("top_k", Integral, -1, 2**31 - 1),
    ("top_p", Real, 1e-6, 1),
    ("min_p", Real, 0, 1),
    ("repetition_penalty", Real, 0.01, 100),
    ("presence_penalty", Real, -2, 2),
    ("frequency_penalty", Real, -2, 2),
    ("n", Integral, 1, 1024),
    ("seed", Integral, 0, 2**63 - 1),
    ("logprobs", Integral, 0, MAX_LOGPROBS),
)
_OPTIONAL = ("max_new_tokens", "seed", "logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Checks itself: a wrong value is a ValueError, a wrong type a
    TypeError, that names the field, what was found and the range.

    Order of operations: logit_bias, repetition_penalty, presence_penalty and frequency_penalty,
    temperature, top_k, top_p (of the probability that top_k kept), min_p.

    max_new_tokens      1 or more; None = until the context ends
    temperature         0 to 100; below 1e-5 = the most likely token, ties to the lowest id
    top_k               1 or more = keep the k most likely tokens; 0 or -1 = off
    top_p               1e-6 to 1: keep the smallest set with at least this probability; 1 = off
    min_p               0 to 1: keep tokens at least this likely relative to the most likely one
    repetition_penalty  0.01 to 100: divides positive and multiplies negative logits of tokens in
                        the prompt or the output (Keskar et al., 1909.05858); 1 = off
    presence_penalty    -2 to 2: subtracted from the logits of tokens in the output
    frequency_penalty   -2 to 2: the same, once for each time that the token is in the output
    logit_bias          token id -> -100 to 100, added to its logit
    stop                a text, or several, that ends the output and is not part of it
    stop_token_ids      ids that end the output, besides the model's own end tokens
    ignore_eos          the model's own end tokens do not end the output
    n                   1 to 1024 outputs for each prompt
    seed                0 to 2**63 - 1; None = a new one each time
    logprobs            0 to 20 alternatives reported for each token (0 = the chosen one only);
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
    stop: str | Sequence[str] = ()  # a tuple once constructed, as is the next
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        clean: dict[str, Any] = {
            name: _number(name, getattr(self, name), kind, low, high)
            for name, kind, low, high in _RANGES
            if not (name in _OPTIONAL and getattr(self, name) is None)
        }
        clean["logit_bias"] = _bias(self.logit_bias)
        clean["stop"] = _stop(self.stop)
        clean["stop_token_ids"] = _ids("stop_token_ids", self.stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos = {self.ignore_eos!r} must be True or False")
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    def validate_for(self, vocab_size: int) -> None:
        """ValueError where a token id named here is not one of the model's."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if max(ids, default=0) >= vocab_size:
                found = f"{name} names token id {max(ids)}"
                raise ValueError(f"{found}; this model's ids are 0 to {vocab_size - 1}")

    @property
    def plan(self) -> Plan:
        """The cheapest plan that does what is asked."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        adjusted = bool(self.logit_bias) or penalties != (1, 0, 0)
        greedy = self.temperature < GREEDY_BELOW
        truncated = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if adjusted or (truncated and not greedy):
            return "full"
        return "greedy" if greedy else "plain"


def _number(name: str, value: Any, kind: type, low: float, high: float) -> int | float:
    wanted = f"{name} = {value!r} must be a {'whole ' * (kind is Integral)}number"
    right_type = isinstance(value, kind) and not isinstance(value, bool)
    if not right_type:
        raise TypeError(f"{wanted} from {low} to {high}")
    if not low <= value <= high:  # NaN is not
        raise ValueError(f"{wanted} from {low} to {high}")
    return int(value) if kind is Integral else float(value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} = {value!r} must be a list of token ids")
    return tuple(int(_number(f"{name}: id", i, Integral, 0, 2**31 - 1)) for i in value)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias = {value!r} must map token ids to numbers from -100 to 100")
    ids = _ids("logit_bias", tuple(value))
    return {i: _number(f"logit_bias[{i}]", value[i], Real, -100, 100) for i in ids}


def _stop(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"stop = {value!r} must be a text or a list of texts")
    if "" in texts:
        raise ValueError(f"stop = {value!r} has an empty text, which is everywhere; leave it out")
    return tuple(texts)


class SamplingState:
    """The sampling parameters of B rows as device tensors whose addresses never change.

    Each plan is one graph for all values: "greedy" is argmax alone, "plain" temperature and a
    draw, "full" everything. Idle rows are greedy. `count` matters under "full" only.
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
        self._plans = [0] * num_rows  # on the host, shared with the views that `row` makes
        self._rows = range(num_rows)

    def tensors(self) -> dict[str, Tensor]:
        """All device tensors by name, e.g. to mark their addresses static for CUDA graphs."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def row(self, row: int) -> "SamplingState":
        """One row as a state of its own, over the same memory and plan."""
        view = object.__new__(SamplingState)
        for name, tensor in self.tensors().items():
            setattr(view, name, tensor[row : row + 1])
        view._plans, view._rows = self._plans, self._rows[row : row + 1]
        return view

    def plan(self) -> Plan:
        """The cheapest plan that serves every row."""
        return PLANS[max(self._plans[row] for row in self._rows)]

    def set_row(
        self, row: int, params: SamplingParams, prompt_ids: Sequence[int] | Tensor, seed: int
    ) -> None:
        """Give a row to a request whose output is still empty."""
        vocab_size = self.bias.shape[1]
        params.validate_for(vocab_size)
        prompt = torch.as_tensor(prompt_ids, dtype=torch.int64)
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
            raise ValueError(f"prompt_ids has ids outside this model's 0 to {vocab_size - 1}")
        self.clear_row(row)
        self.temperature[row] = 0 if params.temperature < GREEDY_BELOW else params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.repetition_penalty[row] = params.repetition_penalty
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.seed[row] = seed
        for token, bias in params.logit_bias.items():
            self.bias[row, token] = bias
        self.prompt_seen[row, prompt.to(self.prompt_seen.device)] = True
        self._plans[self._rows[row]] = PLANS.index(params.plan)

    def clear_row(self, row: int) -> None:
        """Make a row idle: greedy, nothing adjusted, no prompt and no output."""
        for name, tensor in self.tensors().items():
            tensor[row] = 1 if name in ("top_p", "repetition_penalty") else 0
        self._plans[self._rows[row]] = 0

    def count(self, tokens: Tensor, active: Tensor) -> None:
        """Add tokens [B] to the outputs of the rows where active [B] is true, in place."""
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        self.output_counts.index_put_((rows, tokens), active.to(torch.int32), accumulate=True)


def sample(logits: Tensor, state: SamplingState, positions: Tensor, plan: Plan = "full") -> Tensor:
    """The next token [B] of each row of logits [B, V]; positions [B] choose the random bits.

    `plan` may do more than a row needs, never less: see `SamplingState.plan`.
    """
    if plan == "greedy":
        return first_argmax(logits.float())
    return draw(_odds(logits, state, plan), uniform(state.seed, positions, PURPOSE_SAMPLE))


def probabilities(logits: Tensor, state: SamplingState, plan: Plan = "full") -> Tensor:
    """The distribution [B, V] that `sample` draws from: one-hot where the temperature is 0."""
    odds = _odds(logits, state, plan)
    return odds / odds.sum(-1, keepdim=True, dtype=torch.float64).float()


def _odds(logits: Tensor, state: SamplingState, plan: Plan) -> Tensor:
    """Probabilities [B, V] relative to the most likely token's, which is 1."""
    x = adjust(logits, state) if plan == "full" else logits.float()
    greedy = (state.temperature == 0)[:, None]
    temperature = torch.where(greedy, 1, state.temperature[:, None])
    scaled = (x - x.amax(-1, keepdim=True)) / temperature  # at most 0, so never inf
    if plan == "full":
        scaled = truncate(scaled, state.top_k, state.top_p, state.min_p)
    one_hot = torch.arange(x.shape[-1], device=x.device) == first_argmax(x)[:, None]
    return torch.where(greedy, one_hot.float(), scaled.exp())


def adjust(logits: Tensor, state: SamplingState) -> Tensor:
    """Logits [B, V] in float32 with bias and penalties."""
    x = logits.float() + state.bias
    in_output = state.output_counts > 0
    repetition = state.repetition_penalty[:, None]
    penalised = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where(state.prompt_seen | in_output, penalised, x)
    x = x - state.presence_penalty[:, None] * in_output
    return x - state.frequency_penalty[:, None] * state.output_counts


def first_argmax(x: Tensor) -> Tensor:
    """argmax [B] of x [B, V], ties to the lowest id on every device and in every graph."""
    vocab_size = x.shape[-1]
    ids = torch.arange(vocab_size, device=x.device)
    first = torch.where(x == x.amax(-1, keepdim=True), ids, vocab_size).amin(-1)
    return first.clamp(max=vocab_size - 1)  # NaN equals nothing: an id all the same


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [B, V], temperature applied, with -inf for what top_k [B] (below 1 = off), then
    top_p [B] (Holtzman et al., 1904.09751; 1 = off), then min_p [B] (2407.01082) cut.

    Tokens that tie with the last one kept are all kept: no set depends on the order of ids.
    Masses add up in float64, so that no set depends on how a graph splits the sum.
    """
    x = logits.float()
    vocab_size = x.shape[-1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)[:, None]
    # Sort and search, compiled, B = 1, one thread of an EPYC, top-k 50 and top-p 0.9: 40 and 90 us
    # at V = 2048, 60 and 100 at 4096, 390 and 125 at 8192, 1900 and 280 at 32000, 8500 and 900 at
    # 128256; at B = 4, V = 2048 as at 8192. Uncompiled, a sort beats hundreds of operations.
    searching = torch.compiler.is_compiling() and x.numel() > 4096
    find = _find_by_search if searching else _find_by_sort
    threshold = find(x, k, top_p.double()[:, None])
    likely = (x - x.amax(-1, keepdim=True)).exp() >= min_p[:, None]
    return torch.where((x >= threshold) & likely, x, -math.inf)


def _find_by_sort(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The least logit [B, 1] that top-k [B, 1], then top-p [B, 1] keep: the plain twin."""
    ordered = x.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, k - 1)
    mass = torch.where(ordered >= kth, (ordered - ordered[:, :1]).exp(), 0)
    mass = mass.cumsum(-1, dtype=torch.float64)
    num_before = (mass < p * mass[:, -1:]).sum(-1, keepdim=True)
    return torch.where(p < 1, ordered.gather(-1, num_before), kth)


def _find_by_search(x: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """The same without a sort: two searches, as top-p is a share of what top-k kept."""
    kth = _search(x, torch.ones_like(x), k.double())
    mass = torch.where(x >= kth, (x - x.amax(-1, keepdim=True)).exp(), 0)
    need = p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(p < 1, _search(x, mass, need), kth)


def _search(x: Tensor, mass: Tensor, need: Tensor) -> Tensor:
    """The largest threshold [B, 1] for which mass[x >= threshold] reaches need [B, 1].

    Exact: floats order like their bits read as integers, and each pass finds two bits of 32. (At
    V = 128256 one bit a pass took 1.7 times as long, four bits 1.5 times.)
    """
    low = torch.full_like(need, -(2**31), dtype=torch.int64)
    step = torch.full_like(low, 2**30)
    for _ in range(4):
        low, step = _four_passes(x, mass, need, low, step)
    return _float_of_rank(low)


# A region is compiled once and called eight times. Unrolled, `truncate` at V = 2048 compiled for
# 11.4 s of CPU time instead of 4.4 s, and ran in 71 us instead of 99.
@torch.compiler.nested_compile_region
def _four_passes(
    x: Tensor, mass: Tensor, need: Tensor, low: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    for _ in range(4):
        num_steps = torch.zeros_like(low)
        for i in (1, 2, 3):  # three sums, one loop over x and mass
            kept = torch.where(x >= _float_of_rank(low + i * step), mass, 0)
            num_steps = num_steps + (kept.sum(-1, keepdim=True, dtype=torch.float64) >= need)
        low, step = low + num_steps * step, step >> 2
    return low, step


def _float_of_rank(rank: Tensor) -> Tensor:
    """int64 in the range of int32 -> the float32 of that rank; -inf for the NaNs below it."""
    bits = rank.clamp(min=-0x7F800001).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def draw(odds: Tensor, u: Tensor) -> Tensor:
    """The token [B] at which the running sum of odds [B, V] passes u [B] times their total.

    Never one with odds 0, also where a parallel sum is not quite monotone.
    """
    vocab_size = odds.shape[-1]
    ids = torch.arange(vocab_size, device=odds.device)
    running = odds.cumsum(-1, dtype=torch.float64)
    passed = (odds > 0) & (running > u.double()[:, None] * running[:, -1:])
    last = torch.where(odds > 0, ids, 0).amax(-1)
    return torch.minimum(torch.where(passed, ids, vocab_size).amin(-1), last)


_WORD = 0xFFFFFFFF


def uniform(seed: Tensor, position: Tensor, purpose: int) -> Tensor:
    """float32 [B] in [0, 1), multiples of 2**-24: a function of seed [B], position [B] (both
    int64) and purpose alone, with the same bits on every device, in every batch and graph."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    salt = ((purpose + 1) * 0x9E3779B9) & _WORD
    first = _mix(low ^ salt)
    second = _mix(high ^ salt) ^ low  # seeds below 2**32 never share both keys
    bits = position & _WORD
    for key in (first, second, first, second):  # two pass every test here; two more for margin
        bits = _mix(bits ^ key)
    return (bits >> 8).float() * 2.0**-24


def _mix(word: Tensor) -> Tensor:
    """Multiply a 32-bit word held in int64 and fold the product (below 2**63) to 32 bits."""
    product = word * 0x5F356495
    return (product >> 32) ^ (product & _WORD)


def token_logprobs(
    logits: Tensor, tokens: Tensor, num_alternatives: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of tokens [B], and the best alternatives [B, n] with their ids [B, n],
    by the model's own logits [B, V]: before bias, penalties, temperature and cuts, as in vLLM.

    Each num_alternatives is a graph: fix one and slice.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(num_alternatives, dim=-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], values, ids
