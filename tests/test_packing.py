"""Words of mixed radix: exact, no longer than needed, near the entropy bound, and reversible."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bf_lib import packing
from bf_lib.grids import balanced_codes
from bf_lib.packing import Word, has_only_codes, pack, packed_bytes, unpack, word

PAPER = (3, 5, 9, 17, 33, 65, 129, 257)
odd = st.integers(1, 500).map(lambda n: 2 * n + 1)


def drawn(levels: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = balanced_codes(levels)
    return codes[torch.randint(levels, (count,), generator=generator)]


def test_the_words_of_the_papers_levels():
    words = {levels: word(levels) for levels in PAPER}
    assert words[3] == Word(5, 1)  # 243 of 256
    assert words[5] == Word(27, 8)
    assert words[9] == Word(5, 2)
    bits = [round(w.bits_per_code, 3) for w in words.values()]
    assert bits == [1.6, 2.37, 3.2, 4.267, 5.333, 6.4, 8.0, 9.143]


@given(odd)
def test_all_words_hold_their_codes_and_not_one_more_would_fit(levels):
    unit = word(levels)
    room = min(256**unit.bytes, 2**63)  # of a signed type
    assert levels**unit.codes <= room < levels ** (unit.codes + 1)
    assert math.log2(levels) <= unit.bits_per_code
    for size in (1, 2, 4, 8):  # no other word does better
        codes = max(n for n in range(65) if levels**n <= min(256**size, 2**63))
        assert codes == 0 or unit.bits_per_code <= 8 * size / codes


@given(odd, st.integers(0, 10_000))
def test_bytes_are_enough_and_at_most_a_word_more(levels, count):
    size = packed_bytes(levels, count)
    assert 8 * size >= count * math.log2(levels) - 1e-6
    assert size - count * word(levels).bits_per_code / 8 < word(levels).bytes


@given(odd, st.integers(0, 300), st.integers(0, 2**32))
def test_codes_come_back(levels, count, seed):
    codes = drawn(levels, count, seed)
    words = pack(codes, levels)
    assert words.nbytes == packed_bytes(levels, count) and words.dtype == word(levels).dtype
    assert has_only_codes(words, levels)
    back = unpack(words, levels, count)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("levels", PAPER)
def test_words_are_what_the_format_says(levels):
    """Against whole numbers of Python: code p M + j is digit p of word j."""
    codes = drawn(levels, 1000)
    unit = word(levels)
    digits = (codes.int() + (levels - 1) // 2).tolist()
    count = math.ceil(1000 / unit.codes)
    digits += [0] * (count * unit.codes - 1000)
    expected = b"".join(
        sum(digits[p * count + j] * levels**p for p in range(unit.codes)).to_bytes(
            unit.bytes, "little"
        )
        for j in range(count)
    )
    assert pack(codes, levels).numpy().tobytes() == expected


@pytest.mark.parametrize("levels", PAPER)
def test_extreme_codes_and_pieces(levels, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 100)  # many pieces, the last of them short
    bound = (levels - 1) // 2
    for codes in (torch.full((995,), bound), torch.full((995,), -bound), drawn(levels, 995)):
        assert torch.equal(unpack(pack(codes, levels), levels, 995).long(), codes.long())


def test_any_shape_is_taken_row_by_row():
    codes = drawn(5, 60).view(3, 4, 5)
    assert torch.equal(pack(codes, 5), pack(codes.flatten(), 5))
    assert torch.equal(pack(codes.transpose(0, 2), 5), pack(codes.transpose(0, 2).flatten(), 5))


@given(st.integers(2, 10**6), st.integers(2, 2**40), st.sampled_from([15, 31, 63]))
def test_reciprocals_divide_exactly(divisor, bound, bits):
    found = packing._reciprocal(divisor, bound, bits)
    if found is None:
        return
    factor, shift = found
    near = {n * divisor + d for n in (1, 2, bound // divisor) for d in (-1, 0, 1)}
    for number in {0, 1, bound - 1, *near}:
        if 0 <= number < bound:
            assert number * factor < 2**bits
            assert number * factor >> shift == number // divisor


def test_every_small_number_is_divided(levels=9):
    numbers = torch.arange(levels**5)
    for divisor in (levels, levels**2, levels**4):
        quotient, remainder = packing._divided(numbers, divisor, levels**5)
        assert torch.equal(quotient.long(), numbers // divisor)
        assert torch.equal(remainder.long(), numbers % divisor)


def test_numbers_that_are_no_words_are_told():
    assert not has_only_codes(torch.tensor([3, 243], dtype=torch.uint8), 3)
    assert has_only_codes(torch.tensor([3, 242], dtype=torch.uint8), 3)
    assert not has_only_codes(torch.tensor([-1]), 5)  # 2^64 - 1
    assert not has_only_codes(torch.tensor([5**27]), 5)
    assert not has_only_codes(torch.tensor([-6487], dtype=torch.int16), 9)  # 59049
    assert has_only_codes(torch.tensor([-6488], dtype=torch.int16), 9)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="from -1 to 1"):
        pack(torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match="7 codes of 3 levels are 2 words of 1 byte"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 7)
    with pytest.raises(ValueError, match=r"not a tensor \(2,\) of torch.int64"):
        unpack(torch.zeros(2, dtype=torch.int64), 3, 7)


@pytest.mark.parametrize("levels", [2, 4, 1, 0])
def test_even_levels_are_refused(levels):
    with pytest.raises(ValueError, match=f"got {levels}"):
        word(levels)
