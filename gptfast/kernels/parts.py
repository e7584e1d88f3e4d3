"""A block taken apart for the kernels that run a whole decode step: its linears, its norms, and the
few facts that say how they follow each other. What they mean is `Block` of model.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where `is_layer`; with `offset` the weight is stored less one."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    is_layer: bool
    offset: bool


@dataclass(frozen=True)
class BlockParts:
    """The parts of a Block as a token passes them. `q_norm` and `k_norm` are over one head [D].
    `up` is gate and up in one where `is_gated`. Of `rotary_dim` numbers of a head (0: none) pairs
    are rotated.
    """

    attention_norm: Norm | None
    qkv: nn.Module
    q_norm: Norm | None
    k_norm: Norm | None
    out: nn.Module
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    up: nn.Module
    down: nn.Module
    mlp_post_norm: Norm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    slopes: Tensor | None
    is_gated: bool
    activation: str
    parallel: bool
    shared_norm: bool
    multiplier: float

    @property
    def linears(self) -> Sequence[nn.Module]:
        return self.qkv, self.out, self.up, self.down
