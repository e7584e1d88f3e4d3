"""ModelConfig: the frozen facts of one architecture, and the check that they fit together.

Knows no model family, no file and no tensor. Families fill it in (families.py), the decoder reads
it (model.py).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoFormer, 2104.09864) and how their frequencies stretch beyond the trained
    context.

    `dim` numbers of a head are rotated, the first ones (None: all); pairs are (i, i + dim/2), or
    neighbours where `interleaved`. `scaling` names the rule: "linear" (positions divided by
    `factor`), "dynamic" (NTK-aware: the base grows with the row's length beyond
    `original_max_seq_len`), "llama3" (Llama 3.1: long wavelengths divided, short kept), "yarn"
    (2309.00071; `attention_factor` multiplies cos and sin) and "longrope" (2402.13753: each
    frequency divided by its own factor, one list for rows up to `original_max_seq_len`, one for
    longer ones).
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_seq_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    dim: int | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(
                f"rope theta {self.theta} and factor {self.factor} must both be positive"
            )
        needs_original = self.depends_on_length or self.scaling in ("llama3", "yarn")
        if needs_original and self.original_max_seq_len <= 0:
            raise ValueError(f"rope scaling {self.scaling!r} needs the original context length")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"llama3 rope scaling needs high_freq_factor ({self.high_freq_factor}) "
                f"> low_freq_factor ({self.low_freq_factor})"
            )
        if self.scaling == "yarn" and not (
            self.theta > 1 and self.beta_fast > 0 and self.beta_slow > 0
        ):
            raise ValueError(
                f"yarn rope scaling needs theta ({self.theta}) above 1 and positive beta_fast "
                f"({self.beta_fast}) and beta_slow ({self.beta_slow})"
            )
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"{self.dim} rotated numbers of a head; an even count is needed")

    @property
    def depends_on_length(self) -> bool:
        """Whether a key's rotation depends on the length of its row."""
        return self.scaling in ("dynamic", "longrope")


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP (1701.06538): each token goes through `num_active`
    of `num_experts` gated MLPs of `hidden_dim` units, and through a shared one where
    `shared_hidden_dim` > 0 (DeepSeekMoE, 2401.06066), weighted by a sigmoid where `shared_gate`.

    Scores are a softmax or a sigmoid of the router's outputs; with `correction_bias` a learned bias
    takes part in the choice only (2408.15664). Choice may be limited to the best
    `num_active_groups` of `num_groups` groups, scored by their best expert or best two. The chosen
    scores are the weights, divided by their sum where `normalize`, times `scale`.
    """

    num_experts: int
    num_active: int
    hidden_dim: int
    shared_hidden_dim: int = 0
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    num_active_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    router_bias: bool = False
    bias: bool = False
    dense_layers: tuple[int, ...] = ()  # these have a plain MLP of the model's hidden_dim

    def __post_init__(self) -> None:
        for name in "num_experts num_active hidden_dim num_groups num_active_groups".split():
            _check_size(name, getattr(self, name))
        if self.num_active > self.num_experts:
            raise ValueError(
                f"{self.num_active} of {self.num_experts} experts cannot be active for a token"
            )
        if self.num_experts % self.num_groups or self.num_active_groups > self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts in {self.num_groups} groups, of which "
                f"{self.num_active_groups} are active, do not fit together"
            )
        reach = self.num_experts // self.num_groups * self.num_active_groups
        if self.num_active > reach:
            raise ValueError(
                f"{self.num_active} experts are active for a token; the groups that may be chosen "
                f"have {reach}"
            )


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values of all heads come from
    one vector of `kv_rank` numbers a token, beside `rope_dim` rotated ones; this is what the cache
    holds. A head's query and key have `nope_dim` + `rope_dim` numbers, its value `value_dim`.
    Queries come from a vector of `q_rank` numbers, or from the stream itself (None).
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None

    def __post_init__(self) -> None:
        for name in "kv_rank nope_dim rope_dim value_dim".split():
            _check_size(name, getattr(self, name))
        if self.q_rank is not None:
            _check_size("q_rank", self.q_rank)


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder computes. Sizes count elements; absent parts are None, empty or neutral.

    Positions are known by rotation (`rope`), by a learned table, by `alibi` (a slope per head,
    2108.12409), or not at all. A layer sees only its `windows` entry of latest tokens (None: all);
    layers with a window rotate by `local_rope` where it is given, `nope_layers` not at all.

    `norms` stand before attention and MLP ("pre"), behind them ("post"), or at "both" places.
    Attention and MLP follow each other, or with `parallel_residual` read the same stream, from one
    norm where `shared_norm`. `qk_norm`: queries and keys are normalised a "head" at a time, with
    weights of its own for each of the "heads", or "all" heads at once.
    """

    model_type: str
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_seq_len: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    rope: RopeConfig | None
    tied_head: bool
    local_rope: RopeConfig | None = None
    nope_layers: tuple[int, ...] = ()
    learned_positions: bool = False
    position_offset: int = 0  # rows of the learned table before that of position 0
    alibi: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    norms: Literal["pre", "post", "both"] = "pre"
    norm_bias: bool = True  # of layer norms; the other kind has none
    norm_offset: bool = False  # weights are stored as the difference from one
    parallel_residual: bool = False
    shared_norm: bool = False
    embedding_norm: bool = False
    qk_norm: Literal["none", "head", "heads", "all"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qkv_clip: float | None = None
    attention_scale: float | None = None  # of query times key; None: 1/sqrt(head_dim)
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    attention_sinks: bool = False  # a learned score per head that takes part in the softmax only
    logits_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    swiglu_limit: float | None = None  # clamps gate and up; up is then one more (gpt-oss)
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size dim num_layers num_heads num_kv_heads head_dim hidden_dim max_seq_len"
        ).split():
            _check_size(name, getattr(self, name))
        for name in (
            "gated_mlp tied_head qkv_bias out_bias mlp_bias head_bias norm_bias norm_offset "
            "parallel_residual shared_norm embedding_norm learned_positions attention_sinks"
        ).split():
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; true or false is needed")
        if not (self.bos_token_id is None or _is_whole(self.bos_token_id)):
            raise ValueError(f"bos_token_id is {self.bos_token_id!r}; a token id or null is needed")
        if not all(map(_is_whole, self.eos_token_ids)):
            raise ValueError(f"eos_token_ids are {self.eos_token_ids}; token ids are needed")
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps!r}; a number of at least 0 is needed")
        for name in "attention_scale attention_softcap logits_softcap qkv_clip".split():
            value = getattr(self, name)
            if not (value is None or (isinstance(value, int | float) and 0 < value < math.inf)):
                raise ValueError(f"{name} is {value!r}; a positive number or null is needed")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("attention and MLP share a norm only where they read the same stream")
        self._check_heads()
        self._check_layers()

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value "
                "heads: the first must be a multiple of the second"
            )
        rotated = self.head_dim if self.latent is None else self.latent.rope_dim
        for rope in filter(None, (self.rope, self.local_rope)):
            if (rope.dim or rotated) % 2 or (rope.dim or rotated) > rotated:
                raise ValueError(
                    f"rotary positions need an even head size, found {rope.dim or rotated} "
                    f"(of heads of {rotated})"
                )
            for factors in (rope.short_factors, rope.long_factors):
                if rope.scaling == "longrope" and len(factors) != (rope.dim or rotated) // 2:
                    raise ValueError(
                        f"longrope has {len(factors)} factors; one for each of "
                        f"{(rope.dim or rotated) // 2} frequencies is needed"
                    )
        if self.alibi and len(self.alibi) != self.num_heads:
            raise ValueError(f"{len(self.alibi)} alibi slopes for {self.num_heads} heads")

    def _check_layers(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"{len(self.windows)} attention windows for {self.num_layers} layers; "
                "one for each layer is needed"
            )
        for window in self.windows:
            if window is not None:
                _check_size("sliding window", window)

    # -- what a layer is --

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> RopeConfig | None:
        if layer in self.nope_layers:
            return None
        local = self.local_rope is not None and self.window(layer) is not None
        return self.local_rope if local else self.rope

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers

    # -- sizes --

    @property
    def num_parameters(self) -> int:
        """Number of distinct weights (a tied head counts once)."""
        num_sparse = sum(map(self.has_experts, range(self.num_layers)))
        per_norm = self.dim * self._norm_width
        norms_per_layer = 4 if self.norms == "both" else 1 if self.shared_norm else 2
        layers = self.num_layers * (self._attention_size() + norms_per_layer * per_norm)
        layers += (self.num_layers - num_sparse) * self._mlp_size(self.hidden_dim)
        layers += num_sparse * self._experts_size()
        tables = self.vocab_size * self.dim * (1 if self.tied_head else 2)
        tables += self.vocab_size if self.head_bias else 0
        if self.learned_positions:
            tables += (self.max_seq_len + self.position_offset) * self.dim
        return tables + layers + per_norm * (2 if self.embedding_norm else 1)

    def _attention_size(self) -> int:
        if self.latent is not None:
            return self._latent_attention_size(self.latent)
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        size = (q_rows + 2 * kv_rows) * (self.dim + self.qkv_bias) + self.dim * q_rows
        size += self.dim * self.out_bias + self.num_heads * self.attention_sinks
        norms = {
            "none": 0,
            "head": 2 * self.head_dim * self._norm_width,
            "heads": q_rows + kv_rows,
            "all": (q_rows + kv_rows) * self._norm_width,
        }
        return size + norms[self.qk_norm]

    @property
    def _norm_width(self) -> int:
        """Weights of a norm for each number that it norms."""
        return 2 if self.norm == "layer" and self.norm_bias else 1

    def _latent_attention_size(self, latent: LatentConfig) -> int:
        q_rows = self.num_heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            size = q_rows * self.dim
        else:
            size = latent.q_rank * (self.dim + self.qkv_bias + 1 + q_rows)
        size += (latent.kv_rank + latent.rope_dim) * (self.dim + self.qkv_bias) + latent.kv_rank
        size += self.num_heads * (latent.nope_dim + latent.value_dim) * latent.kv_rank
        return size + self.dim * (self.num_heads * latent.value_dim + self.out_bias)

    def _mlp_size(self, hidden_dim: int) -> int:
        up_rows = hidden_dim * (2 if self.gated_mlp else 1)
        return up_rows * (self.dim + self.mlp_bias) + self.dim * (hidden_dim + self.mlp_bias)

    def _experts_size(self) -> int:
        if (experts := self.experts) is None:
            return 0
        expert = 2 * experts.hidden_dim * (self.dim + experts.bias)
        expert += self.dim * (experts.hidden_dim + experts.bias)
        size = experts.num_experts * (
            expert + self.dim + experts.router_bias + experts.correction_bias
        )
        size += self._mlp_size(experts.shared_hidden_dim) if experts.shared_hidden_dim else 0
        return size + (self.dim if experts.shared_gate else 0)

    @property
    def num_active_parameters(self) -> int:
        """Number of weights that take part in one token: all, or the chosen experts' of a mixture
        of experts.
        """
        if self.experts is None:
            return self.num_parameters
        num_sparse = sum(map(self.has_experts, range(self.num_layers)))
        expert = 2 * self.experts.hidden_dim * (self.dim + self.experts.bias)
        expert += self.dim * (self.experts.hidden_dim + self.experts.bias)
        idle = self.experts.num_experts - self.experts.num_active
        return self.num_parameters - num_sparse * idle * expert

    @property
    def max_reusable_length(self) -> int:
        """Length of a text up to which its cached keys serve every other text that begins so and is
        no longer than this. Beyond it, "dynamic" and "longrope" rotate keys by the length of the
        text they were read with.
        """
        ropes = (self.rope, self.local_rope)
        limits = [rope.original_max_seq_len for rope in ropes if rope and rope.depends_on_length]
        return min(limits, default=self.max_seq_len)

    @property
    def reread_length(self) -> int | None:
        """Length of a text beyond which its cached keys must be computed anew, once: "longrope"
        rotates by other factors from there on.
        """
        ropes = (self.rope, self.local_rope)
        limits = [
            rope.original_max_seq_len for rope in ropes if rope and rope.scaling == "longrope"
        ]
        return min(limits, default=None)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """What a layer keeps of a token: heads, numbers of a key, numbers of a value (0: the value
        is a part of the key).
        """
        if self.latent is not None:
            return 1, self.latent.kv_rank + self.latent.rope_dim, 0
        return self.num_kv_heads, self.head_dim, self.head_dim

    def cache_bytes_per_token(self, element_size: int, scale_size: int = 0) -> int:
        """Bytes of keys and values that one token of one row occupies, at `element_size` bytes a
        number and `scale_size` bytes for each of the two scales of a head.
        """
        num_heads, key_dim, value_dim = self.cache_shape
        per_head = (key_dim + value_dim) * element_size + 2 * scale_size
        return self.num_layers * num_heads * per_head


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: Any) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; a positive whole number is needed")
