"""ModelConfig: the frozen facts of one architecture, and the check that they fit together.

Knows no model family, no file and no tensor. Families fill it in (families.py), the decoder reads
it (model.py).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoFormer, 2104.09864) and how their frequencies stretch beyond the trained
    context.

    `scaling` names the rule: "linear" (positions divided by `factor`), "dynamic" (NTK-aware: the
    base grows with the row's length beyond `original_max_seq_len`), "llama3" (Llama 3.1: long
    wavelengths divided, short kept) and "yarn" (2309.00071; `attention_factor` multiplies cos and
    sin).
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_seq_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(
                f"rope theta {self.theta} and factor {self.factor} must both be positive"
            )
        if self.scaling in ("dynamic", "llama3", "yarn") and self.original_max_seq_len <= 0:
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


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder computes. Sizes count elements; `rope` None means learned positions."""

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
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size dim num_layers num_heads num_kv_heads head_dim hidden_dim max_seq_len"
        ).split():
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; a positive whole number is needed")
        for name in "gated_mlp tied_head qkv_bias out_bias mlp_bias".split():
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; true or false is needed")
        if not (self.bos_token_id is None or _is_whole(self.bos_token_id)):
            raise ValueError(f"bos_token_id is {self.bos_token_id!r}; a token id or null is needed")
        if not all(map(_is_whole, self.eos_token_ids)):
            raise ValueError(f"eos_token_ids are {self.eos_token_ids}; token ids are needed")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value "
                "heads: the first must be a multiple of the second"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, found {self.head_dim}")
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps!r}; a number of at least 0 is needed")

    @property
    def num_parameters(self) -> int:
        """Number of distinct weights (a tied head counts once)."""
        norm = self.dim * (2 if self.norm == "layer" else 1)
        q_rows, kv_rows = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        attention = (q_rows + kv_rows) * (self.dim + self.qkv_bias) + self.dim * q_rows
        attention += self.dim * self.out_bias
        up_rows = self.hidden_dim * (2 if self.gated_mlp else 1)
        mlp = up_rows * (self.dim + self.mlp_bias) + self.dim * (self.hidden_dim + self.mlp_bias)
        embeddings = self.vocab_size * self.dim * (1 if self.tied_head else 2)
        positions = 0 if self.rope is not None else self.max_seq_len * self.dim
        return embeddings + positions + self.num_layers * (attention + mlp + 2 * norm) + norm

    @property
    def prefixes_are_reusable(self) -> bool:
        """Whether a cached key serves every longer text: not under dynamic rope, where keys depend
        on the length of the text they were read with.
        """
        return self.rope is None or self.rope.scaling != "dynamic"

    def cache_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values that one token of one row occupies, at `element_size` bytes a
        number.
        """
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
