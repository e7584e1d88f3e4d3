"""How well a model predicts: perplexity over token ids, its distance from a reference model, and
the likelihood of continuations.

Knows ids and a model, of text only how many bytes its tokens are; prints nothing.
How a text becomes windows is windows.py's, how windows run through a model reading.py's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.checkpoint import Progress
from gptfast.config import ModelConfig
from gptfast.evaluation.reading import Reader, read
from gptfast.evaluation.windows import (
    Window,
    continuation,
    documents,
    rolling,
    second_halves,
    strided,
)
from gptfast.model import Transformer
from gptfast.stats import percentile
from gptfast.tokenizer import Tokenizer

__all__ = [
    "Comparison",
    "Perplexity",
    "Scores",
    "Window",
    "beginning_of",
    "check_comparable",
    "check_windows",
    "compare",
    "continuation",
    "documents",
    "kl_divergence",
    "measure_perplexity",
    "rolling",
    "score",
    "second_halves",
    "strided",
    "token_lengths",
]

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class Scores:
    """Of each scored token of a window: its log probability [n] in nats, and whether it was the
    likeliest [n]. On the CPU.
    """

    logprobs: Tensor
    is_top: Tensor


@dataclass(frozen=True)
class Perplexity:
    """What a model pays for a text: mean and standard error over `num_tokens` scored tokens.

    `num_bytes` is the length in UTF-8 of exactly these tokens, None where nobody knows it.
    """

    num_tokens: int
    nats_per_token: float
    standard_error: float
    num_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def perplexity_error(self) -> float:
        """The standard error carried over to first order, as llama.cpp reports it."""
        return self.perplexity * self.standard_error

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as nats per token are not."""
        if not self.num_bytes:
            return None
        return self.nats_per_token * self.num_tokens / self.num_bytes / math.log(2)

    def as_dict(self) -> dict[str, Any]:
        derived = ("perplexity", "perplexity_error", "bits_per_byte")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference on the same tokens. Divergences are KL(reference || model) of the
    next token, in nats for each scored token; median and 99th percentile are by nearest rank.
    `top1_agreement` is the share of tokens at which both find the same token likeliest;
    `nll_difference` is the mean of what the model pays more.
    """

    model: Perplexity
    reference: Perplexity
    kl_mean: float
    kl_standard_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    nll_difference: float
    nll_difference_error: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "model": self.model.as_dict(),
            "reference": self.reference.as_dict(),
        }


def score(
    model: Transformer,
    windows: Sequence[Window],
    batch_size: int = DEFAULT_BATCH_SIZE,
    kv_cache_dtype: str = "auto",
    progress: Progress = iter,
) -> list[Scores]:
    """The scores of each window. `batch_size` rows run together, those of similar length;
    `kv_cache_dtype` is one of cache.KV_CACHE_DTYPES.
    """

    def reduce(logits: Sequence[Tensor], targets: Tensor) -> Sequence[Tensor]:
        [own] = logits
        return _of(own.log_softmax(-1), targets), own.argmax(-1) == targets

    tables = read([Reader(model, kv_cache_dtype)], windows, reduce, 2, batch_size, progress)
    return [Scores(table[0], table[1] == 1) for table in tables]


def measure_perplexity(
    model: Transformer,
    windows: Sequence[Window],
    num_bytes: Sequence[int] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    kv_cache_dtype: str = "auto",
    progress: Progress = iter,
) -> Perplexity:
    """The perplexity of the scored tokens of `windows`. `num_bytes` [tokens of the text]: the bytes
    of every token, in its place.

    ValueError where fewer than two tokens are scored, a window does not fit the context, or the
    numbers that come out are not finite.
    """
    check_windows(model.config, windows)
    scores = score(model, windows, batch_size, kv_cache_dtype, progress)
    nll = -torch.cat([window.logprobs for window in scores]).double()
    return _perplexity(nll, windows, num_bytes)


def compare(
    model: Transformer,
    reference: Transformer,
    windows: Sequence[Window],
    num_bytes: Sequence[int] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    kv_cache_dtype: str = "auto",
    progress: Progress = iter,
) -> Comparison:
    """As `measure_perplexity`, for both, and how far apart they are. Both run in lockstep on the
    same device; `kv_cache_dtype` is the model's only. ValueError where vocabularies differ in size.
    """
    check_comparable(model.config, reference.config)
    for config in (model.config, reference.config):
        check_windows(config, windows)

    def reduce(logits: Sequence[Tensor], targets: Tensor) -> Sequence[Tensor]:
        agree = logits[0].argmax(-1) == logits[1].argmax(-1)
        own, other = (part.log_softmax(-1) for part in logits)
        return -_of(own, targets), -_of(other, targets), kl_divergence(other, own), agree

    readers = [Reader(model, kv_cache_dtype), Reader(reference)]
    tables = read(readers, windows, reduce, 4, batch_size, progress)
    own, other, divergence, agree = torch.cat(tables, dim=1).double()
    _check_finite(own, other, divergence)
    values = divergence.tolist()
    mean, error = _mean_and_error(divergence)
    difference, difference_error = _mean_and_error(own - other)
    return Comparison(
        model=_perplexity(own, windows, num_bytes),
        reference=_perplexity(other, windows, num_bytes),
        kl_mean=mean,
        kl_standard_error=error,
        kl_median=percentile(values, 0.5) or 0.0,
        kl_p99=percentile(values, 0.99) or 0.0,
        kl_max=max(values),
        top1_agreement=agree.mean().item(),
        nll_difference=difference,
        nll_difference_error=difference_error,
    )


def check_windows(config: ModelConfig, windows: Sequence[Window]) -> None:
    """ValueError where windows are too little for a perplexity, or too long for a model."""
    num_scored = sum(window.num_scored for window in windows)
    if num_scored < 2:
        num_tokens = sum(len(window.ids) for window in windows)
        raise ValueError(
            f"the text has {num_tokens} tokens, of which {num_scored} would be scored; at least 2 "
            "are needed: give more text"
        )
    longest = max(len(window.ids) for window in windows)
    if longest > config.max_seq_len:
        raise ValueError(
            f"a window has {longest} tokens and the model's context holds {config.max_seq_len}; "
            "use a smaller window"
        )


def check_comparable(model: ModelConfig, reference: ModelConfig) -> None:
    """ValueError where two models cannot mean the same tokens."""
    sizes = model.vocab_size, reference.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the model has a vocabulary of {sizes[0]} tokens and the reference one of {sizes[1]}; "
            "only models with the same tokens can be compared"
        )


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) [n] of log probabilities [n, V] each; what has no probability in the
    reference counts nothing. Rounding may take the sum below zero: then it is zero.
    """
    terms = torch.where(reference > -torch.inf, reference.exp() * (reference - model), 0.0)
    return terms.sum(-1).clamp(min=0)


