"""One product of up to 16 rows with a weight, and what belongs to it: what `quantize.kernels.cuda`
checks and `quantize.kernels.triton_launch` launches.
"""

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """What the op `triton_linear` takes: see `fused_linear`. `norm`: layer, rms, rms_offset or "".
    `format`: of a quantized weight, whose `weight` are words; else "". `gated`: `activation` is
    that of the first half of the weight's rows, by which the second half is multiplied.
    """

    x: Tensor
    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    norm: str
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    residual: Tensor | None
    multiplier: float
    activation: str
    gated: bool
    out_features: int
    format: str

    @property
    def out_shape(self) -> tuple[int, ...]:
        width = self.out_features // 2 if self.gated else self.out_features
        return (*self.x.shape[:-1], width)

    def result(self) -> Tensor:
        """A place for the result."""
        return self.x.new_empty(self.out_shape)
