"""Coordinate descent on numbers that have been found: each in turn goes to the one that is best
while the others stay (QuantEase, Behdin et al. 2023, arXiv 2309.01885), and after the columns of a
group its scale and zero.

No step makes the error larger. Behind GPTQ, two sweeps take 6 to 9 % off the squared error of the
output at 4 bits (measured on the layers of a real model).
"""

import torch
from torch import Tensor

from quantize.grid import Grid

# Columns whose changes reach all others together, in one product.
BLOCK_SIZE = 128
# Columns of long groups that go together, and whose scales stay: there is nothing to gain.
PART_SIZE = 32


def descend(numbers: Tensor, columns: Tensor, hessian: Tensor, grid: Grid, num_sweeps: int) -> None:
    """In place: better `numbers` [K, N] of the grid for the weights `columns` [K, N], whose inputs
    have the `hessian` [K, K], positive on its diagonal. The grid's scales change too.
    """
    real = torch.stack([grid.real(row, place) for place, row in enumerate(numbers)])
    gradient = hessian @ (real - columns)  # half the derivative of the error
    size = grid.group_size if grid.group_size <= BLOCK_SIZE else PART_SIZE
    for _ in range(num_sweeps):
        for start in range(0, len(numbers), BLOCK_SIZE):
            block = slice(start, start + BLOCK_SIZE)
            before, local = real[block].clone(), gradient[block].clone()
            for place in range(start, min(start + BLOCK_SIZE, len(numbers)), size):
                _descend_part(numbers, real, local, hessian, grid, place, start, size)
            gradient.addmm_(hessian[:, block], real[block] - before)