def beginning_of(tokenizer: Tokenizer) -> int | None:
    """BOS where this tokenizer puts it before a text, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def token_lengths(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The bytes in UTF-8 that each token of a text adds to it. Hidden control tokens (BOS) add
    none, nor does the space that sentencepiece puts before a text; so the sum is the length of the
    text, where the tokenizer keeps it byte for byte.
    """
    lengths = [0 if i in tokenizer.hidden_ids else len(tokenizer.token_bytes(i)) for i in ids]
    first = next((place for place, length in enumerate(lengths) if length), None)
    if first is not None:
        begins, text = tokenizer.token_bytes(ids[first]), tokenizer.decode(ids[first : first + 1])
        if begins.startswith(b" "):
            num_written = len(text) - len(text.lstrip(" "))
            lengths[first] -= len(begins) - len(begins.lstrip(b" ")) - num_written
    return lengths


def _of(logprobs: Tensor, targets: Tensor) -> Tensor:
    """[n, V] at targets [n] -> [n]."""
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)


def _check_finite(*columns: Tensor) -> None:
    num_bad = max(int((~values.isfinite()).sum()) for values in columns)
    if num_bad:
        raise ValueError(
            f"{num_bad} of {len(columns[0])} tokens have no finite score: numbers overflow in this "
            "dtype or weights are broken; try bf16 or fp32"
        )


def _perplexity(
    nll: Tensor, windows: Sequence[Window], num_bytes: Sequence[int] | None
) -> Perplexity:
    _check_finite(nll)
    total = None
    if num_bytes is not None:
        scored = (slice(w.start + w.first, w.start + len(w.ids)) for w in windows)
        total = sum(sum(num_bytes[places]) for places in scored)
    return Perplexity(len(nll), *_mean_and_error(nll), total)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error as if tokens were independent (llama.cpp's)."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
