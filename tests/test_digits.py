"""Digits of numbers: exact, however they are divided."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bf_lib.digits import EXACT, _divided, _reciprocal, digits, from_digits


@pytest.mark.parametrize("levels, count", [(3, 5), (5, 3), (9, 5), (17, 5), (33, 3), (129, 3)])
def test_digits_of_all_numbers(levels, count):
    """However they are divided: by reciprocals in 16 or 32 bits, or in float32."""
    numbers = torch.arange(levels**count)
    for place, digit in enumerate(digits(numbers, levels, count)):
        assert torch.equal(digit.long(), numbers // levels**place % levels)


@given(st.integers(2, 10**6), st.integers(2, 2**40))
def test_reciprocals_divide_exactly(divisor, bound):
    found = _reciprocal(divisor, bound)
    if found is None:
        return
    kind, factor, shift = found
    near = {n * divisor + d for n in (1, 2, bound // divisor) for d in (-1, 0, 1)}
    for number in {0, 1, bound - 1, *near}:
        if 0 <= number < bound:
            assert number * factor <= torch.iinfo(kind).max
            assert number * factor >> shift == number // divisor


@given(st.integers(2, 2**21), st.integers(0, 2**21 - 1))
def test_floats_divide_exactly(divisor, near):
    numbers = torch.tensor([0, 2**21 - 1, near, near // divisor * divisor])
    numbers = torch.cat([numbers, (numbers - 1).clamp(0), near % divisor + numbers[:1]])
    quotient, remainder = _divided(numbers, divisor, EXACT)
    assert torch.equal(quotient.long(), numbers // divisor)
    assert torch.equal(remainder.long(), numbers % divisor)


@given(st.integers(2, 500), st.integers(1, 4), st.integers(0, 2**32))
def test_digits_come_back(base, count, seed):
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(base, (count, 50), generator=generator)
    numbers = from_digits(planes, base)
    back = torch.stack([digit.long() for digit in digits(numbers, base, count)])
    assert torch.equal(back, planes)
