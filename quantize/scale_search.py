"""The scales (and zeros) of groups: from their largest value, or those of least squared error.

The search tries a grid of scales, and refits the best to the integers that it gave, in closed form.
Grid, refit and signed scales are llama.cpp's (`make_qx_quants`): the value of greatest magnitude
goes to the negative end, which has one step more. Integers and their scale and zero in turns are
HQQ's (Badri and Shaji 2023), with squares in place of its norm.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantize.formats import FP8_MAX, Format
from quantize.mxfp4 import SCALE_BIAS, VALUES

# Groups up to this length stand in columns, so that a sum over each is a sum of whole vectors.
LONGEST_COLUMN = 256
# The grid: the integers' range over that of the group. Below one some integers stay unused, above
# one the largest values are clipped, which pays the more the longer the group is. By bits: least,
# greatest in groups of 32, growth of that for each doubling (measured: 98 % of groups of normal and
# Laplace numbers, 8 to 8192 long, have their best in it).
RANGES = {2: (0.4, 1.6, 0.25), 3: (0.6, 1.3, 0.22), 4: (0.72, 1.14, 0.18), 8: (0.86, 1.0, 0.006)}
RANGES_WITH_ZERO = {2: (0.6, 1.6, 0.2), 3: (0.7, 1.2, 0.15), 4: (0.76, 1.08, 0.12), 8: (0.9, 1, 0)}
NUM_SCALES = 12
SHIFTS = (-0.4, 0.0, 0.4)  # of the zero, in steps
NUM_REFITS = 3


def nearest(x: Tensor, form: Format) -> Tensor:
    """In place: the format's number nearest to each of x, of two the even one."""
    if form.kind == "int":
        return x.round_().clamp_(form.qmin, form.qmax)
    if form.kind == "fp8":
        return x.copy_(x.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return x.div_(step).round_().mul_(step).clamp_(-VALUES[-1], VALUES[-1])


def real_scales(stored: Tensor) -> Tensor:
    """Stored scales as float32."""
    if stored.dtype != torch.uint8:
        return stored.float()
    exponents = stored.int() - SCALE_BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


class Groups:
    """Groups of one length, side by side: x float32 [G, n], or [n, G] where they are long. Each is
    divided by a power of two, so that no sum of squares vanishes or overflows. `rows` [r, K] with
    K a multiple of `size`; `importance` [K]. ValueError for NaN or infinite numbers.
    """

    def __init__(
        self, rows: Tensor, size: int, importance: Tensor | None = None, name: str = "weight"
    ) -> None:
        self.num_rows = len(rows)
        self.dim = 0 if size <= LONGEST_COLUMN else 1
        self.x = self._arranged(rows.float(), size)
        self.high, self.low = self.x.amax(self.dim, True), self.x.amin(self.dim, True)
        self.largest = torch.maximum(self.high, -self.low)
        if not bool(self.largest.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite numbers, so it cannot be quantized")
        # Clamped, for the power and its inverse to be normal numbers.
        exponent = self.largest.frexp().exponent.clamp_(-126, 126)
        self.power = torch.ldexp(torch.ones_like(self.largest), exponent)
        for tensor in (self.x, self.high, self.low, self.largest):
            tensor /= self.power
        self.weights = None if importance is None else self._arranged_importance(importance, size)
        self.scratch = torch.empty_like(self.x)

    def rounded(self, form: Format, search: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The format's numbers as float32 [r, K]; scales and zeros [r, groups] as stored."""
        scale, zero = self._as_stored(*self._plain(form), form)
        if search:
            found, found_zero = self._as_stored(*self._searched(form), form)
            better = self._error(found, found_zero, form) < self._error(scale, zero, form)
            better &= self._stays_finite(found, found_zero, form)
            scale = torch.where(better, found, scale)
            if zero is not None and found_zero is not None:
                zero = torch.where(better, found_zero, zero)
        numbers = self._in_rows(self._numbers(1 / scale, zero, form))
        stored = self._in_rows(self._stored(scale, form))
        if zero is None:
            return numbers, stored, None
        return numbers, stored, self._in_rows(zero.to(form.scale_dtype))

    # -- plain --

    def _plain(self, form: Format) -> tuple[Tensor, Tensor | None]:
        """The largest magnitude goes to the largest number (of two ends, the positive one), or with
        a zero the range from least to largest, 0 included, to the whole range of integers.
        """
        if form.has_zeros:
            scale = (self.high.clamp(min=0) - self.low.clamp(max=0)) / (form.qmax - form.qmin)
            scale = torch.where(scale > 0, scale, 1.0)
            # Rounded up to what can be stored, and the zero found for that: the range holds all.
            stored = self._stored(scale, form)
            read = real_scales(stored) / self.power
            above = torch.nextafter(stored, torch.full_like(stored, math.inf))
            scale = torch.where(read < scale, real_scales(above) / self.power, read)
            return scale, form.qmin - (self.low.clamp(max=0) / scale).round()
        if form.kind == "mxfp4":  # OCP: the power of two below the largest, over that of 6
            scale = torch.exp2(self.largest.frexp().exponent - 3.0)
        else:
            scale = self.largest / (FP8_MAX if form.kind == "fp8" else form.qmax)
        return torch.where(self.largest > 0, scale, 1.0), None

    # -- the search --

    def _searched(self, form: Format) -> tuple[Tensor, Tensor | None]:
        if form.kind == "mxfp4":
            return 2 * self._plain(form)[0], None  # the other power of two in question
        return self._scale_and_zero(form) if form.has_zeros else (self._scale(form), None)

    def _scale(self, form: Format) -> Tensor:
        """Of least error, where q * scale stands for x."""
        weighted = self._weighted(self.x)

        def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
            """By how much the error is below sum x^2, and the scale of that."""
            numbers = self._numbers(inverse, None, form)
            product = self._sum(weighted, numbers)
            square = self._sum(self._weighted(numbers), numbers)
            return product.square() / square, product / square

        peak = torch.where(-self.low > self.high, self.low, self.high)
        end = FP8_MAX if form.kind == "fp8" else form.qmin
        fits = [fit(ratio * end / peak) for ratio in self._ratios(form)]
        (scale,) = _best(fits)
        for _ in range(NUM_REFITS):
            _, scale = fit(1 / scale)
        return scale

    def _scale_and_zero(self, form: Format) -> tuple[Tensor, Tensor]:
        """Of least error, where (q - zero) * scale stands for x: a line through points (q, x)."""
        length = self.x.size(self.dim)  # and sum of weights
        mean = self._weighted(self.x).sum(self.dim, True) / length
        centred = self._weighted(self.x - mean)

        def fit(inverse: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """By how much the error is below that of the mean, and scale and zero of that."""
            numbers = self._numbers(inverse, zero, form)
            product = self._sum(centred, numbers)
            numbers_weighted = self._weighted(numbers)
            total = numbers_weighted.sum(self.dim, True)
            spread = self._sum(numbers_weighted, numbers)
            spread.addcmul_(total, total, value=-1 / length)
            scale = product / spread
            return product * scale, scale, total / length - mean / scale

        scale, zero = _best([fit(*start) for start in self._starts(form)])
        for _ in range(NUM_REFITS):
            _, scale, zero = fit(1 / scale, zero)
        return scale, zero

    def _starts(self, form: Format) -> Iterator[tuple[Tensor, Tensor]]:
        """The grid's inverse scales and zeros: the group's middle near that of the integers."""
        middle, span = (self.high + self.low) / 2, self.high - self.low
        for ratio in self._ratios(form):
            inverse = ratio * (form.qmax - form.qmin) / span
            centre = -0.5 - middle * inverse
            for shift in SHIFTS:
                yield inverse, centre + shift

    def _ratios(self, form: Format) -> list[float]:
        if form.kind == "fp8":  # mantissas repeat with every power of two
            return [2.0 ** (-turn / 8) for turn in range(8)]
        low, high, growth = (RANGES_WITH_ZERO if form.has_zeros else RANGES)[form.bits]
        doublings = max(0.0, math.log2(self.x.size(self.dim) / 32))
        low, high = min(low + 0.07 * doublings, max(low, 0.95)), high + growth * doublings
        return [low + (high - low) * turn / (NUM_SCALES - 1) for turn in range(NUM_SCALES)]

    # -- arithmetic on groups --

    def _numbers(self, inverse: Tensor, zero: Tensor | None, form: Format) -> Tensor:
        """x / scale + zero, rounded: in `scratch`."""
        if zero is None:
            torch.mul(self.x, inverse, out=self.scratch)
        else:
            torch.addcmul(zero, self.x, inverse, out=self.scratch)
        return nearest(self.scratch, form)

    def _error(self, scale: Tensor, zero: Tensor | None, form: Format) -> Tensor:
        numbers = self._numbers(1 / scale, zero, form)
        if zero is not None:
            numbers -= zero
        difference = torch.addcmul(self.x, numbers, scale, value=-1)
        return self._sum(self._weighted(difference), difference)

    def _weighted(self, tensor: Tensor) -> Tensor:
        return tensor if self.weights is None else tensor * self.weights

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        """Of products, over each group."""
        return torch.linalg.vecdot(a, b, dim=self.dim).unsqueeze(self.dim)

    # -- what is stored --

    def _as_stored(
        self, scale: Tensor, zero: Tensor | None, form: Format
    ) -> tuple[Tensor, Tensor | None]:
        """Both as they will be read."""
        stored = self._stored(scale, form)
        if zero is not None:
            zero = zero.to(form.scale_dtype).float()
        return real_scales(stored) / self.power, zero

    def _stored(self, scale: Tensor, form: Format) -> Tensor:
        if form.kind == "mxfp4":
            exponent = (scale.log2() + self.power.log2()).round()
            return (exponent + SCALE_BIAS).clamp_(0, 254).to(torch.uint8)
        limit = torch.finfo(form.scale_dtype).max
        stored = (scale * self.power).clamp_(-limit, limit).to(form.scale_dtype)
        return torch.where(stored == 0, 1.0, stored)  # too small to be told from zeros

    def _stays_finite(self, scale: Tensor, zero: Tensor | None, form: Format) -> Tensor:
        """Whether no number of the format overflows float32."""
        reach = scale.abs() * self.power * (-form.qmin if form.kind == "int" else FP8_MAX)
        if zero is not None:
            reach = reach + scale.abs() * self.power * zero.abs()
        return reach.isfinite()

    def _arranged(self, rows: Tensor, size: int) -> Tensor:
        groups = rows.reshape(-1, size)
        groups = groups.t() if self.dim == 0 else groups
        return groups.clone(memory_format=torch.contiguous_format)

    def _arranged_importance(self, importance: Tensor, size: int) -> Tensor:
        """One on the average of each group: only proportions within a group matter."""
        groups = importance.view(-1, size)
        groups = groups / groups.amax(1, keepdim=True)
        groups = torch.where(groups.isnan(), 1.0, groups / groups.mean(1, keepdim=True))
        return self._arranged(groups.repeat(self.num_rows, 1), size)

    def _in_rows(self, tensor: Tensor) -> Tensor:
        """Back to [r, K] or [r, groups]."""
        return (tensor.t() if self.dim == 0 else tensor).reshape(self.num_rows, -1)


def _best(fits: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of each group's fits (gain, parameters ...) the parameters of the one that gains most."""
    gains, *parameters = (torch.stack(each) for each in zip(*fits, strict=True))
    best = gains.nan_to_num_(nan=-1.0, posinf=-1.0).argmax(0, keepdim=True)
    return [each.gather(0, best)[0] for each in parameters]
