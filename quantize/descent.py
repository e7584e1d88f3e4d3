"""Coordinate descent on numbers that have been found: each in turn becomes the one that is best
while the others stay (QuantEase, Behdin et al. 2023, arXiv 2309.01885), and after the columns of a
group its scale and zero.

No step makes the error of the output larger. Behind GPTQ, two sweeps take 8 % off it at 4 bits
(measured on the layers of a real model).
"""

import torch
from torch import Tensor

from quantize.grid import Grid

# Columns whose changes reach all others together, in one product.
BLOCK_SIZE = 128
# Columns of a longer group that go together; its scale stays, as there is next to nothing to gain.
PART_SIZE = 32


def descend(numbers: Tensor, columns: Tensor, hessian: Tensor, grid: Grid, num_sweeps: int) -> None:
    """In place: better `numbers` [K, N] of the grid, and better scales of the grid, for weights
    `columns` [K, N] whose inputs have the `hessian` [K, K], positive on its diagonal.
    """
    real = grid.real(numbers)
    gradient = hessian @ (real - columns)  # half the derivative of the error by the weights
    keeps_scales = grid.group_size > BLOCK_SIZE or grid.form.kind == "mxfp4"
    size = PART_SIZE if grid.group_size > BLOCK_SIZE else grid.group_size
    for _ in range(num_sweeps):
        for start in range(0, len(numbers), BLOCK_SIZE):
            block = slice(start, start + BLOCK_SIZE)
            before, corner = real[block].clone(), hessian[block, block]
            local = gradient[block].clone()
            for first in range(0, len(before), size):
                part = slice(first, first + size)
                place, own = start + first, corner[part, part]
                here, there = numbers[block][part], real[block][part]
                old = there.clone()
                _each_column(here, there, local[part].clone(), own, grid, place)
                if not keeps_scales:
                    slope = torch.addmm(local[part], own, there - old)
                    there.copy_(grid.refit(place, here, slope, own))
                local.addmm_(corner[:, part], there - old)
            gradient.addmm_(hessian[:, block], real[block] - before)


def _each_column(
    numbers: Tensor, real: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid, place: int
) -> None:
    """Columns from `place` on, in place: numbers and what they stand for, and the gradient."""
    for i in range(len(numbers)):
        best = real[i] - gradient[i] / hessian[i, i]
        numbers[i], new = grid.round(best, place + i)
        gradient.addr_(hessian[i], new - real[i])
        real[i] = new
