"""Codes of a grid in whole words, without a bit between (FORMAT.md says it for other readers).

A grid of 2^b + 1 levels fits no number of bits, so one code a field wastes nearly a bit of each.
Several codes are the digits of one number instead (mixed radix): five 3-level codes make a number
below 243, which is a byte. Words have the widths of a machine's integers.

The codes of a word lie far apart: with M words, code number p M + j is digit p of word j, the
lowest digit first. So the digits of many words come apart together, by operations on whole
tensors, and lie where they belong.
"""

__all__ = [
    "Word",
    "digits",
    "from_digits",
    "has_only_codes",
    "pack",
    "packed_bytes",
    "unpack",
    "word",
]

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bf_lib.grids import balanced_codes, bits_of_levels

# Bytes of a word -> the type of a tensor of them. Numbers are unsigned, whatever torch says; those
# of 8 bytes stay below 2^63.
TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 21  # codes at once: few calls, and what is computed on the way stays in the cache


@dataclass(frozen=True, slots=True)
class Word:
    """The unit of packing: so many codes in so many bytes."""

    codes: int
    bytes: int

    @property
    def bits_per_code(self) -> float:
        """The bits that a code takes, somewhat more than log2(levels)."""
        return 8 * self.bytes / self.codes

    @property
    def dtype(self) -> torch.dtype:
        """The type of a tensor of words."""
        return TYPES[self.bytes]


@cache
def word(levels: int) -> Word:
    """Returns the word that takes the fewest bits per code; of equals, the shortest.

    Arguments:
        levels: The number of levels; odd, at least 3.
    """
    bits_of_levels(levels)  # says what is wrong with them
    words = [Word(_codes(levels, size), size) for size in TYPES]
    return min((w for w in words if w.codes), key=lambda w: (w.bits_per_code, w.bytes))


