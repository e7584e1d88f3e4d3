"""Rotary positions: frequencies from the facts, angles from positions, rotation of queries and
keys.

A scaling rule is a function of the plain inverse frequencies; the table at the end of the file
names them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptfast.config import RopeConfig


class Rope(nn.Module):
    """Turns positions [B, T] into cos and sin [B, T, 1, R/2], float32, for R rotated numbers of a
    head.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim or head_dim
        # Real numbers even while the weights are still on the meta device.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        plain = 1.0 / config.theta**exponents
        inv_freq = SCALINGS[config.scaling](plain, config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        if config.scaling == "longrope":
            long_inv_freq = plain / torch.tensor(config.long_factors, device="cpu")
            self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)

    @property
    def depends_on_length(self) -> bool:
        """Whether the same position turns differently in a longer text."""
        return self.config.scaling in ("dynamic", "longrope")

    def forward(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`lengths` [B]: tokens known of each row (the whole prompt while it is read), on which
        "dynamic" and "longrope" depend.
        """
        inv_freq = self.inv_freq
        if self.config.scaling == "dynamic":
            inv_freq = self._stretched(lengths)  # [B, 1, R/2]
        elif self.config.scaling == "longrope":
            is_long = (lengths > self.config.original_max_seq_len).view(-1, 1, 1)
            inv_freq = torch.where(is_long, self.long_inv_freq, self.inv_freq)
        angles = positions.unsqueeze(-1).float() * inv_freq  # [B, T, R/2]
        scale = self.config.attention_factor
        return (angles.cos() * scale).unsqueeze(2), (angles.sin() * scale).unsqueeze(2)

    def _stretched(self, lengths: Tensor) -> Tensor:
        """Base grown by the row's length: theta * (factor * length / original - (factor - 1)) ^ (D
        / (D - 2)).
        """
        config, dim = self.config, self.dim
        length = lengths.clamp(min=config.original_max_seq_len).float()
        stretch = config.factor * length / config.original_max_seq_len - (config.factor - 1)
        # (theta * s^(D/(D-2)))^(-2i/D) is the plain frequency times s^(-2i/(D-2)).
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / (dim - 2)
        return self.inv_freq * stretch.view(-1, 1, 1) ** -steps


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the first R numbers of each head of x [B, T, H, D] in float32; keeps x's
    dtype.

    Pairs are (i, i + R/2), or neighbours where `interleaved`: these come out in the order of the
    others, which changes no product of a query with a key.
    """
    dim = 2 * cos.size(-1)
    turned = x[..., :dim].float()
    pairs = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    first, second = pairs
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if dim == x.size(-1) else torch.cat((turned, x[..., dim:]), dim=-1)


def _plain(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    return inv_freq


def _linear(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    return inv_freq / config.factor


def _llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Wavelengths shorter than original/high_freq_factor stay, longer than original/low_freq_factor
    are divided.
    """
    turns = config.original_max_seq_len * inv_freq / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / config.factor


def _yarn(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """NTK-by-parts: dimensions that turn often are kept, slow ones interpolated, with a ramp
    between.
    """
    dim = 2 * inv_freq.numel()

    def dimension(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns within the original context."""
        wavelength = config.original_max_seq_len / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    interpolate = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    return interpolate * inv_freq / config.factor + (1 - interpolate) * inv_freq


def _longrope(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    return inv_freq / torch.tensor(config.short_factors, device=inv_freq.device)


SCALINGS: dict[str, Callable[[Tensor, RopeConfig], Tensor]] = {
    "none": _plain,
    "linear": _linear,
    "dynamic": _plain,  # depends on the row's length: applied in forward
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,  # of short rows; forward knows the others
}
