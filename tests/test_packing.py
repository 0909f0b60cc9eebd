"""Words of mixed radix: exact, no longer than needed, and near the entropy bound."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bf_lib.packing import Word, packed_bytes, word

odd = st.integers(1, 500).map(lambda n: 2 * n + 1)


def test_the_words_of_the_papers_levels():
    words = {levels: word(levels) for levels in (3, 5, 9, 17, 33, 65, 129, 257)}
    assert words[3] == Word(5, 1)  # 243 of 256
    assert words[5] == Word(24, 7)
    assert words[9] == Word(5, 2)
    bits = [round(w.bits_per_code, 3) for w in words.values()]
    assert bits == [1.6, 2.333, 3.2, 4.267, 5.091, 6.222, 7.111, 9.143]


@given(odd)
def test_all_words_hold_their_codes_and_not_one_more_would_fit(levels):
    unit = word(levels)
    assert levels**unit.codes <= 256**unit.bytes < levels ** (unit.codes + 1)
    assert math.log2(levels) <= unit.bits_per_code
    for size in range(1, 9):  # no other word does better
        codes = math.floor(8 * size / math.log2(levels) + 1e-12)
        assert codes == 0 or unit.bits_per_code <= 8 * size / codes


@given(odd, st.integers(0, 10_000))
def test_bytes_are_enough_and_at_most_a_word_more(levels, count):
    size = packed_bytes(levels, count)
    assert 8 * size >= count * math.log2(levels) - 1e-6
    assert size - count * word(levels).bits_per_code / 8 < word(levels).bytes


@pytest.mark.parametrize("levels", [2, 4, 1, 0])
def test_even_levels_are_refused(levels):
    with pytest.raises(ValueError, match=f"got {levels}"):
        word(levels)
