"""Weights as packed codes and scales, and back: the tensors of a packed layer.

    weight = code * scale,

in float32, and then in the type that a layer computes in, so that it is bit for bit what
`grids.fake_quantize` makes of the same codes and scales.
"""

__all__ = [
    "SCALES",
    "decoded_in",
    "decoded_weight",
    "packed_weight",
    "scale_of",
    "stored_scale",
]

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from bf_lib.grids import (
    alternating_scale,
    checked_weight,
    minmax_scale,
    optimal_scale,
    quantize,
)
from bf_lib.packing import pack, unpack_, word

SCALES = {"alternating": alternating_scale, "minmax": minmax_scale, "optimal": optimal_scale}
CHUNK = 1 << 17  # weights whose codes are searched for at once: what stays in the cache
HALF = torch.finfo(torch.float16)


@torch.no_grad()
def packed_weight(
    weight: Tensor, levels: int, scale: Tensor | str = "alternating"
) -> tuple[Tensor, Tensor]:
    """Rounds a weight to a grid, and returns what a packed layer holds of it.

    Arguments:
        weight: The weight, with shape (out, *).
        levels: The number of levels; odd, at least 3.
        scale: The scale of each output channel, with shape (out, 1, ...), which is kept as it is;
            or how to search for it: "alternating", as the paper does (Eq. 5), "optimal" or
            "minmax". What is found is rounded by `stored_scale`.

    Returns:
        The words, and the bits of the scales with shape (out,): of float16, as int16, if all are
        values of it; else of float32, as int32.

    Raises:
        ValueError: If the weight or a scale is not one.
    """
    weight = checked_weight(weight).float()
    size = max(1, CHUNK // weight[0].numel())  # channels have nothing to do with each other
    rows = weight.split(size)
    if isinstance(scale, str):
        scale = stored_scale(torch.cat([SCALES[scale](part, levels) for part in rows]))
    scales = scale.float().split(size)
    parts = [quantize(part, s, levels).codes for part, s in zip(rows, scales, strict=True)]
    return pack(torch.cat(parts), levels), _bits_of(scale)


def stored_scale(scale: Tensor) -> Tensor:
    """Rounds scales to float16, in their own type, unless one of them is too small or too large.

    Below float16's normal numbers it would lose more than the last of 11 bits: then all scales of
    the layer stay what they are.
    """
    half = scale.to(torch.float16)
    fit = ((half >= HALF.smallest_normal) & half.isfinite()).all()
    return half.to(scale.dtype) if fit else scale


def _bits_of(scale: Tensor) -> Tensor:
    """Returns the bits of scales, in the smaller type that changes none."""
    half, flat = scale.to(torch.float16), scale.flatten()
    if torch.equal(half.to(scale.dtype), scale):
        return half.flatten().view(torch.int16).clone()
    return flat.to(torch.float32).view(torch.int32).clone()


def scale_of(bits: Tensor) -> Tensor:
    """Returns the scales whose bits are stored, float16 or float32, with shape (out,)."""
    return bits.view(torch.float16 if bits.dtype == torch.int16 else torch.float32)


def decoded_weight(
    words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Returns the weight that words and scales stand for.

    Arguments:
        words: As `packing.pack` returns them.
        scale: The bits of the scale of each output channel, with shape (out,): int16 for float16,
            int32 for float32.
        levels: The number of levels.
        shape: The shape of the weight, (out, *).
        dtype: Its type.
    """
    return torch.ops.bf_lib.decoded_weight(words, scale, levels, shape, dtype)


# As an operator of its own, a compiler takes it for one step and does not look into it.
@torch.library.custom_op("bf_lib::decoded_weight", mutates_args=())
def _decoded(
    words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    room = torch.empty(len(words) * word(levels).codes, device=words.device)
    return decoded_in(room, words, scale, levels, shape).to(dtype)


@_decoded.register_fake
def _(words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return words.new_empty(shape, dtype=dtype)


@torch.no_grad()
def decoded_in(
    room: Tensor, words: Tensor, scale: Tensor, levels: int, shape: Sequence[int]
) -> Tensor:
    """Returns the weight that words and scales stand for, in float32, in a given place.

    Arguments:
        room: The place, float32, with shape (n,) for at least all codes of the words.
        words, scale, levels, shape: See `decoded_weight`.
    """
    place = room[: len(words) * word(levels).codes]
    unpack_(place, words, levels)
    weight = place[: prod(shape)].view(len(scale), -1)
    return weight.mul_(scale_of(scale).to(torch.float32)[:, None]).view(shape)
