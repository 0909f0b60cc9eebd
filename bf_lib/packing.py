"""How many bytes the codes of a grid take: whole codes in whole words, without a bit between.

A grid of 2^b + 1 levels fits no number of bits, so one code a field wastes nearly a bit of each.
Several codes are the digits of one number instead (mixed radix): five 3-level codes make a number
below 243, which is a byte. The more codes a word has, the less is lost; words are at most 8
bytes, so that a machine's integers hold them.
"""

__all__ = ["Word", "packed_bytes", "word"]

from dataclasses import dataclass
from functools import cache

from bf_lib.grids import bits_of_levels

WORD_BYTES = 8  # of the longest word


@dataclass(frozen=True, slots=True)
class Word:
    """The unit of packing: so many codes in so many bytes."""

    codes: int
    bytes: int

    @property
    def bits_per_code(self) -> float:
        return 8 * self.bytes / self.codes


@cache
def word(levels: int) -> Word:
    """Returns the word that takes the fewest bits per code; of equals, the shortest.

    Arguments:
        levels: The number of levels; odd, at least 3.
    """
    bits_of_levels(levels)  # says what is wrong with them
    words = [Word(_codes(levels, size), size) for size in range(1, WORD_BYTES + 1)]
    return min((w for w in words if w.codes), key=lambda w: (w.bits_per_code, w.bytes))


def packed_bytes(levels: int, count: int) -> int:
    """Returns the bytes that codes of a grid take; the last word is filled up.

    Arguments:
        levels: The number of levels; odd, at least 3.
        count: How many codes.
    """
    unit = word(levels)
    return -(-count // unit.codes) * unit.bytes


def _codes(levels: int, size: int) -> int:
    """Returns how many codes a word of so many bytes holds: exact, in whole numbers."""
    count = 0
    while levels ** (count + 1) <= 256**size:
        count += 1
    return count
