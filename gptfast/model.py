"""The decoder, for every family. Names no family: what differs is a fact in ModelConfig.

Weights only. State (KVCache) is an argument, positions are per row, and logits exist only where
they are asked for. Letters: B rows, T new tokens, N selected tokens, H query heads, H_kv key/value
heads, D head size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.cache import KVCache, LayerCache
from gptfast.config import ModelConfig
from gptfast.kernels.attention import attention
from gptfast.rope import Rope, rotate
from quantize.formats import PackedLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Transformer(nn.Module):
    """Token ids in, float32 logits out. Built without gradients; build it under
    `torch.device("meta")` to load into.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = _table(config.vocab_size, config.dim)
        self.positions = _table(config.max_seq_len, config.dim) if not config.rope else None
        self.rope = Rope(config.rope, config.head_dim) if config.rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_head()
        self.requires_grad_(False)

    def tie_head(self) -> None:
        """Makes the head share the embedding's weight, where the facts say so."""
        if self.config.tied_head:
            self.head.weight = self.embed.weight

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding, unless it is the head
        too.
        """
        tables = 0 if self.config.tied_head else self.embed.weight.nbytes
        tables += self.positions.weight.nbytes if self.positions is not None else 0
        packed = sum(m.weight_bytes for m in self.modules() if isinstance(m, PackedLinear))
        return sum(parameter.nbytes for parameter in self.parameters()) + packed - tables

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T], positions [B, T] -> float32 logits [B, N, V] for the tokens `select` [B,
        N] (None: all).

        With a cache, new keys and values are written to the slots `positions` and every token sees
        its row's slots up to its own; a token at the spare slot (`cache.max_seq_len`) is padding.
        Without one, tokens see each other causally in the order given.
        """
        return self.logits(self.hidden(tokens, positions, cache), select)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        run_block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, dim] before the last norm. `run_block` is `Block.__call__`, or its
        compiled form.
        """
        x = self.embed(tokens)
        if self.positions is not None:
            # Padding sits at the spare slot, which may lie just beyond the table.
            x = x + self.positions(positions.clamp(max=self.config.max_seq_len - 1))
        cos_sin = None
        if self.rope is not None:
            lengths = positions.amax(1) + 1 if cache is None else cache.lengths
            cos_sin = self.rope(positions, lengths)
        layers = cache.layers if cache is not None else (None,) * len(self.blocks)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = (run_block or nn.Module.__call__)(block, x, positions, cos_sin, layer)
        return x

    def logits(self, x: Tensor, select: Tensor | None = None) -> Tensor:
        """Hidden [B, T, dim] -> float32 logits [B, N, V] at `select` [B, N] (None: all T)."""
        if select is not None:
            x = x.gather(1, select.unsqueeze(-1).expand(-1, -1, x.size(-1)))  # [B, N, dim]
        return self.head(self.norm(x)).float()


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]. `cache` is this layer's own, so that all blocks share one
        compiled graph.
        """
        x = x + self.attention(self.attention_norm(x), positions, cos_sin, cache)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Grouped-query attention (2305.13245), one fused projection for queries, keys, values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=config.out_bias)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
    ) -> Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=2)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)  # [B, T, H or H_kv, D]
        if cache is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2)  # [B, T, H, D]
        else:
            rows = torch.arange(x.size(0), device=x.device).unsqueeze(1)  # [B, 1]
            # index_put stays in place under Inductor; scatter_ copies the whole cache (measured).
            cache.keys[rows, :, positions] = k.to(cache.keys.dtype)
            cache.values[rows, :, positions] = v.to(cache.values.dtype)
            y = attention(q, cache.keys, cache.values, positions, cache.bound)
        return self.out(y.flatten(2))


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x), gate and up fused in one weight (2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class MLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467), the mean in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def fused_rows(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Rows of each part of the fused weight or bias `name`, in order; None where a parameter is one
    piece.
    """
    if ".attention.qkv." in name:
        kv_rows = config.num_kv_heads * config.head_dim
        return config.num_heads * config.head_dim, kv_rows, kv_rows
    if ".mlp.gate_up." in name:
        return config.hidden_dim, config.hidden_dim
    return None


def _table(num_rows: int, dim: int) -> nn.Embedding:
    """An embedding without numbers: its own initialisation imports the compiler where it meets the
    meta device, and that takes a second.
    """
    return nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim))


def build_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps)
