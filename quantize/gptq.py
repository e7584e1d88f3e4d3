"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and what a
column gets wrong, those still to come make up for, as far as their inputs are correlated.

Groups stay in the order of the inputs also where columns are taken in the order of their
importance: all scales are found beforehand then, and nothing is looked up through an index when the
weight is used.
"""

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight
from quantize.hessian import HessianSum, output_error
from quantize.rounding import find_scales, stored_numbers
from quantize.scale_search import nearest, real_scales

__all__ = ["HessianSum", "gptq", "output_error"]

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
    name: str = "weight",
) -> QuantizedWeight:
    """weight [N, K] and the Hessian [K, K] of its inputs -> its stored form, on the same device.

    `act_order`: columns in the order of their importance, scales found beforehand; else from the
    first to the last, the scales of a group found when it is reached, from what the columns before
    it left to make up for. `damping`: the share of the mean diagonal that is added to the diagonal,
    more where that is not enough. `search`: as in `round_to_nearest`. Memory beyond the result:
    three copies of the weight and four of the Hessian, in float32. ValueError, which calls the
    weight `name`, for NaN or infinite numbers and for what is no Hessian.
    """
    _check(weight, hessian, damping, name)
    plain, diagonal = weight.detach(), hessian.diagonal().float()
    # A column that never had an input costs nothing; it is rounded for itself.
    diagonal = torch.where(diagonal > 0, diagonal, diagonal.mean().clamp(min=1e-30))
    order = torch.arange(len(diagonal), device=plain.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian, diagonal, order, damping, name)
    grid = _Grid(plain, diagonal, form, search, name)
    columns = plain.t()[order].float()  # [K, N]
    in_turn = not act_order and form.group_size is not None
    _round_columns(columns, factor, order.tolist(), grid, in_turn)
    numbers = columns[order.argsort()].t()
    values = stored_numbers(numbers, form)
    return QuantizedWeight(form, len(columns), values, grid.scales, grid.zeros).check()


def _round_columns(
    columns: Tensor, factor: Tensor, order: list[int], grid: "_Grid", in_turn: bool
) -> None:
    """In place: weights [K, N], column order[j] of the weight in row j, become the numbers of the
    format. `in_turn`: scales of a group are found when it is reached.
    """
    step = max(BLOCK_SIZE, grid.size) if in_turn else BLOCK_SIZE
    for start in range(0, len(columns), step):
        stop = start + step
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i, place in enumerate(order[start:stop]):
            if in_turn and place % grid.size == 0:
                grid.find_again(place, block[i : i + grid.size].t())
            errors[i] = grid.round(block[i], place) / corner[i, i]
            block[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


class _Grid:
    """The scales and zeros of all groups of a weight [N, K]: [N, groups] as they are stored, and
    for the column at hand as float32, a group to a row.
    """

    def __init__(
        self, weight: Tensor, importance: Tensor, form: Format, search: bool, name: str
    ) -> None:
        self.form, self.search, self.name, self.importance = form, search, name, importance
        self.size = form.group_size or weight.size(1)
        self.scales, self.zeros = self._found(weight, importance)
        self._scale = real_scales(self.scales).t().contiguous()
        self._zero = None if self.zeros is None else self.zeros.float().t().contiguous()

    def _found(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        found = find_scales
        return found(weight, self.form, search=self.search, importance=importance, name=self.name)

    def find_again(self, start: int, weight: Tensor) -> None:
        """For the group that begins at column `start`, of which `weight` [N, G] is left."""
        group = start // self.size
        importance = self.importance[start : start + self.size]
        scale, zero = self._found(weight.contiguous(), importance)
        self.scales[:, group], self._scale[group] = scale[:, 0], real_scales(scale[:, 0])
        if self.zeros is not None and self._zero is not None and zero is not None:
            self.zeros[:, group], self._zero[group] = zero[:, 0], zero[:, 0].float()

    def round(self, column: Tensor, place: int) -> Tensor:
        """In place: weights [N] of the column at `place` -> numbers. Returns what is wrong."""
        scale = self._scale[place // self.size]
        if self._zero is None:
            numbers = nearest(column * (1 / scale), self.form)
            wrong = torch.addcmul(column, numbers, scale, value=-1)
        else:
            zero = self._zero[place // self.size]
            numbers = nearest(torch.addcmul(zero, column, 1 / scale), self.form)
            wrong = torch.addcmul(column, numbers - zero, scale, value=-1)
        column.copy_(numbers)
        return wrong


def _inverse_factor(
    hessian: Tensor, diagonal: Tensor, order: Tensor, damping: float, name: str
) -> Tensor:
    """U [K, K], upper triangular, where U^T U is the inverse of H with its columns in `order` and
    damped. Row j says how an error in column j is made up for by the columns from there on.
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
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
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
