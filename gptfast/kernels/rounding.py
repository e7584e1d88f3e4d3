"""Vectors of keys and values stored in eight bits a number, each with its own scale: what is stored
means `stored * scale`.

int8: 255 even steps, at an error of at most half a step. fp8 (e4m3, 2209.05433): three bits after
the leading one, so small numbers have small errors. Both go as far as the largest number of the
vector, so nothing overflows, whatever the model's dtype.
"""

import torch
from torch import Tensor

# The largest number that is stored; e4m3 has nothing between this and NaN.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Half as many bytes would be one or two percent of a cache. But a bfloat16 scale is up to 1/256 too
# large, and the largest float16 numbers would come back as infinity.
SCALE_DTYPE = torch.float32
# e4m3 as the bits of a wider float: their integer, by how far the code moves up, and the power of
# two between the two biases. PyTorch's own cast reads number by number on a CPU: 5 to 15 times
# as slow.
_WIDER = {
    torch.float32: (torch.int32, 20, 2.0**120),
    torch.bfloat16: (torch.int16, 4, 2.0**120),
    torch.float16: (torch.int16, 7, 2.0**8),
}


def round_vectors(x: Tensor, dtype: torch.dtype, first: int | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D] -> its numbers as `dtype` [..., D], and float32 scales [..., 1]; with `first`,
    scales [..., 2] of so many numbers and of the others.

    A vector of zeros stays one. A vector that holds NaN or infinity has such a scale: it is not
    hidden.
    """
    if first is not None:
        parts = (round_vectors(part, dtype) for part in (x[..., :first], x[..., first:]))
        (numbers, scales), (other_numbers, other_scales) = parts
        return torch.cat((numbers, other_numbers), -1), torch.cat((scales, other_scales), -1)
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=SCALE_DTYPE)
    # Never a division by zero, nor by a number that has lost digits.
    scales = (largest / LIMITS[dtype]).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
    numbers = x / scales  # float32; none is so far beyond the limit that it rounds to another
    # PyTorch's cast to e4m3 rounds to the nearest, its cast to int8 towards zero.
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scales


def widen(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored numbers themselves as `dtype`, all of them exact."""
    if stored.dtype != torch.float8_e4m3fn or not stored.is_cpu:
        return stored.to(dtype)
    integer, shift, factor = _WIDER[dtype]
    bits = stored.view(torch.int8).to(integer)  # the sign fills the upper half
    bits.bitwise_left_shift_(shift).bitwise_and_(torch.iinfo(integer).min | 0x7F << shift)
    return bits.view(dtype).mul_(factor)


def restore(stored: Tensor, scales: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """What is stored [..., D] means, as `dtype`: times scales [..., 1]; or times scales [..., 2],
    of the `first` numbers and of the others. Multiplied in float32.
    """
    if scales.size(-1) == 1:
        return widen(stored, torch.float32).mul_(scales).to(dtype)
    parts = zip((stored[..., :first], stored[..., first:]), scales.split(1, dim=-1), strict=True)
    return torch.cat([restore(part, scale, dtype, first) for part, scale in parts], dim=-1)
