"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and what a
column gets wrong, those still to come make up for, as far as their inputs are correlated.

Groups stay in the order of the inputs also where columns are taken in the order of their
importance: all scales are found beforehand then, and nothing is looked up through an index when the
weight is used.
"""

import torch
from torch import Tensor

from quantize.descent import descend
from quantize.formats import Format, QuantizedWeight
from quantize.grid import Grid
from quantize.rounding import stored_numbers

# Columns whose errors reach those behind them together, in one product.
BLOCK_SIZE = 128
MOST_DAMPING = 1.0


def gptq(
    weight: Tensor,
    hessian: Tensor,
    form: Format,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    search: bool = True,
    num_sweeps: int = 2,
    name: str = "weight",
) -> QuantizedWeight:
    """weight [N, K] and the Hessian [K, K] of its inputs -> its stored form, on the same device.

    `act_order`: columns in the order of their importance, scales found beforehand; else from the
    first to the last, the scales of a group found when it is reached, from what the columns before
    it left to make up for. `damping`: the share of the mean diagonal that is added to the diagonal,
    more where that is not enough. `search`: as in `round_to_nearest`. `num_sweeps`: of coordinate
    descent, once all are rounded. Memory beyond the result: five copies of the weight and four of
    the Hessian, in float32. ValueError, which calls the weight `name`, for NaN or infinite numbers
    and for what is no Hessian.
    """
    _check(weight, hessian, damping, name)
    diagonal = hessian.diagonal().float()
    # A column that never had an input costs nothing; it is rounded for itself.
    diagonal = torch.where(diagonal > 0, diagonal, diagonal.mean().clamp(min=1e-30))
    order = torch.arange(len(diagonal), device=weight.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    factor, share = _inverse_factor(hessian, diagonal, order, damping, name)
    # What an error costs when all other columns make up for it: one over the inverse's diagonal.
    importance = torch.empty_like(diagonal)
    importance[order] = 1 / factor.square().sum(0)
    grid = Grid(weight.detach(), importance, form, search, name)
    columns = weight.detach().t().float().contiguous()  # [K, N]
    numbers = columns[order]
    _round_columns(numbers, factor, order.tolist(), grid, act_order or form.group_size is None)
    numbers = numbers[order.argsort()]
    del factor
    if num_sweeps:
        damped = hessian.float().clone()
        damped.diagonal().copy_(diagonal + share * diagonal.mean())
        descend(numbers, columns, damped, grid, num_sweeps)
    values = stored_numbers(numbers.t(), form)
    return QuantizedWeight(form, len(columns), values, grid.scales, grid.zeros).check()


def _round_columns(
    columns: Tensor, factor: Tensor, order: list[int], grid: Grid, keeps_scales: bool
) -> None:
    """In place: weights [K, N], of column order[j] in row j, become numbers of the grid. Unless the
    grid `keeps_scales`, those of a group are found when it is reached.
    """
    step = BLOCK_SIZE if keeps_scales else max(BLOCK_SIZE, grid.group_size)
    for start in range(0, len(columns), step):
        stop = start + step
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i, place in enumerate(order[start:stop]):
            if not keeps_scales and place % grid.group_size == 0:
                grid.find_again(place, block[i : i + grid.group_size])
            numbers, real = grid.round(block[i], place)
            torch.div(block[i] - real, corner[i, i], out=errors[i])
            block[i] = numbers
            block[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


def _inverse_factor(
    hessian: Tensor, diagonal: Tensor, order: Tensor, damping: float, name: str
) -> tuple[Tensor, float]:
    """U [K, K], upper triangular, where U^T U is the inverse of H with its columns in `order` and
    damped; and the damping that it took. Row j says how the columns from j on make up for an error
    in column j.
    """
    backwards = order.flip(0)
    damped = hessian.float()[backwards.unsqueeze(1), backwards]
    diagonal = diagonal[backwards]
    share = damping
    while share <= MOST_DAMPING:
        damped.diagonal().copy_(diagonal + share * diagonal.mean())
        # From back to front, H = L L^T makes inverse(L), turned round, the U that is wanted.
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            identity = torch.eye(len(lower), device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1), share
        share = max(10 * share, 0.001)
    raise ValueError(
        f"the Hessian of {name} is not positive, even with {MOST_DAMPING:.0%} of its mean diagonal "
        "added; it must be a sum of x^T x over real inputs"
    )


def _check(weight: Tensor, hessian: Tensor, damping: float, name: str) -> None:
    num_columns = weight.size(-1)
    if weight.dim() != 2 or hessian.shape != (num_columns, num_columns):
        raise ValueError(
            f"{name} {list(weight.shape)} and a Hessian {list(hessian.shape)} do not fit together; "
            "[N, K] and [K, K] are needed"
        )
    if not 0 <= damping <= MOST_DAMPING:
        raise ValueError(f"damping {damping} is not usable; 0 to {MOST_DAMPING} is, 0.01 is usual")
    if not bool(hessian.isfinite().all()) or bool((hessian.diagonal() < 0).any()):
        raise ValueError(f"the Hessian of {name} has NaN, infinite or negative squares")
