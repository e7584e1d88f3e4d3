"""The small parts that every decoder is made of: norms, MLPs, and the table of activations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight (1910.07467), the mean in float32; with `offset` the weight is stored as
    its difference from one, and multiplied in float32.
    """

    def __init__(self, dim: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor, mean_square: Tensor | None = None) -> Tensor:
        """`mean_square` [.., 1], float32, where it is not that of x alone."""
        wide = x.float()
        if mean_square is None:
            mean_square = wide.square().mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(mean_square + self.eps)
        if self.offset:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return wide.to(x.dtype) * self.weight


class HeadNorm(nn.Module):
    """Norm of each head of x [B, T, H, D] by itself, with weights [H, D] of its own."""

    def __init__(self, num_heads: int, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, dim))
        self.plain = norm  # without weights

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) * self.weight


def build_norm(config: ModelConfig, dim: int | None = None) -> nn.Module:
    """The norm of the facts, over the stream or over `dim` numbers."""
    dim = config.dim if dim is None else dim
    if config.norm == "rms":
        return RMSNorm(dim, config.norm_eps, config.norm_offset)
    return nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)


def gated(gate: Tensor, up: Tensor, activation: str, limit: float | None) -> Tensor:
    """activation(gate) * up (2002.05202). With a limit, as gpt-oss has it: both are clamped and up
    is one more.
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    return ACTIVATIONS[activation](gate) * up


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x), gate and up fused in one weight."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * hidden_dim, bias=config.mlp_bias)
        self.down = nn.Linear(hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation, self.limit = config.activation, config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(gated(gate, up, self.activation, self.limit))


class MLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, config: ModelConfig, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, hidden_dim, bias=config.mlp_bias)
        self.down = nn.Linear(hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def build_mlp(config: ModelConfig, hidden_dim: int) -> nn.Module:
    return GatedMLP(config, hidden_dim) if config.gated_mlp else MLP(config, hidden_dim)
