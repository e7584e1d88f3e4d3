"""Sums over what a linear reads: for GPTQ the Hessian of its output error, for AWQ mean magnitudes.

The squared error of y = x W^T over inputs x, when W changes by D, is tr(D H D^T) with H = sum x^T x
(twice that is the second derivative, hence the name).
"""

import torch
from torch import Tensor

from quantize.formats import QuantizedWeight

# Columns that are multiplied with those from them on: the rest of H is its mirror image.
PANEL = 512
# Rows of input that are widened to float32 at a time.
MAX_ROWS = 2048


class HessianSum:
    """H = sum x^T x [K, K] and sum |x| [K], in float32, over all rows x [K] that were added.

    Memory: H, and MAX_ROWS rows in float32 while adding. The sums are kept where the inputs are.
    """

    def __init__(self, num_columns: int) -> None:
        self.num_rows = 0
        self._upper = torch.zeros(num_columns, num_columns)  # below the panels not to be read
        self._magnitude = torch.zeros(num_columns)

    def add(self, x: Tensor) -> None:
        """Inputs x [..., K] in any float dtype; ValueError for NaN or infinite ones."""
        rows = x.detach().reshape(-1, x.size(-1))
        if not bool(torch.isfinite(rows.sum(dtype=torch.float64))):
            raise ValueError("inputs of a linear have NaN or infinite numbers")
        self._upper, self._magnitude = self._upper.to(x.device), self._magnitude.to(x.device)
        self.num_rows += len(rows)
        for part in rows.split(MAX_ROWS):
            wide = part.float()
            self._magnitude += wide.abs().sum(0)
            for start in range(0, wide.size(1), PANEL):
                stop = start + PANEL
                self._upper[start:stop, start:].addmm_(wide[:, start:stop].t(), wide[:, start:])

    @property
    def hessian(self) -> Tensor:
        """H [K, K], all of it. Not a copy: the next `add` changes it."""
        for start in range(0, len(self._upper), PANEL):
            stop = start + PANEL
            self._upper[stop:, start:stop] = self._upper[start:stop, stop:].t()
        return self._upper

    @property
    def mean_square(self) -> Tensor:
        """Of each column [K]: what a squared error in a weight of it costs."""
        return self._upper.diagonal() / max(1, self.num_rows)

    @property
    def mean_abs(self) -> Tensor:
        """Of each column [K]."""
        return self._magnitude / max(1, self.num_rows)


def output_error(weight: Tensor, stored: QuantizedWeight | Tensor, hessian: Tensor) -> Tensor:
    """The summed squared error of the output: tr(D H D^T) for D = stored - weight [N, K]."""
    numbers = stored.dequantize() if isinstance(stored, QuantizedWeight) else stored
    difference = numbers.float() - weight.float()
    return torch.linalg.vecdot(difference @ hessian, difference).sum()
