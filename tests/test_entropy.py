"""Entropy coding: lossless, near the entropy, and safe with what is no frame."""

import math

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bf_lib.entropy import compressed, decompressed
from bf_lib.grids import balanced_codes, optimal_scale, quantize

odd = st.integers(1, 300).map(lambda n: 2 * n + 1)


@given(odd, st.integers(0, 300), st.integers(0, 2**32))
def test_codes_come_back(levels, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = balanced_codes(levels)[torch.randint(levels, (count,), generator=generator)]
    back = decompressed(compressed(codes, levels), levels, count)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("levels", [3, 5, 9, 17])
def test_the_size_is_near_the_entropy_of_rounded_gaussians(levels):
    weight = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(0))
    codes = quantize(weight, optimal_scale(weight, levels), levels).codes
    share = np.bincount(codes.flatten().int().numpy() + levels // 2) / codes.numel()
    entropy = -(share * np.log2(share)).sum()
    bits = 8 * len(compressed(codes, levels)) / codes.numel()
    assert entropy <= bits < 1.015 * entropy < math.log2(levels)


def test_frames_that_lie_are_refused():
    codes = torch.zeros(1000, dtype=torch.int8)
    frame = compressed(codes, 3)
    with pytest.raises(ValueError, match="the frame is of 200 bytes, not 201"):
        decompressed(frame, 3, 1001)
    with pytest.raises(ValueError, match="not a frame of zstd"):
        decompressed(frame[:-3], 3, 1000)
    flipped = frame.clone()
    flipped[-6] ^= 1
    with pytest.raises(ValueError, match="zstd|symbol"):
        decompressed(flipped, 3, 1000)
    with pytest.raises(ValueError, match="zstd"):
        decompressed(torch.cat([frame, frame]), 3, 1000)
    with pytest.raises(ValueError, match="zstd"):
        decompressed(torch.zeros(0, dtype=torch.uint8), 3, 0)


def test_a_frame_takes_no_more_memory_than_its_codes():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))  # 64 MB in some kilobytes
    frame = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    with pytest.raises(ValueError, match="67108864 bytes, not 200"):
        decompressed(frame, 3, 1000)
    # A frame that does not say how much there is in it.
    writer = zstandard.ZstdCompressor(write_content_size=False)
    frame = torch.frombuffer(bytearray(writer.compress(bytes(200))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="bytes, not 200"):
        decompressed(frame, 3, 1000)


def test_symbols_that_no_codes_make_are_refused():
    frame = zstandard.ZstdCompressor().compress(bytes([242, 243]))
    with pytest.raises(ValueError, match="a symbol is 243, not below 243"):
        decompressed(torch.frombuffer(bytearray(frame), dtype=torch.uint8), 3, 10)
