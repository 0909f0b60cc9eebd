"""Words of mixed radix: exact, no longer than needed, near the entropy bound, and reversible."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bf_lib import packing
from bf_lib.grids import balanced_codes
from bf_lib.packing import Word, has_only_codes, pack, unpack, word

PAPER = (3, 5, 9, 17, 33, 65, 129, 257)
odd = st.integers(1, 500).map(lambda n: 2 * n + 1)


def drawn(levels: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = balanced_codes(levels)
    return codes[torch.randint(levels, (count,), generator=generator)]


def test_the_words_of_the_papers_levels():
    words = {levels: word(levels) for levels in PAPER}
    assert words[3] == Word(digits=5, bits=8, numbers=1, bytes=1)  # 243 of 256
    assert words[5] == Word(digits=3, bits=7, numbers=9, bytes=8)  # 125 of 128
    assert words[9] == Word(digits=5, bits=16, numbers=1, bytes=2)
    assert words[17] == Word(digits=5, bits=21, numbers=3, bytes=8)
    bits = [round(w.bits_per_code, 3) for w in words.values()]
    assert bits == [1.6, 2.37, 3.2, 4.267, 5.333, 6.4, 8.0, 9.143]


@given(odd)
def test_no_other_word_takes_fewer_bits(levels):
    unit = word(levels)
    assert levels**unit.digits <= 2**unit.bits <= 2**63
    assert unit.numbers * unit.bits <= 8 * unit.bytes
    assert math.log2(levels) <= unit.bits_per_code
    for size in (1, 2, 4, 8):
        for count in range(1, 64):  # digits of a number
            bits = next(n for n in range(64) if levels**count <= 2**n or n == 63)
            if levels**count <= 2**bits and bits <= 8 * size:
                codes = count * (8 * size // bits)
                assert unit.bits_per_code <= 8 * size / codes


@given(odd, st.integers(0, 10_000))
def test_words_are_enough_and_not_one_too_many(levels, count):
    unit = word(levels)
    assert (unit.count(count) - 1) * unit.codes < count <= unit.count(count) * unit.codes


@given(odd, st.integers(0, 300), st.integers(0, 2**32))
def test_codes_come_back(levels, count, seed):
    codes = drawn(levels, count, seed)
    words = pack(codes, levels)
    assert len(words) == word(levels).count(count) and words.dtype == word(levels).dtype
    assert has_only_codes(words, levels)
    back = unpack(words, levels, count)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("levels", PAPER)
def test_words_are_what_the_format_says(levels):
    """Against whole numbers of Python: what belongs together lies far apart, in two steps."""
    codes = drawn(levels, 1000)
    unit = word(levels)
    count = math.ceil(1000 / unit.codes)
    digits = (codes.int() + (levels - 1) // 2).tolist() + [0] * (count * unit.codes - 1000)
    total = count * unit.numbers
    numbers = [
        sum(digits[p * total + s] * levels**p for p in range(unit.digits)) for s in range(total)
    ]
    words = [
        sum(numbers[f * count + j] << f * unit.bits for f in range(unit.numbers))
        for j in range(count)
    ]
    expected = b"".join(number.to_bytes(unit.bytes, "little") for number in words)
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


def test_numbers_that_are_no_words_are_told():
    assert not has_only_codes(torch.tensor([3, 243], dtype=torch.uint8), 3)
    assert has_only_codes(torch.tensor([3, 242], dtype=torch.uint8), 3)
    assert not has_only_codes(torch.tensor([-1]), 5)  # 2^64 - 1
    assert not has_only_codes(torch.tensor([125 << 14]), 5)
    assert has_only_codes(torch.tensor([124 << 56]), 5)
    assert not has_only_codes(torch.tensor([-(2**63)]), 5)  # a bit that no number has
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
