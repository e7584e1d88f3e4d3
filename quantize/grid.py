"""The grid of a weight whose columns are rounded one at a time: scales and zeros of its groups.

Columns come as rows of memory, [K, N]: the numbers of a column, and a group's scales, stand
together.
"""

import torch
from torch import Tensor

from quantize.formats import Format
from quantize.rounding import find_scales
from quantize.scale_search import nearest, real_scales


class Grid:
    """Of a weight [N, K], with the scales that `find_scales` gives it. `scales` and `zeros` [N,
    groups] are as they are stored; ValueError as there.
    """

    def __init__(
        self, weight: Tensor, importance: Tensor, form: Format, search: bool, name: str
    ) -> None:
        self.form, self.search, self.name, self.importance = form, search, name, importance
        self.group_size = form.group_size or weight.size(1)
        self.scales, self.zeros = find_scales(
            weight, form, search=search, importance=importance, name=name
        )
        self._scale = real_scales(self.scales).t().contiguous()
        self._zero = None if self.zeros is None else self.zeros.float().t().contiguous()

    def round(self, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Weights [N] of column `place` -> its numbers, and what these stand for."""
        scale, zero = self._of(place)
        if zero is None:
            numbers = nearest(column * (1 / scale), self.form)
            return numbers, numbers * scale
        numbers = nearest(torch.addcmul(zero, column, 1 / scale), self.form)
        return numbers, (numbers - zero) * scale

    def real(self, numbers: Tensor) -> Tensor:
        """What the numbers [K, N] of all columns stand for."""
        size = self.group_size
        real = numbers.clone()
        for group, part in enumerate(real.split(size)):
            if self._zero is not None:
                part -= self._zero[group]
            part *= self._scale[group]
        return real

    def find_again(self, place: int, columns: Tensor) -> None:
        """Scales of the group that begins at column `place`, from its `columns` [G, N]."""
        importance = self.importance[place : place + len(columns)]
        scale, zero = find_scales(
            columns.t(), self.form, search=self.search, importance=importance, name=self.name
        )
        self._put(place, scale[:, 0], None if zero is None else zero[:, 0])

    def refit(self, place: int, numbers: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
        """Moves scale, then zero, of the group that begins at column `place` to where the error of
        the output is least, while its `numbers` [G, N] stay. `gradient` [G, N] is half the error's
        derivative by the weights of the group, `hessian` [G, G] its part. Returns its weights.
        """
        scale, zero = self._of(place)
        if zero is None:
            scale = _best_step(scale, numbers, gradient, hessian, self.scales.dtype)
            self._put(place, scale, None)
            return numbers * scale
        shifted = numbers - zero
        fitted = _best_step(scale, shifted, gradient, hessian, self.scales.dtype)
        gradient = gradient + hessian @ (shifted * (fitted - scale))
        down = -fitted.expand_as(numbers)  # so the weights go as the zero goes up
        zero = _best_step(zero, down, gradient, hessian, self.scales.dtype)
        self._put(place, fitted, zero)
        return (numbers - zero) * fitted

    def _of(self, place: int) -> tuple[Tensor, Tensor | None]:
        group = place // self.group_size
        return self._scale[group], None if self._zero is None else self._zero[group]

    def _put(self, place: int, scale: Tensor, zero: Tensor | None) -> None:
        group = place // self.group_size
        self.scales[:, group], self._scale[group] = scale, real_scales(scale)
        if self.zeros is not None and self._zero is not None and zero is not None:
            self.zeros[:, group], self._zero[group] = zero, zero.float()


def _best_step(
    value: Tensor, direction: Tensor, gradient: Tensor, hessian: Tensor, dtype: torch.dtype
) -> Tensor:
    """value [N], of which the weights [G, N] change by `direction` [G, N] for one: moved to where
    the error is least, in numbers of `dtype`, unless that gains nothing.
    """
    slope = (gradient * direction).sum(0)
    curvature = ((hessian @ direction) * direction).sum(0)
    wanted = (value - slope / curvature).to(dtype).float()
    step = wanted - value
    gains = step * (2 * slope + step * curvature) < 0  # not where it is no number
    return torch.where(gains, wanted, value)
