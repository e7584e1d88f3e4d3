"""Attention of a block: from the stream to queries, keys and values, through the cache, and back.

Letters: B rows, T new tokens, H query heads, H_kv key/value heads, D head size, R latent size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.cache import LayerCache
from gptfast.config import ModelConfig
from gptfast.kernels.attention import attention, attention_on_any_device
from gptfast.layers import HeadNorm, RMSNorm, build_norm
from gptfast.parallel import ALONE, Group
from gptfast.rope import rotate

CosSin = tuple[Tensor, Tensor]
# DeepSeek's norms inside of attention have this one, whatever config.json says of the others.
LATENT_NORM_EPS = 1e-6


def build_attention(config: ModelConfig, layer: int, group: Group = ALONE) -> nn.Module:
    if config.latent is not None:
        return LatentAttention(config, layer)
    return Attention(config, layer, group)


class _CachedAttention(nn.Module):
    """What both kinds share: how scores come about, and the way through the cache."""

    slopes: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        rope = config.layer_rope(layer)
        self.interleaved = rope is not None and rope.interleaved
        self.scale = config.attention_scale or config.head_dim**-0.5
        window = config.window(layer)  # one as long as the context hides nothing
        self.window = window if window is not None and window < config.max_seq_len else None
        self.softcap = config.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.attention_sinks else None
        # Real numbers even while the weights are still on the meta device.
        slopes = torch.tensor(config.alibi, device="cpu") if config.alibi else None
        self.register_buffer("slopes", slopes, persistent=False)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """q [B, T, H, D], k and v [B, T, H_kv, D or E] -> [B, T, H, E]; k and v are written to the
        cache first. A cache without values keeps v as the first numbers of k.
        """
        scoring = (self.scale, self.window, self.softcap, self.sinks, self.slopes)
        if cache is None:  # the new tokens, in their order, are all there are
            spare = (0, 0, 0, 1)
            keys, values = (F.pad(t.transpose(1, 2), spare) for t in (k, v))
            order = torch.arange(q.size(1), device=q.device).expand(q.shape[:2])
            # Not the op: this one has gradients.
            return attention_on_any_device(q, keys, values, order, None, *scoring)
        cache.write(k, v, positions)
        values, value_scales = cache.values_of(v.size(-1))
        options = (*scoring, cache.key_scales, value_scales)
        return attention(q, cache.keys, values, positions, cache.bound, *options)


class Attention(_CachedAttention):
    """Grouped-query attention (2305.13245), one fused projection for queries, keys, values. In a
    group of several ranks, the heads of one, and its part of the sum that comes out.
    """

    def __init__(self, config: ModelConfig, layer: int, group: Group = ALONE) -> None:
        super().__init__(config, layer)
        self.group = group
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.clip = config.head_dim, config.qkv_clip
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=config.out_bias)
        self.q_norm = _build_head_norm(config, config.num_heads)
        self.k_norm = _build_head_norm(config, config.num_kv_heads)
        self.norms_all_heads = config.qk_norm == "all"

    def forward(
        self, x: Tensor, positions: Tensor, cos_sin: CosSin | None, cache: LayerCache | None
    ) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = self.qkv(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=2)
        if self.norms_all_heads:
            q, k = self._normed_together(q, k)
        else:
            q, k = self.q_norm(q), self.k_norm(k)  # [B, T, H or H_kv, D]
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin, self.interleaved), rotate(k, *cos_sin, self.interleaved)
        return self.out(self.attend(q, k, v, positions, cache).flatten(2))

    def _normed_together(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norms over all heads, those of other ranks included, of which each is on equally many."""
        q, k = q.flatten(2), k.flatten(2)
        of_q = of_k = None
        if not self.group.is_alone:
            means = torch.stack([x.float().square().mean(-1, True) for x in (q, k)])
            of_q, of_k = (self.group.all_reduce(means) / self.group.size).unbind()
        q, k = self.q_norm(q, of_q), self.k_norm(k, of_k)
        return q.unflatten(2, (-1, self.head_dim)), k.unflatten(2, (-1, self.head_dim))


class LatentAttention(_CachedAttention):
    """Multi-head latent attention (2405.04434), in the form in which only latents are cached and
    read: the projections from latents to keys and values move to the queries and the result. In a
    group of several ranks all have the latents, and each some of the heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.latent is not None
        self.latent, self.num_heads = config.latent, config.num_heads
        latent, q_dim = config.latent, config.dim
        self.q_a: nn.Module = nn.Identity()
        self.q_norm: nn.Module = nn.Identity()
        if latent.q_rank is not None:
            q_dim = latent.q_rank
            self.q_a = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
            self.q_norm = RMSNorm(q_dim, LATENT_NORM_EPS)
        q_rows = config.num_heads * (latent.nope_dim + latent.rope_dim)
        self.q = nn.Linear(q_dim, q_rows, bias=False)
        self.kv_a = nn.Linear(config.dim, latent.kv_rank + latent.rope_dim, bias=config.qkv_bias)
        self.kv_norm = RMSNorm(latent.kv_rank, LATENT_NORM_EPS)
        kv_rows = config.num_heads * (latent.nope_dim + latent.value_dim)
        self.kv_b = nn.Parameter(torch.empty(kv_rows, latent.kv_rank))
        self.out = nn.Linear(config.num_heads * latent.value_dim, config.dim, bias=config.out_bias)

    def forward(
        self, x: Tensor, positions: Tensor, cos_sin: CosSin | None, cache: LayerCache | None
    ) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        sizes = self.latent
        q = self.q(self.q_norm(self.q_a(x))).unflatten(-1, (self.num_heads, -1))
        q, q_turned = q.split((sizes.nope_dim, sizes.rope_dim), dim=-1)
        latent, k_turned = self.kv_a(x).unsqueeze(2).split((sizes.kv_rank, sizes.rope_dim), dim=-1)
        latent = self.kv_norm(latent)  # [B, T, 1, R]
        if cos_sin is not None:
            q_turned = rotate(q_turned, *cos_sin, self.interleaved)
            k_turned = rotate(k_turned, *cos_sin, self.interleaved)
        heads = self.kv_b.unflatten(0, (self.num_heads, -1))  # [H, nope + value, R]
        to_key, to_value = heads.split((sizes.nope_dim, sizes.value_dim), dim=1)
        q = torch.einsum("bthd,hdr->bthr", q, to_key)
        q, k = torch.cat((q, q_turned), dim=-1), torch.cat((latent, k_turned), dim=-1)
        y = self.attend(q, k, latent, positions, cache)  # [B, T, H, R]
        return self.out(torch.einsum("bthr,hdr->bthd", y, to_value).flatten(2))


def _build_head_norm(config: ModelConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys that `ModelConfig.qk_norm` names."""
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "heads":
        plain = nn.LayerNorm(config.head_dim, config.norm_eps, elementwise_affine=False)
        return HeadNorm(num_heads, config.head_dim, plain)
    return build_norm(config, config.head_dim * (num_heads if config.qk_norm == "all" else 1))
