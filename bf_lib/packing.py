"""Codes of a grid in whole words, with hardly a bit between (FORMAT.md says it for other readers).

A grid of 2^b + 1 levels fits no number of bits, so one code a field wastes nearly a bit of each.
So several codes are first made the digits of one number (mixed radix): five 3-level codes make a
number below 243, which is 8 bits, and three 5-level codes one below 125, which is 7 bits. Numbers
then lie side by side in words, which have the widths of a machine's integers: one number of 8 bits
in a byte, nine numbers of 7 bits in 8 bytes.

What belongs together lies far apart. Of S numbers, number s holds the codes s, S + s, 2 S + s and
so on; of M words, word j holds the numbers j, M + j, 2 M + j and so on. So numbers and codes come
apart by operations on whole tensors, and lie where they belong.
"""

__all__ = [
    "Word",
    "has_only_codes",
    "pack",
    "packed_bytes",
    "unpack",
    "unpack_",
    "word",
]

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bf_lib.digits import KINDS, bits_of, digits, from_digits
from bf_lib.grids import balanced_codes, bits_of_levels

# Bytes of a word -> the type of a tensor of them. Words are unsigned, whatever torch says.
TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDEST = 63  # bits of a number: one sign bit less than the widest word
CHUNK = 1 << 19  # numbers at once: few calls, and what is computed on the way stays in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """The unit of packing: so many codes in so many bytes."""

    digits: int  # codes of a number
    bits: int  # of a number
    numbers: int  # of a word
    bytes: int  # of a word

    @property
    def codes(self) -> int:
        """The codes of a word."""
        return self.digits * self.numbers

    @property
    def bits_per_code(self) -> float:
        """The bits that a code takes, somewhat more than log2(levels)."""
        return 8 * self.bytes / self.codes

    @property
    def dtype(self) -> torch.dtype:
        """The type of a tensor of words."""
        return TYPES[self.bytes]

    def count(self, codes: int) -> int:
        """Returns how many words hold so many codes; the last ones are filled up."""
        return -(-codes // self.codes)


@cache
def word(levels: int) -> Word:
    """Returns the word that takes the fewest bits per code.

    Of equals it is the shortest, and of those the one whose numbers have the fewest digits.

    Arguments:
        levels: The number of levels; odd, at least 3.
    """
    bits_of_levels(levels)  # says what is wrong with them
    words = []
    for size in TYPES:
        for count in range(1, 8 * size):
            bits = (levels**count - 1).bit_length()
            if bits > min(8 * size, WIDEST):
                break
            words.append(Word(digits=count, bits=bits, numbers=8 * size // bits, bytes=size))
    return min(words, key=lambda w: (w.bits_per_code, w.bytes, w.digits))


def packed_bytes(levels: int, count: int) -> int:
    """Returns the bytes that codes of a grid take.

    Arguments:
        levels: The number of levels; odd, at least 3.
        count: How many codes.
    """
    return word(levels).count(count) * word(levels).bytes


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
    count = unit.count(len(flat))
    filled = flat.new_full((unit.codes * count,), -bound)
    filled[: len(flat)] = flat
    planes = filled.view(unit.digits, unit.numbers, count)
    words = torch.empty(count, dtype=unit.dtype, device=codes.device)
    for part in _parts(count, unit):
        total = torch.zeros(len(words[part]), dtype=torch.int64, device=codes.device)
        for field in range(unit.numbers):
            numbers = from_digits(planes[:, field, part].to(torch.int64).add_(bound), levels)
            total.bitwise_or_(numbers.bitwise_left_shift_(field * unit.bits))
        words[part] = total.to(unit.dtype)  # wraps to the signed number of the same bits
    return words


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
    if words.dtype != unit.dtype or words.ndim != 1 or len(words) != unit.count(count):
        raise ValueError(
            f"{count} codes of {levels} levels are {unit.count(count)} words of "
            f"{unit.bytes} byte(s), not a tensor {tuple(words.shape)} of {words.dtype}"
        )
    kind = balanced_codes(levels).dtype
    codes = torch.empty(unit.codes * len(words), dtype=kind, device=words.device)
    unpack_(codes, words, levels)
    return codes[:count]


@torch.no_grad()
def unpack_(target: Tensor, words: Tensor, levels: int) -> None:
    """Writes the codes of some words, with those that fill up the last ones.

    Arguments:
        target: Where to, with shape (M codes of a word,), in a type that holds the codes.
        words: The words, with shape (M,).
        levels: The number of levels; odd, at least 3.
    """
    unit, bound = word(levels), (levels - 1) // 2
    planes = target.view(unit.digits, unit.numbers, len(words))
    for part in _parts(len(words), unit):
        numbers = _numbers(words[part], unit)
        for plane, digit in zip(planes, digits(numbers, levels, unit.digits), strict=True):
            # Whole numbers that stay in the cache are cheaper to subtract from than floats.
            plane[:, part] = digit.sub_(bound)


def has_only_codes(words: Tensor, levels: int) -> bool:
    """Tells whether words hold codes of a grid and nothing else, with no number too large."""
    unit = word(levels)
    used, limit = unit.numbers * unit.bits, levels**unit.digits
    for part in _parts(len(words), unit):
        if used < 8 * unit.bytes and bool((_unsigned(words[part]) >> used).any()):
            return False
        if bool((_numbers(words[part], unit) >= limit).any()):
            return False
    return True


def _numbers(words: Tensor, unit: Word) -> Tensor:
    """Returns the numbers of n words, with shape (numbers of a word, n), in a new tensor."""
    kind = next(kind for kind in KINDS if bits_of(kind) >= unit.bits)
    wide, mask = _unsigned(words), (1 << unit.bits) - 1
    if unit.numbers > 1:
        shifts = torch.arange(unit.numbers, device=words.device)[:, None] * unit.bits
        return wide.bitwise_right_shift(shifts).to(kind).bitwise_and_(mask)
    if unit.bits < 8 * unit.bytes:
        wide = wide.bitwise_and(mask)
    return wide.to(kind)[None]


def _parts(count: int, unit: Word) -> Iterator[slice]:
    """Cuts words into pieces that stay in the cache."""
    size = max(1, CHUNK // unit.numbers)
    for start in range(0, count, size):
        yield slice(start, start + size)


def _unsigned(words: Tensor) -> Tensor:
    """Returns the numbers that words are, in a signed type that holds them.

    Those of 8 bytes stay as they are: a shift to the right repeats their first bit, and what uses
    it masks that away.
    """
    match words.dtype:
        case torch.uint8:
            return words.to(torch.int16)
        case torch.int16:
            return words.to(torch.int32).bitwise_and_(0xFFFF)
        case torch.int32:
            return words.to(torch.int64).bitwise_and_(0xFFFFFFFF)
        case _:
            return words
