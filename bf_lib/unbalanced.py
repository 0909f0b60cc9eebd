"""Plain b-bit grids, for comparison with balanced ones (BitsFusion, Eq. 1, 4 and 5).

A plain grid has the 2^b codes 0, ..., 2^b - 1, of which one, the zero-point z, stands for zero:
seen from there they are {-z, ..., 2^b - 1 - z}, as {-2, ..., 1} for two bits and z = 2. With
2^b values one side always has a level more than the other, or there is no level at zero: a
half-shifted grid has z = (2^b - 1) / 2. A weight is approximated by scale * (code - z).

Weights have shape (out, *) with at least two dimensions; scales and zero-points have shape
(out, 1, ...). Arithmetic is done in float32, or float64 for float64 weights.
"""

__all__ = [
    "UnbalancedGrid",
    "alternating_grid",
    "dequantize_unbalanced",
    "fake_quantize_unbalanced",
    "fixed_grid",
    "minmax_grid",
    "quantize_unbalanced",
    "shifted_grid",
]

from typing import NamedTuple

import torch
from torch import Tensor

from bf_lib.grids import check_scale, checked_weight, fitted_scale, or_one


class UnbalancedGrid(NamedTuple):
    """The scale and the zero-point of each channel, with shape (out, 1, ...).

    The zero-point is a whole number, but for half-shifted grids.
    """

    scale: Tensor
    zero: Tensor


@torch.no_grad()
def minmax_grid(weight: Tensor, bits: int) -> UnbalancedGrid:
    """Returns the grids that span the least to the largest weight of each channel.

    The range is widened to hold zero, so that the zero-point lies on the grid.
    """
    last = _last_code(bits)
    weight = checked_weight(weight)
    dims = tuple(range(1, weight.ndim))
    low = weight.amin(dim=dims, keepdim=True).clamp_max(0)
    high = weight.amax(dim=dims, keepdim=True).clamp_min(0)
    scale = or_one((high - low) / last)
    return UnbalancedGrid(scale, (-low / scale).round())


@torch.no_grad()
def fixed_grid(weight: Tensor, bits: int) -> UnbalancedGrid:
    """Returns the grids with codes {-2^(b-1), ..., 2^(b-1) - 1} about zero in each channel.

    The largest magnitude of the channel is mapped to the last level of the longer side; weights
    as large on the shorter side are clipped.
    """
    zero = (_last_code(bits) + 1) // 2
    weight = checked_weight(weight)
    top = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return UnbalancedGrid(or_one(top / zero), torch.full_like(top, zero))


@torch.no_grad()
def shifted_grid(weight: Tensor, bits: int) -> UnbalancedGrid:
    """Returns the grids with levels at odd halves, symmetric about zero but not at it.

    The largest magnitude of the channel is mapped to the last level. At one bit this is the sign
    of a weight times a scale, the code of binary networks.
    """
    zero = _last_code(bits) / 2
    weight = checked_weight(weight)
    top = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return UnbalancedGrid(or_one(top / zero), torch.full_like(top, zero))


@torch.no_grad()
def alternating_grid(
    weight: Tensor, bits: int, start: UnbalancedGrid, steps: int = 10
) -> UnbalancedGrid:
    """Improves the scales by alternating optimisation, the zero-points being kept (Eq. 5).

    Arguments:
        weight: The weights, with shape (out, *).
        bits: The number of bits b of the codes, 1 to 8.
        start: The grids to start from.
        steps: The number of alternations.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    scale, zero = start
    weight = checked_weight(weight)
    for _ in range(steps):
        codes = _round(weight, UnbalancedGrid(scale, zero), bits)
        scale = fitted_scale(weight, codes - zero)
    return UnbalancedGrid(scale, zero)


@torch.no_grad()
def quantize_unbalanced(weight: Tensor, grid: UnbalancedGrid, bits: int) -> Tensor:
    """Returns the uint8 codes with shape (out, *), clip(round(w / s) + z, 0, 2^b - 1) (Eq. 1).

    Where z is not whole, they are clip(round(w / s + z), 0, 2^b - 1).
    """
    weight = checked_weight(weight)
    check_scale(grid.scale, weight)
    return _round(weight, grid, bits).to(torch.uint8)


def dequantize_unbalanced(codes: Tensor, grid: UnbalancedGrid) -> Tensor:
    """Returns the weights that codes stand for, s (code - z), in the type of the scale."""
    return (codes - grid.zero) * grid.scale


@torch.no_grad()
def fake_quantize_unbalanced(weight: Tensor, grid: UnbalancedGrid, bits: int) -> Tensor:
    """Returns the weights after quantizing and dequantizing, in their own type."""
    return dequantize_unbalanced(quantize_unbalanced(weight, grid, bits), grid).to(weight.dtype)


def _last_code(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")
    return 2**bits - 1


def _round(weight: Tensor, grid: UnbalancedGrid, bits: int) -> Tensor:
    part = grid.zero - grid.zero.floor()  # 0 or 1/2
    return ((weight / grid.scale + part).round_() + grid.zero.floor()).clamp_(0, _last_code(bits))
