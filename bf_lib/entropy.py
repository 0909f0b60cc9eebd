"""Packed codes in fewer bytes still: entropy coding by zstd, without loss (FORMAT.md).

Trained and rounded weights are not spread evenly over the levels of a grid: the middle ones are
more frequent, and an entropy coder makes use of it. zstd's is a Huffman code of bytes, which
wastes little when a byte holds several codes: five of 3 levels, three of 5, two of 9. So codes are
packed into bytes first, and every byte is one symbol.
"""

__all__ = ["compressed", "decompressed"]

import numpy as np
import torch
import zstandard
from torch import Tensor

from bf_lib.grids import balanced_codes
from bf_lib.packing import digits, from_digits

LEVEL = 1  # higher ones look for repetitions, of which there are none
BYTE = 256


def compressed(codes: Tensor, levels: int) -> Tensor:
    """Returns a zstd frame of some codes.

    Arguments:
        codes: Codes of any shape, from -B to B.
        levels: The number of levels, 2 B + 1.

    Returns:
        The bytes of the frame, with shape (n,), uint8.
    """
    per_byte, width = _symbols(levels)
    symbols = -(-codes.numel() // per_byte)
    planes = torch.zeros(per_byte, symbols, dtype=torch.int32)
    planes.view(-1)[: codes.numel()] = codes.flatten().to(torch.int32) + (levels - 1) // 2
    total = from_digits(planes, levels)
    # The bytes of wide symbols lie apart, since the upper ones are alike.
    parts = [(total >> 8 * n) & 0xFF for n in range(width)]
    data = torch.cat(parts).to(torch.uint8).numpy().tobytes()
    frame = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(data)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompressed(frame: Tensor, levels: int, count: int) -> Tensor:
    """Returns the codes of a frame: the inverse of `compressed`.

    Arguments:
        frame: The bytes of the frame, with shape (n,), uint8.
        levels: The number of levels; odd, at least 3.
        count: How many codes.

    Raises:
        ValueError: If the frame is not one of so many codes. No more memory is taken than these
            need, whatever the frame says of itself.
    """
    per_byte, width = _symbols(levels)
    symbols = -(-count // per_byte)
    data = frame.numpy().tobytes()
    try:
        size = zstandard.frame_content_size(data)
        if size != symbols * width:
            raise ValueError(f"the frame is of {size} bytes, not {symbols * width}")
        plain = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"it is not a frame of zstd: {error}") from error
    parts = torch.from_numpy(np.frombuffer(plain, np.uint8).copy()).view(width, symbols)
    total = sum(part.to(torch.int32) << 8 * n for n, part in enumerate(parts))
    if symbols and int(total.max()) >= levels**per_byte:
        raise ValueError(f"a symbol is {int(total.max())}, not below {levels**per_byte}")
    kind = balanced_codes(levels).dtype
    planes = torch.stack([digit.to(torch.int32) for digit in digits(total, levels, per_byte)])
    return planes.view(-1)[:count].sub_((levels - 1) // 2).to(kind)


def _symbols(levels: int) -> tuple[int, int]:
    """Returns how many codes a symbol has, and how many bytes."""
    balanced_codes(levels)  # says what is wrong with them
    per_byte = max((n for n in range(1, 9) if levels**n <= BYTE), default=0)
    return (per_byte, 1) if per_byte else (1, (levels.bit_length() + 7) // 8)
