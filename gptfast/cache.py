"""KVCache: the keys and values of every layer, and the length of every row. State, passed in as an
argument.

Knows neither tokens nor weights. Each layer owns its tensors [B, H_kv, S + 1, D] (never one stacked
tensor: the compiler would copy it whole); the last slot is spare: padding and idle rows write there
and nobody reads it. Numbers are of the model's dtype or of eight bits with a scale for each head
and position, rounded as they are written: what a slot holds depends on its own token alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.kernels.rounding import SCALE_DTYPE, round_vectors

# By name, what the numbers of a cache are stored as; None: as the model computes.
KV_CACHE_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each [B, H_kv, S + 1, D]; no values where they are a part of
    the keys (latent attention).

    `bound`, a number on the CPU that all layers share, is above every position in use: the host
    knows it without waiting for the device.

    Scales [B, H_kv, S + 1, 1] go with numbers of eight bits. Latents have two a position: one for
    the numbers that are values too, and one for the rotated ones, which no norm keeps small.
    """

    keys: Tensor
    values: Tensor | None
    bound: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def max_seq_len(self) -> int:
        """Tokens that a row can hold; also the index of the spare slot."""
        return self.keys.size(2) - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(tensor for tensor in every if tensor is not None)

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """k [B, T, H_kv, D] and v [B, T, H_kv, E] go to the slots `positions` [B, T]. Without a
        place of their own, v are the first numbers of k.
        """
        rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)  # [B, 1]
        first = v.size(-1) if self.values is None else None
        _write(self.keys, self.key_scales, rows, positions, k, first)
        if self.values is not None:
            _write(self.values, self.value_scales, rows, positions, v, None)

    def values_of(self, width: int) -> tuple[Tensor, Tensor | None]:
        """Values [B, H_kv, S + 1, width] and their scales, which may be views of the keys'."""
        if self.values is not None:
            return self.values, self.value_scales
        scales = None if self.key_scales is None else self.key_scales[..., :1]
        return self.keys[..., :width], scales

    def row(self, index: int) -> "LayerCache":
        """A cache of one row that shares this one's memory."""
        part = slice(index, index + 1)
        others = (self.values, self.key_scales, self.value_scales)
        values, *scales = (None if tensor is None else tensor[part] for tensor in others)
        return LayerCache(self.keys[part], values, self.bound, *scales)


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
        kv_cache_dtype: str = "auto",
    ) -> "KVCache":
        """Zeros (a masked NaN would still poison a sum), at addresses that never change. ValueError
        where `kv_cache_dtype` is none of KV_CACHE_DTYPES, or none for this device.
        """
        stored = parse_kv_cache_dtype(kv_cache_dtype, torch.device(device))
        num_heads, key_dim, value_dim = config.cache_shape

        def slots(dim: int, dtype: torch.dtype) -> Tensor:
            shape = (num_rows, num_heads, max_seq_len + 1, dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        def layer() -> LayerCache:
            keys = slots(key_dim, stored or dtype)
            values = slots(value_dim, stored or dtype) if value_dim else None
            if stored is None:
                return LayerCache(keys, values, bound)
            scales = slots(1 if value_dim else 2, SCALE_DTYPE)
            return LayerCache(
                keys, values, bound, scales, slots(1, SCALE_DTYPE) if value_dim else None
            )

        bound = torch.tensor(max_seq_len, device="cpu")
        layers = tuple(layer() for _ in range(config.num_layers))
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

    @property
    def bytes_per_token(self) -> int:
        """What one token of one row occupies."""
        return self.num_bytes // (self.num_rows * (self.max_seq_len + 1))

    def row(self, index: int) -> "KVCache":
        """A cache of one row that shares this one's memory."""
        layers = tuple(layer.row(index) for layer in self.layers)
        return KVCache(layers, self.lengths[index : index + 1])


def parse_kv_cache_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of a cache's numbers by its name; None for "auto" (what the model computes in).
    ValueError where there is no such name, or `device` cannot read such numbers.
    """
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype {name!r} is unknown; use {', '.join(KV_CACHE_DTYPES)}")
    if name == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):  # what compiled code needs to make such numbers
            raise ValueError(
                f"kv_cache_dtype 'fp8' needs a CPU or a GPU of compute capability 8.9, and "
                f"{device} has {capability[0]}.{capability[1]}; use int8"
            )
    return KV_CACHE_DTYPES[name]


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype, kv_cache_dtype: str) -> int:
    """Bytes that one token of one row occupies in a cache of a model that computes in `dtype`."""
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    if stored is None:
        return config.cache_bytes_per_token(dtype.itemsize)
    return config.cache_bytes_per_token(stored.itemsize, SCALE_DTYPE.itemsize)


def _write(
    slots: Tensor,
    scales: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    x: Tensor,
    first: int | None,
) -> None:
    """x [B, T, H_kv, D] to the slots `positions` [B, T] of `rows` [B, 1], rounded where there are
    scales. index_put stays in place under Inductor; scatter_ copies the whole cache (measured).
    """
    if scales is None:
        slots[rows, :, positions] = x.to(slots.dtype)
    else:
        slots[rows, :, positions], scales[rows, :, positions] = round_vectors(x, slots.dtype, first)