def packed_bytes(levels: int, count: int) -> int:
    """Returns the bytes that codes of a grid take; the last words are filled up.

    Arguments:
        levels: The number of levels; odd, at least 3.
        count: How many codes.
    """
    unit = word(levels)
    return -(-count // unit.codes) * unit.bytes


@torch.no_grad()
def pack(codes: Tensor, levels: int) -> Tensor:
    """Returns the words of some codes.

    Arguments:
        codes: Codes of any shape, as `grids.quantize` gives them, from -B to B.
        levels: The number of levels, 2 B + 1.

    Returns:
        The words with shape (M,), in the type `word(levels).dtype`. What is left over at the end
        is filled with the lowest code.

    Raises:
        ValueError: If a code is not of this grid.
    """
    flat, bound, unit = codes.flatten(), (levels - 1) // 2, word(levels)
    if len(flat) and (flat.min() < -bound or flat.max() > bound):
        raise ValueError(f"codes of {levels} levels are from -{bound} to {bound}")
    count = -(-len(flat) // unit.codes)
    filled = flat.new_full((unit.codes * count,), -bound)
    filled[: len(flat)] = flat
    planes = filled.view(unit.codes, count)
    words = torch.empty(count, dtype=unit.dtype, device=codes.device)
    for part in _parts(count, unit):
        numbers = from_digits(planes[:, part].to(torch.int64).add_(bound), levels)
        words[part] = numbers.to(unit.dtype)  # wraps to the signed number of the same bits
    return words


@torch.no_grad()
def unpack(words: Tensor, levels: int, count: int) -> Tensor:
    """Returns the codes of some words: the inverse of `pack`.

    Arguments:
        words: The words, with shape (M,), in the type `word(levels).dtype`.
        levels: The number of levels; odd, at least 3.
        count: How many codes.

    Returns:
        The codes with shape (count,), from -B to B, in the type that `grids.quantize` gives them.
    """
    unit = word(levels)
    if words.dtype != unit.dtype or words.ndim != 1 or len(words) != -(-count // unit.codes):
        raise ValueError(
            f"{count} codes of {levels} levels are {-(-count // unit.codes)} words of "
            f"{unit.bytes} byte(s), not a tensor {tuple(words.shape)} of {words.dtype}"
        )
    kind = balanced_codes(levels).dtype
    planes = torch.empty(unit.codes, len(words), dtype=kind, device=words.device)
    for part in _parts(len(words), unit):
        numbers = _unsigned(words[part])
        for plane, digit in zip(planes, digits(numbers, levels, unit.codes), strict=True):
            plane[part] = digit
    # In the type of codes the largest digits wrap to negative numbers, and this wraps them back.
    return planes.view(-1)[:count].sub_((levels - 1) // 2)


def has_only_codes(words: Tensor, levels: int) -> bool:
    """Tells whether words are ones that `pack` could have made, with no number too large."""
    limit = levels ** word(levels).codes
    numbers = _unsigned(words)
    return not len(words) or bool((numbers.min() >= 0) & (numbers.max() < limit))


# ---- digits


def from_digits(planes: Tensor, levels: int) -> Tensor:
    """Returns the numbers of some digits, in their type.

    Arguments:
        planes: The digits from 0 to levels - 1, with shape (count, n), the lowest first.
        levels: The base.
    """
    numbers = torch.zeros_like(planes[0])
    for plane in planes.flip(0):
        numbers.mul_(levels).add_(plane)
    return numbers


def digits(numbers: Tensor, levels: int, count: int) -> Iterator[Tensor]:
    """Yields the digits of numbers, the lowest first: the inverse of `from_digits`.

    Numbers are halved, again and again: the upper digits from the lower ones.

    Arguments:
        numbers: From 0 to below levels^count, with shape (n,).
        levels: The base.
        count: How many digits.
    """
    if count == 1:
        yield numbers
        return
    low = count // 2
    upper, lower = _divided(numbers, levels**low, levels**count)
    yield from digits(lower, levels, low)
    yield from digits(upper, levels, count - low)


def _codes(levels: int, size: int) -> int:
    """Returns how many codes a word of so many bytes holds: exact, in whole numbers."""
    limit = min(256**size, 2**63)
    count = 0
    while levels ** (count + 1) <= limit:
        count += 1
    return count


def _parts(count: int, unit: Word) -> Iterator[slice]:
    """Cuts words into pieces that stay in the cache."""
    size = max(1, CHUNK // unit.codes)
    for start in range(0, count, size):
        yield slice(start, start + size)


def _unsigned(words: Tensor) -> Tensor:
    """Returns the numbers that words are, in a signed type that holds them."""
    match words.dtype:
        case torch.uint8:
            return words.to(torch.int16)
        case torch.int16:
            return words.to(torch.int32).bitwise_and_(0xFFFF)
        case torch.int32:
            return words.to(torch.int64).bitwise_and_(0xFFFFFFFF)
        case _:
            return words


def _divided(numbers: Tensor, divisor: int, bound: int) -> tuple[Tensor, Tensor]:
    """Returns the quotients and remainders of numbers from 0 to below a bound."""
    for kind in (torch.int16, torch.int32, torch.int64):
        if found := _reciprocal(divisor, bound, torch.iinfo(kind).bits - 1):
            factor, shift = found
            numbers = numbers.to(kind)
            quotient = (numbers * factor).bitwise_right_shift_(shift)
            return quotient, numbers - quotient * divisor
    quotient = torch.div(numbers, divisor, rounding_mode="trunc")
    return quotient, numbers - quotient * divisor


@cache
def _reciprocal(divisor: int, bound: int, bits: int) -> tuple[int, int] | None:
    """Finds a factor and a shift that divide all numbers from 0 to below a bound.

    With m = ceil(2^s / d), m x / 2^s exceeds x / d by x (m d - 2^s) / (d 2^s). As long as that is
    below 1 / d, no whole number lies between the two (Granlund and Montgomery, 1994).

    Arguments:
        divisor: What to divide by.
        bound: Of the numbers.
        bits: That a product may have.
    """
    for shift in range(bits):
        factor = -(-(2**shift) // divisor)
        if (bound - 1) * (factor * divisor - 2**shift) < 2**shift:
            return (factor, shift) if (bound - 1) * factor < 2**bits else None
    return None
