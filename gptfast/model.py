"""The decoder, for every family. Names no family: what differs is a fact in ModelConfig.

Weights only. State (KVCache) is an argument, positions are per row, and logits exist only where
they are asked for. Letters: B rows, T new tokens, N selected tokens, H query heads, H_kv key/value
heads, D head size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.attention import build_attention
from gptfast.cache import KVCache, LayerCache
from gptfast.config import ModelConfig
from gptfast.experts import Experts
from gptfast.layers import build_mlp, build_norm
from gptfast.parallel import ALONE, Group
from gptfast.rope import Rope
from gptfast.sampling import first_argmax
from quantize.formats import Format
from quantize.grouped import GroupedLinear, PackedGroupedLinear
from quantize.kernels.cpu import PackedQuantizedGroupedLinear, PackedQuantizedLinear
from quantize.kernels.cuda import CudaQuantizedLinear
from quantize.linear import QuantizedGroupedLinear
from quantize.packed import PackedLinear

# Modules whose weight is no parameter, and those of experts.
PACKED = (
    PackedLinear,
    PackedGroupedLinear,
    PackedQuantizedLinear,
    PackedQuantizedGroupedLinear,
    CudaQuantizedLinear,
)
GROUPED = (
    GroupedLinear,
    PackedGroupedLinear,
    QuantizedGroupedLinear,
    PackedQuantizedGroupedLinear,
)


class Transformer(nn.Module):
    """Token ids in, float32 logits out. Built without gradients; build it under
    `torch.device("meta")` to load into.

    With a group of several ranks it is this rank's share: `config` has the heads and hidden units
    of the rank (see sharding.py), embedding and head its part of the vocabulary. Every rank calls
    it with the same tokens.
    """

    def __init__(self, config: ModelConfig, group: Group = ALONE) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.formats: dict[str, Format] = {}  # module -> what its weight is quantized to
        self.vocabulary = group.share(config.vocab_size)  # the ids whose rows are here
        self.embed = _table(len(self.vocabulary), config.dim)
        num_places = config.max_seq_len + config.position_offset
        self.positions = _table(num_places, config.dim) if config.learned_positions else None
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        # Layers rotate by one of these, or not at all.
        by_layer = [config.layer_rope(layer) for layer in range(config.num_layers)]
        distinct = list(dict.fromkeys(rope for rope in by_layer if rope is not None))
        rotated = config.latent.rope_dim if config.latent else config.head_dim
        self.ropes = nn.ModuleList(Rope(rope, rotated) for rope in distinct)
        self.rope_of = [None if rope is None else distinct.index(rope) for rope in by_layer]
        layers = range(config.num_layers)
        self.blocks = nn.ModuleList(Block(config, layer, group) for layer in layers)
        self.norm = build_norm(config)
        self.head = nn.Linear(config.dim, len(self.vocabulary), bias=config.head_bias)
        self.tie_head()
        self.requires_grad_(False)

    def tie_head(self) -> None:
        """Makes the head share the embedding's weight where the facts say so, if both are plain."""
        if self.config.tied_head and self._are_plain:
            self.head.weight = self.embed.weight

    @property
    def _are_plain(self) -> bool:
        return type(self.head) is nn.Linear and type(self.embed) is nn.Embedding

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of what is not quantized."""
        return next(self.norm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.norm.parameters()).device

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that one decode step of one row reads: all but the embedding, unless it
        is the head too, and of experts only the active ones.
        """
        size = sum(parameter.nbytes for parameter in self.parameters())
        if not (self.config.tied_head and self._are_plain):
            size -= sum(parameter.nbytes for parameter in self.embed.parameters())
        size -= self.positions.weight.nbytes if self.positions is not None else 0
        size += sum(m.weight_bytes for m in self.modules() if isinstance(m, PACKED))
        if (experts := self.config.experts) is not None:
            stored = sum(m.weight_bytes for m in self.modules() if isinstance(m, GROUPED))
            idle = experts.num_experts - experts.num_active
            size -= stored * idle // experts.num_experts
        return size

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
        x = self.embedded(tokens, positions)
        lengths = positions.amax(1) + 1 if cache is None else cache.lengths
        turns = [rope(positions, lengths) for rope in self.ropes]
        layers = cache.layers if cache is not None else (None,) * len(self.blocks)
        for block, layer, rope in zip(self.blocks, layers, self.rope_of, strict=True):
            cos_sin = None if rope is None else turns[rope]
            x = (run_block or nn.Module.__call__)(block, x, positions, cos_sin, layer)
        return x

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads [B, T, dim]."""
        config, x = self.config, self._looked_up(tokens)
        if config.embedding_multiplier != 1:
            # Rounded to the stream's dtype first: so it was when these models were trained.
            x = x * torch.full_like(x[:1, :1, :1], config.embedding_multiplier)
        if self.positions is not None:
            # Padding sits at the spare slot, which may lie just beyond the table.
            places = positions.clamp(max=config.max_seq_len - 1) + config.position_offset
            x = x + self.positions(places)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _looked_up(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding [B, T, dim]."""
        if self.group.is_alone:
            return self.embed(tokens)
        places = tokens - self.vocabulary.start
        is_here = (places >= 0) & (places < len(self.vocabulary))
        rows = self.embed(places.clamp(0, len(self.vocabulary) - 1))
        return self.group.all_reduce(torch.where(is_here.unsqueeze(-1), rows, 0))

    def logits(self, x: Tensor, select: Tensor | None = None) -> Tensor:
        """Hidden [B, T, dim] -> float32 logits [B, N, V] at `select` [B, N] (None: all T)."""
        if select is not None:
            x = x.gather(1, select.unsqueeze(-1).expand(-1, -1, x.size(-1)))  # [B, N, dim]
        return self.gathered(self.own_logits(x))

    def own_logits(self, x: Tensor) -> Tensor:
        """Hidden [B, T, dim] -> float32 logits [B, T, len(vocabulary)]."""
        return self.scaled(self.head(self.norm(x)))

    def gathered(self, logits: Tensor) -> Tensor:
        """Each rank's own logits -> those of all tokens [B, T, V], on every rank."""
        if self.group.is_alone:
            return logits
        most = -(-self.config.vocab_size // self.group.size)
        parts = self.group.all_gather(F.pad(logits, (0, most - logits.size(-1))))
        sizes = [len(ids) for ids in self.group.shares(self.config.vocab_size)]
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    def likeliest(self, logits: Tensor, best: Tensor | None = None) -> Tensor:
        """Each rank's own logits [B, T, len(vocabulary)], and of each the first of the largest
        [B, T] where that is known -> the likeliest of all tokens [B, T], ties to the lowest id, on
        every rank. (Only a number and an id of each rank are exchanged.)
        """
        if best is None:
            best = first_argmax(logits.flatten(0, 1)).view(logits.shape[:2])
        if self.group.is_alone:
            return best
        value = logits.gather(-1, best.unsqueeze(-1)).double()  # which holds any id, too
        pair = torch.cat((value, (best + self.vocabulary.start).unsqueeze(-1).double()), dim=-1)
        values, ids = self.group.all_gather(pair).unbind(-1)  # [ranks, B, T]
        rank = first_argmax(values.flatten(1).t()).view(1, *best.shape)
        return ids.gather(0, rank)[0].long()

    @property
    def scales_logits(self) -> bool:
        """Whether `scaled` changes any number."""
        return self.config.logits_divisor != 1 or self.config.logits_softcap is not None

    def scaled(self, logits: Tensor) -> Tensor:
        """What the head gives -> float32 logits, as the facts scale them."""
        logits, divisor = logits.float(), self.config.logits_divisor
        logits = logits if divisor == 1 else logits / divisor
        cap = self.config.logits_softcap
        return logits if cap is None else cap * (logits / cap).tanh()


class Block(nn.Module):
    """Attention and MLP, each added to the stream, with norms where the facts have them."""

    def __init__(self, config: ModelConfig, layer: int, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        before, behind = config.norms in ("pre", "both"), config.norms in ("post", "both")
        self.attention_norm = build_norm(config) if before else nn.Identity()
        self.attention = build_attention(config, layer, group)
        self.attention_post_norm = build_norm(config) if behind else nn.Identity()
        self.mlp_norm = build_norm(config) if before and not config.shared_norm else nn.Identity()
        self.is_sparse = config.has_experts(layer)
        self.mlp = (
            Experts(config, group) if self.is_sparse else build_mlp(config, config.hidden_dim)
        )
        self.mlp_post_norm = build_norm(config) if behind else nn.Identity()
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_norm
        self.multiplier = config.residual_multiplier
        # Blocks of one kind differ in nothing but their numbers: they share a compiled graph.
        self.kind = (self.attention.window, config.layer_rope(layer) is None, self.is_sparse)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]. `cache` is this layer's own, so that all blocks of a kind
        share one compiled graph.
        """
        normed = self.attention_norm(x)
        y = self.group.all_reduce(self.attention(normed, positions, cos_sin, cache))
        attended = torch.add(x, self.attention_post_norm(y), alpha=self.multiplier)
        if not self.parallel:
            normed = self.mlp_norm(attended)
        elif not self.shared_norm:
            normed = self.mlp_norm(x)
        if self.is_sparse:
            is_padding = None if cache is None else positions >= cache.max_seq_len
            y = self.mlp(normed, is_padding)
        else:
            y = self.mlp(normed)
        y = self.group.all_reduce(y)
        return torch.add(attended, self.mlp_post_norm(y), alpha=self.multiplier)


def fused_rows(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Rows of each part of the fused weight or bias `name`, in order; None where a parameter is one
    piece. (Of an expert's weight, where experts are stacked.)
    """
    if ".attention.qkv." in name:
        kv_rows = config.num_kv_heads * config.head_dim
        return config.num_heads * config.head_dim, kv_rows, kv_rows
    for part, hidden_dim in (
        (".mlp.gate_up.", config.hidden_dim),
        (".mlp.expert_gate_up.", config.experts.hidden_dim if config.experts else 0),
        (".mlp.shared.gate_up.", config.experts.shared_hidden_dim if config.experts else 0),
    ):
        if part in name:
            return hidden_dim, hidden_dim
    return None


def keeps_float32(name: str) -> bool:
    """Whether the parameter `name` is never narrowed: biases of a choice between close scores."""
    return name.endswith(".router.correction")


def _table(num_rows: int, dim: int) -> nn.Embedding:
    """An embedding without numbers: its own initialisation imports the compiler where it meets the
    meta device, and that takes a second.
    """
    return nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim))
