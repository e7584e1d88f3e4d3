"""KVCache: the keys and values of every layer, and the length of every row. State, passed in as an
argument.

Knows neither tokens nor weights. Each layer owns its tensors [B, H_kv, S + 1, D] (never one stacked
tensor: the compiler would copy it whole); the last slot is spare: padding and idle rows write there
and nobody reads it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.config import ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each [B, H_kv, S + 1, D]; no values where they are a part of
    the keys (latent attention).

    `bound`, a number on the CPU that all layers share, is above every position in use: the host
    knows it without waiting for the device.
    """

    keys: Tensor
    values: Tensor | None
    bound: Tensor

    @property
    def max_seq_len(self) -> int:
        """Tokens that a row can hold; also the index of the spare slot."""
        return self.keys.size(2) - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys,) if self.values is None else (self.keys, self.values)


@dataclass(frozen=True)
class KVCache:
    """`lengths` [B] int64 counts the tokens known of each row: its whole prompt, then one more with
    every token.
    """

    layers: tuple[LayerCache, ...]
    lengths: Tensor

    @staticmethod
    def allocate(
        config: ModelConfig,
        num_rows: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Zeros (a masked NaN would still poison a sum), at addresses that never change."""
        num_heads, key_dim, value_dim = config.cache_shape

        def slots(dim: int) -> Tensor:
            shape = (num_rows, num_heads, max_seq_len + 1, dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        bound = torch.tensor(max_seq_len, device="cpu")
        layers = tuple(
            LayerCache(slots(key_dim), slots(value_dim) if value_dim else None, bound)
            for _ in range(config.num_layers)
        )
        return KVCache(layers, torch.zeros(num_rows, dtype=torch.int64, device=device))

    def mark_static(self) -> None:
        """Tells the compiler that these addresses never change. Imports it, which takes a second:
        nothing that runs eagerly should.
        """
        for layer in self.layers:
            for tensor in layer.tensors:
                torch._dynamo.mark_static_address(tensor)

    @property
    def num_rows(self) -> int:
        return self.lengths.size(0)

    @property
    def max_seq_len(self) -> int:
        """Tokens that a row can hold; also the index of the spare slot."""
        return self.layers[0].max_seq_len

    @property
    def bound(self) -> Tensor:
        return self.layers[0].bound

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def row(self, index: int) -> "KVCache":
        """A cache of one row that shares this one's memory."""
        part = slice(index, index + 1)
        layers = tuple(
            LayerCache(
                layer.keys[part], None if layer.values is None else layer.values[part], layer.bound
            )
            for layer in self.layers
        )
        return KVCache(layers, self.lengths[part])
