"""What an engine may be asked for, and how long a context the memory holds."""

import torch

from gptfast.cache import cache_bytes_per_token
from gptfast.config import ModelConfig
from gptfast.device import check_fits, free_memory, peak_memory
from gptfast.model import Transformer
from gptfast.parallel import Group
from gptfast.speculation.drafts import Draft
from gptfast.speculation.speculator import MAX_SPECULATE_K
from gptfast.together import together


def check_sizes(config: ModelConfig, num_rows: int, max_seq_len: int | None) -> None:
    """ValueError where an engine of these sizes would refuse them, whatever memory is free."""
    if num_rows < 1:
        raise ValueError(f"number of rows (batch size) is {num_rows}; at least 1 is needed")
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise ValueError(
            f"max_seq_len is {max_seq_len}; this model allows 1 to {config.max_seq_len}"
        )


def check_speculate_k(has_draft: bool, speculate_k: int | None) -> None:
    """ValueError or TypeError where so many tokens cannot be drafted at a time."""
    if speculate_k is None:
        return
    if isinstance(speculate_k, bool) or not isinstance(speculate_k, int):
        raise TypeError(f"speculate_k is {speculate_k!r}; a whole number or None is needed")
    if not has_draft:
        raise ValueError(f"speculate_k is {speculate_k} and there is no draft; give one")
    if not 1 <= speculate_k <= MAX_SPECULATE_K:
        raise ValueError(f"speculate_k is {speculate_k}; 1 to {MAX_SPECULATE_K} are possible")


@together
def common_free_memory(group: Group, device: str) -> int | None:
    """Bytes that can still be allocated on every rank's device of this kind; None where the system
    does not tell. Ranks of one host share its memory.
    """
    own = group.device(torch.device(device))
    free = free_memory(own)
    if free is not None and own.type == "cpu":
        free //= group.local_size
    least = group.least(-1 if free is None else free)
    return None if least < 0 else least


@together
def largest_peak(group: Group, device: str) -> int:
    """The most bytes that any rank has had in use (see `peak_memory`)."""
    return -group.least(-peak_memory(group.device(torch.device(device))))


def context_length(
    model: Transformer, num_rows: int, asked: int | None, kv_cache_dtype: str, draft: Draft | None
) -> int:
    """Slots for each row: what was asked, if it fits, or what facts and free memory allow."""
    config, device = model.config, model.device
    per_token = num_rows * cache_bytes_per_token(config, model.dtype, kv_cache_dtype)
    per_token += num_rows * (draft.cache_bytes_per_token if draft is not None else 0)
    # Beside the cache a row holds, for each token of the vocabulary, a bias, a count and a flag.
    others = per_token + num_rows * config.vocab_size * (4 + 4 + 1)  # the spare slot among them
    free = common_free_memory(model.group, str(device))
    fits = config.max_seq_len
    if asked is None and free is not None:  # leave a tenth for activations
        fits = max(1, min(fits, (int(0.9 * free) - others) // per_token))
    context = fits if asked is None else asked
    check_fits(
        context * per_token + others,
        device,
        f"a cache of {num_rows} x {context} tokens",
        "lower max_seq_len or the batch size",
        free,
    )
    return context
