"""Packed codes in fewer bytes still: entropy coding by zstd, without loss (FORMAT.md).

Trained and rounded weights are not spread evenly over the levels of a grid: the middle ones are
more frequent, and an entropy coder makes use of it. zstd's is a Huffman code of bytes, which
wastes little when a byte holds several codes: five of 3 levels, three of 5, two of 9. So codes are
packed into bytes first, and every byte is one symbol.
"""

__all__ = ["compressed", "decompressed"]

import torch
import zstandard
from torch import Tensor

from bf_lib.digits import digits, from_digits
from bf_lib.grids import balanced_codes

LEVEL = 1  # higher ones look for repetitions, of which there are none
BYTE = 256
CHUNK = 1 << 18  # symbols at once: so that little memory is taken beside the codes


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
    bound = (levels - 1) // 2
    planes = codes.new_full((per_byte, symbols), -bound)
    planes.view(-1)[: codes.numel()] = codes.flatten()
    data = torch.empty(width, symbols, dtype=torch.uint8)
    for start in range(0, symbols, CHUNK):
        part = slice(start, start + CHUNK)
        total = from_digits(planes[:, part].to(torch.int32).add_(bound), levels)
        for place in range(width):  # the bytes of wide symbols lie apart: the upper ones are alike
            data[place, part] = total.bitwise_right_shift(8 * place).bitwise_and_(0xFF)
    data = data.numpy().tobytes()
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
    parts = torch.empty(width * symbols, dtype=torch.uint8)
    parts.numpy()[:] = bytearray(plain)
    parts, bound = parts.view(width, symbols), (levels - 1) // 2
    codes = torch.empty(per_byte * symbols, dtype=balanced_codes(levels).dtype)
    planes = codes.view(per_byte, symbols)
    for start in range(0, symbols, CHUNK):
        part = slice(start, start + CHUNK)
        total = torch.zeros(len(planes[0, part]), dtype=torch.int32)
        for place in range(width):
            total += parts[place, part].to(torch.int32) << 8 * place
        if (largest := int(total.max())) >= levels**per_byte:
            raise ValueError(f"a symbol is {largest}, not below {levels**per_byte}")
        for plane, digit in zip(planes, digits(total, levels, per_byte), strict=True):
            plane[part] = digit.sub(bound)
    return codes[:count]


def _symbols(levels: int) -> tuple[int, int]:
    """Returns how many codes a symbol has, and how many bytes."""
    balanced_codes(levels)  # says what is wrong with them
    per_byte = max((n for n in range(1, 9) if levels**n <= BYTE), default=0)
    return (per_byte, 1) if per_byte else (1, (levels.bit_length() + 7) // 8)
