"""What ranks that share a model have to read and to tell each other in a decode step: exact, from
the model's facts alone. Knows which parts are cut (gptfast/sharding.py) and which messages a step
has (gptfast/cached.py); times nothing.
"""

import torch
from scaling import Exchange, Share

from gptfast.cache import cache_bytes_per_token
from gptfast.config import ModelConfig
from gptfast.model import Transformer
from gptfast.parallel import HEADER, Group
from gptfast.quantization import QuantPlan
from gptfast.sharding import WHOLE, local_config, shard_of

INTEGER = 8  # bytes of a token's id, a place, a length


def share_of(
    config: ModelConfig,
    group: Group,
    dtype: torch.dtype,
    plan: QuantPlan | None = None,
    kv_cache_dtype: str = "auto",
) -> Share:
    """What this rank reads for a token: all weights but the embedding (unless it is the head too),
    and of experts as many as are active. ValueError where so many ranks cannot share the model.
    """
    local = local_config(config, group)
    with torch.device("meta"):
        model = Transformer(local, group)
    formats = {} if plan is None else plan.formats(model)
    total = whole = 0.0
    for name, parameter in model.named_parameters():
        is_looked_up = name.startswith(("embed.", "positions."))
        if is_looked_up and not (name == "embed.weight" and config.tied_head):
            continue
        module = "head" if name == "embed.weight" else name.removesuffix(".weight")
        form = formats.get(module)
        columns = parameter.size(-1)
        each = dtype.itemsize if form is None else form.bytes_per_weight(columns)
        size = parameter.numel() * each
        if ".mlp.expert_" in name and config.experts is not None:
            size *= config.experts.num_active / config.experts.num_experts
        total += size
        whole += size if shard_of(name, config, group) == WHOLE else 0
    return Share(total, whole, cache_bytes_per_token(local, dtype, kv_cache_dtype))


def exchanges_of(
    config: ModelConfig,
    num_ranks: int,
    sum_bytes: int = 2,
    num_rows: int = 1,
    num_tokens: int = 1,
    needs_logits: bool = False,
) -> list[Exchange]:
    """The collectives of a decode step of `num_tokens` a row. Numbers that are summed have
    `sum_bytes` each: those of the model's dtype, or 4 through gloo. A greedy step exchanges the
    best token of each rank, one that samples (`needs_logits`) gathers the logits.
    """
    if num_ranks == 1:
        return []
    count = num_rows * num_tokens
    width = count * config.dim * sum_bytes
    found = [
        Exchange("what to do", "broadcast", 1, HEADER * INTEGER),
        Exchange("tokens and places", "broadcast", 1, (num_rows + 2 * count) * INTEGER),
        Exchange("embedding", "all_reduce", 1, width),
        Exchange("attention", "all_reduce", config.num_layers, width),
        Exchange("MLP", "all_reduce", config.num_layers, width),
    ]
    if config.qk_norm == "all":  # mean squares of queries and keys, in float32
        found.append(Exchange("norms of heads", "all_reduce", config.num_layers, 2 * count * 4))
    if needs_logits:
        most = -(-config.vocab_size // num_ranks)
        return [*found, Exchange("logits", "all_gather", 1, count * most * 4)]
    return [*found, Exchange("best token", "all_gather", 1, count * 2 * 8)]  # a number and an id
