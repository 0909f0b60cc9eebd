"""Numbers and their digits in some base, many at a time (mixed radix).

Whole numbers are divided by multiplications and shifts, in 16 bits where that is exact: torch
divides them one by one, and these many at a time.
"""

__all__ = ["KINDS", "bits_of", "digits", "from_digits"]

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

KINDS = (torch.int16, torch.int32, torch.int64)  # to compute in, the cheapest first
EXACT = 1 << 21  # below it, float32 tells quotients apart


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
        numbers: From 0 to below levels^count, with shape (*).
        levels: The base.
        count: How many digits.
    """
    if count == 1:
        yield numbers
        return
    low = _low_digits(levels, count)
    upper, lower = _divided(numbers, levels**low, levels**count)
    yield from digits(lower, levels, low)
    yield from digits(upper, levels, count - low)


@cache
def _low_digits(levels: int, count: int) -> int:
    """Returns how many digits to part from the others: some half, where division is cheapest."""
    bound = levels**count
    cost = {
        low: len(KINDS) if (k := _reciprocal(levels**low, bound)) is None else KINDS.index(k[0])
        for low in range(1, count)
    }
    return min(cost, key=lambda low: (cost[low], abs(2 * low - count)))


def bits_of(kind: torch.dtype) -> int:
    """Returns the bits of the numbers that a signed type holds."""
    return torch.iinfo(kind).bits - 1


def _divided(numbers: Tensor, divisor: int, bound: int) -> tuple[Tensor, Tensor]:
    """Returns the quotients and remainders of numbers from 0 to below a bound."""
    if found := _reciprocal(divisor, bound):
        kind, factor, shift = found
        numbers = numbers.to(kind)
        quotient = (numbers * factor).bitwise_right_shift_(shift)
    elif bound <= EXACT:
        # (x + 1/2) / d is at least 1/(2 d) away from a whole number, more than two roundings do.
        numbers = numbers.to(torch.int32)
        quotient = numbers.to(torch.float32).add_(0.5).mul_(1 / divisor).to(torch.int32)
    else:
        quotient = torch.div(numbers, divisor, rounding_mode="trunc")
    return quotient, torch.sub(numbers, quotient, alpha=divisor)


@cache
def _reciprocal(divisor: int, bound: int) -> tuple[torch.dtype, int, int] | None:
    """Finds a factor and a shift that divide all numbers from 0 to below a bound.

    With m = ceil(2^s / d), m x / 2^s exceeds x / d by x (m d - 2^s) / (d 2^s). As long as that is
    below 1 / d, no whole number lies between the two (Granlund and Montgomery, 1994).

    Returns:
        The smallest type that products fit, the factor m and the shift s; None if it is wider
        than 32 bits, in which multiplying is no longer cheap.
    """
    for kind in KINDS[:2]:
        for shift in range(bits_of(kind)):
            factor = -(-(2**shift) // divisor)
            exact = (bound - 1) * (factor * divisor - 2**shift) < 2**shift
            if exact and (bound - 1) * factor < 2 ** bits_of(kind):
                return kind, factor, shift
    return None
