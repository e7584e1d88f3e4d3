"""Small integers that are packed one after the other into the bits of 32-bit words."""

import math

import torch
from torch import Tensor


def num_words(count: int, bits: int) -> int:
    """Words that `count` integers fill."""
    return math.ceil(count * bits / 32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Words int32 [..., W] -> the first `count` integers, unsigned: uint8 [..., count].

    Integer i has the bits from i * bits on, counted through all words from their lowest; one of 3
    bits may begin in one word and end in the next.
    """
    period = 32 // math.gcd(32, bits)  # integers until one begins with a word again
    step = period * bits // 32
    missing = -words.size(-1) % step
    if missing:
        words = torch.nn.functional.pad(words, (0, missing))
    found = words.new_empty((*words.shape[:-1], words.size(-1) // step * period), dtype=torch.uint8)
    mask = 2**bits - 1
    for place in range(period):
        first, shift = divmod(place * bits, 32)
        # An arithmetic shift: the sign's copies are masked away.
        number = words[..., first::step] >> shift
        if shift + bits > 32:
            number = number & (2 ** (32 - shift) - 1)
            number = number | words[..., first + 1 :: step] << (32 - shift)
        found[..., place::period] = number & mask
    return found[..., :count]


def as_half_bytes(words: Tensor, count: int) -> Tensor:
    """Words of 4-bit integers [..., W] are our half bytes already: uint8 [..., ceil(count / 2)].
    Ten to forty times as fast as to unpack and pack them. Where half of the last byte is over, that
    is 8.
    """
    pairs = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    pairs = pairs[..., : math.ceil(count / 2)].contiguous()
    if count % 2:
        pairs[..., -1] = pairs[..., -1] & 15 | 8 << 4
    return pairs
