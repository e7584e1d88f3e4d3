"""Windows through a model: rows of one forward, in pieces, through a real KV cache, their logits
made a bounded part at a time and reduced to a few numbers for each scored token. So what a cache
rounds and where a prompt is cut count as they do in generation.

Letters: B rows, T inputs of the longest, n scored tokens, V vocabulary, C numbers for each token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.cache import cache_bytes_per_token, parse_kv_cache_dtype
from gptfast.cached import LARGEST_PIECE, CachedModel, cached_model
from gptfast.capacity import common_free_memory
from gptfast.checkpoint import Progress
from gptfast.device import check_fits
from gptfast.evaluation.windows import Window
from gptfast.model import Transformer

# Bytes of float32 logits that exist at a time, of each model. What `reduce` makes of them on its
# way is at most three times as much: 256 MB in all.
LOGITS_BYTES = 1 << 26

# Each model's logits [n, V] and the targets [n] -> C tensors [n].
Reduce = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Reader:
    """A model, and what its keys and values are stored as (cache.KV_CACHE_DTYPES)."""

    model: Transformer
    kv_cache_dtype: str = "auto"

    def begin(self, lengths: Sequence[int], num_slots: int) -> CachedModel:
        """The model over an empty cache with a row for a text of each length."""
        model, rows = self.model, len(lengths)
        how = (False, self.kv_cache_dtype, False)
        begun = cached_model(model.group, model, rows, num_slots, *how)
        begun.cache.lengths.copy_(torch.tensor(lengths).clamp(max=model.config.max_seq_len))
        return begun

    def check(self, windows: Sequence[Window], batch_size: int) -> None:
        """ValueError or MemoryError where a window cannot be read."""
        model, config = self.model, self.model.config
        parse_kv_cache_dtype(self.kv_cache_dtype, model.device)
        most = max((window.num_inputs for window in windows), default=0)
        if most > config.max_seq_len:
            raise ValueError(
                f"a window reads {most} tokens and the model's context holds "
                f"{config.max_seq_len}; use a smaller window"
            )
        for window in windows:
            if window.first < 1:
                raise ValueError("the first token of a window has nothing before it: no score")
            if not 0 <= min(window.ids) <= max(window.ids) < config.vocab_size:
                raise ValueError(
                    f"token ids must be 0 to {config.vocab_size - 1}, the vocabulary's"
                )
        rows = min(batch_size, len(windows))
        per_token = cache_bytes_per_token(config, model.dtype, self.kv_cache_dtype)
        check_fits(
            rows * (most + 1) * per_token,
            model.device,
            f"a cache of {rows} x {most} tokens",
            "lower the window or the batch size",
            common_free_memory(model.group, str(model.device)),
        )


@torch.no_grad()
def read(
    readers: Sequence[Reader],
    windows: Sequence[Window],
    reduce: Reduce,
    num_columns: int,
    batch_size: int,
    progress: Progress,
) -> list[Tensor]:
    """For each window a float32 table [C, n] on the CPU. Several readers run in lockstep on one
    device, with equal vocabularies.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; at least 1 is needed")
    tables = [torch.empty(num_columns, 0)] * len(windows)
    # Rows of similar length together, the longest first: what does not fit shows at once.
    scored = [index for index, window in enumerate(windows) if window.num_scored]
    order = sorted(scored, key=lambda index: -windows[index].num_inputs)
    for reader in readers:
        reader.check([windows[index] for index in order], batch_size)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in progress(batches):
        rows = _Rows([windows[index] for index in batch])
        found = torch.zeros(num_columns, *rows.predicts.shape)
        for row, place, values in _values(readers, rows, reduce):
            found[:, row, place] = values
        for number, index in enumerate(batch):
            tables[index] = found[:, number, rows.predicts[number]]
    return tables


class _Rows:
    """Windows as rows, on the CPU: tokens [B, T + 1], positions [B, T] of the inputs (padding sits
    at the spare slot, T), and at which inputs the next token is scored [B, T].
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.lengths = [len(window.ids) for window in windows]
        self.num_inputs = max(self.lengths) - 1
        ids = [torch.as_tensor(window.ids, dtype=torch.int64) for window in windows]
        self.tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        places = torch.arange(self.num_inputs)
        end = torch.tensor(self.lengths).unsqueeze(1) - 1
        begin = torch.tensor([[window.first - 1] for window in windows])
        self.positions = torch.where(places < end, places, self.num_inputs)
        self.predicts = (places >= begin) & (places < end)


def _values(
    readers: Sequence[Reader], rows: _Rows, reduce: Reduce
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows [n], places [n] of the inputs, numbers [C, n]) of every part, on the CPU."""
    model = readers[0].model
    device, size = model.device, max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    models = [reader.begin(rows.lengths, rows.num_inputs) for reader in readers]
    for start in range(0, rows.num_inputs, LARGEST_PIECE):
        piece = slice(start, min(start + LARGEST_PIECE, rows.num_inputs))
        tokens, positions = (t[:, piece].to(device) for t in (rows.tokens, rows.positions))
        hidden = []
        for each in models:
            each.cache.bound.fill_(piece.stop)
            hidden.append(each.hidden(tokens, positions))
        for part in rows.predicts[:, piece].nonzero().split(size):  # [n, 2]
            row, place = part.unbind(1)
            at = row.to(device), place.to(device)
            logits = [
                each.logits(x[at].unsqueeze(0), compiled=False)[0]
                for each, x in zip(models, hidden, strict=True)
            ]
            targets = rows.tokens[row, start + place + 1].to(device)
            values = torch.stack([column.float() for column in reduce(logits, targets)])
            yield row, start + place, values.cpu()
