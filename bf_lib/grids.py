"""Balanced grids: levels, scales, codes and the error they leave (BitsFusion, §4.1).

A grid of L levels, L odd, has the codes {-(L - 1)/2, ..., (L - 1)/2}. The paper's "b bits" is
L = 2^b + 1: one level more than plain b bits have, which makes the grid symmetric about zero. The
levels are spread by one scale per output channel; a weight is approximated by scale times code.

Three ways to choose the scale of a channel:

- `minmax_scale` maps the largest magnitude to the last level, so nothing is clipped;
- `alternating_scale` improves on it by the paper's alternating optimisation (Eq. 5), which stops
  at a local optimum;
- `optimal_scale` finds the global optimum of the same objective (Eq. 4).

Weights have shape (out, *) with at least two dimensions, scales the shape (out, 1, ...). Any
floating-point type is accepted; arithmetic is done in float32, or float64 for float64 weights, and
scales have that type. A channel of zeros has scale 1. A weight that is NaN or infinite, or a
tensor without elements, is a `ValueError`.
"""

__all__ = [
    "Quantized",
    "alternating_scale",
    "balanced_codes",
    "bits_of_levels",
    "dequantize",
    "fake_quantize",
    "gaussian_rate_distortion",
    "levels_of_bits",
    "minmax_scale",
    "nominal_bits",
    "optimal_scale",
    "quantize",
    "relative_mse",
]

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from bf_lib.scale_search import POINTS, least_squares_scale

CHUNK = 2**18  # numbers that `optimal_scale` works on at a time: bounds its memory, fits a cache


def levels_of_bits(bits: int) -> int:
    """Returns the levels 2^b + 1 of the paper's "b bits"."""
    if bits < 1:
        raise ValueError(f"bits must be at least 1, got {bits}")
    return 2**bits + 1


def nominal_bits(levels: int) -> int:
    """Returns the paper's "b bits" of 2^b + 1 levels: the inverse of `levels_of_bits`."""
    bits = (levels - 1).bit_length() - 1
    if bits < 1 or levels != 2**bits + 1:
        raise ValueError(f"levels must be 2**b + 1 for a whole b >= 1, got {levels}")
    return bits


def bits_of_levels(levels: int) -> float:
    """Returns what one code of a grid weighs in bits, log2(levels): 1.585 for 3 levels."""
    _bound(levels)
    return math.log2(levels)


def gaussian_rate_distortion(bits: float) -> float:
    """Returns the least relative error of a Gaussian source at this rate, 2^(-2 bits).

    No code of any kind leaves less (Shannon's distortion-rate function); comparing it with
    `relative_mse` tells how much a uniform grid gives away.
    """
    return 2.0 ** (-2 * bits)


def balanced_codes(levels: int) -> Tensor:
    """Returns the codes of a grid in rising order, in the type that `quantize` gives them."""
    bound = _bound(levels)
    return torch.arange(-bound, bound + 1, dtype=_code_type(bound))


@torch.no_grad()
def minmax_scale(weight: Tensor, levels: int) -> Tensor:
    """Returns the scale that maps the largest magnitude of a channel to the last level."""
    bound = _bound(levels)
    weight = checked_weight(weight)
    return or_one(_magnitude(weight) / bound)


@torch.no_grad()
def alternating_scale(weight: Tensor, levels: int, steps: int = 10) -> Tensor:
    """Returns the scale after alternating between best codes and best scale (Eq. 5).

    Each step rounds the weights to the grid, then takes the least-squares scale of those codes,
    s = <w, q> / <q, q>; the error never rises. The paper takes 10 steps and does not say where
    they start; here it is `minmax_scale`.

    Arguments:
        weight: The weights, with shape (out, *).
        levels: The number of levels; odd, at least 3.
        steps: The number of alternations.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    bound = _bound(levels)
    weight = checked_weight(weight)
    scale = or_one(_magnitude(weight) / bound)
    for _ in range(steps):
        scale = fitted_scale(weight, _round(weight, scale, bound))
    return scale


@torch.no_grad()
def optimal_scale(weight: Tensor, levels: int) -> Tensor:
    """Returns the scale that leaves the least squared error of all scales, per channel (Eq. 4).

    It is the global optimum, found by the exact search of `bf_lib.scale_search`, so no channel
    has more error than with `minmax_scale` or `alternating_scale`, up to the rounding of scale
    times code to the type of the weights (below 1e-7 of the squared norm in float32).
    """
    bound = _bound(levels)
    weight = checked_weight(weight)
    magnitudes = weight.flatten(1).abs()
    filled = magnitudes.any(dim=1).nonzero().flatten()
    scale = torch.ones_like(magnitudes[:, :1])
    size = max(1, CHUNK // max(magnitudes.shape[1], POINTS * bound))
    for start in range(0, len(filled), size):
        rows = filled[start : start + size]
        scale[rows] = least_squares_scale(magnitudes[rows], bound).to(scale.dtype)
    return or_one(scale.view(-1, *[1] * (weight.ndim - 1)))


class Quantized(NamedTuple):
    """Integer codes with shape (out, *), and the scale of each output channel."""

    codes: Tensor  # int8 up to 255 levels, int16 up to 65,535, else int32
    scale: Tensor  # (out, 1, ...)


@torch.no_grad()
def quantize(weight: Tensor, scale: Tensor, levels: int) -> Quantized:
    """Rounds each weight to its nearest level; halfway, to the even code.

    Arguments:
        weight: The weights, with shape (out, *).
        scale: The scale of each output channel, positive, with shape (out, 1, ...).
        levels: The number of levels; odd, at least 3.
    """
    bound = _bound(levels)
    weight = checked_weight(weight)
    check_scale(scale, weight)
    return Quantized(_round(weight, scale, bound).to(_code_type(bound)), scale)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the weights that codes stand for, scale times code, in the type of the scale."""
    return codes.to(scale.dtype) * scale


@torch.no_grad()
def fake_quantize(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Returns the weights as they are after `quantize` and `dequantize`, in their own type."""
    return dequantize(*quantize(weight, scale, levels)).to(weight.dtype)


@torch.no_grad()
def relative_mse(weight: Tensor, approximation: Tensor, per_channel: bool = False) -> Tensor:
    """Returns the squared error of an approximation over the squared norm of the weights.

    Where the weights are all zero it is 0 if the approximation is as well, infinite otherwise.

    Arguments:
        weight: The weights, with shape (out, *).
        approximation: What stands for them, with the same shape.
        per_channel: Whether to return one number per output channel instead of one in all.

    Returns:
        The ratio in float64, with shape (out,) or ().
    """
    if weight.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(approximation.shape)}")
    dims = tuple(range(1, weight.ndim)) if per_channel else None
    error = (weight.double() - approximation.double()).square().sum(dim=dims)
    return torch.where(error == 0, 0.0, error / weight.double().square().sum(dim=dims))


def _bound(levels: int) -> int:
    """Returns the largest code of a grid."""
    try:
        count = operator.index(levels)  # also of numpy's integers
    except TypeError:
        count = 0
    if count < 3 or count % 2 == 0:
        raise ValueError(f"levels must be an odd whole number of at least 3, got {levels}")
    return (count - 1) // 2


def _code_type(bound: int) -> torch.dtype:
    """Returns the smallest type that holds the codes."""
    types = (torch.int8, torch.int16, torch.int32)
    return next(kind for kind in types if bound <= torch.iinfo(kind).max)


def _round(weight: Tensor, scale: Tensor, bound: int) -> Tensor:
    return (weight / scale).round_().clamp_(-bound, bound)


def _magnitude(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)


def or_one(scale: Tensor) -> Tensor:
    """Replaces the scale 0 of a channel of zeros, or of one too small to have a scale, by 1."""
    return torch.where(scale > 0, scale, 1)


def fitted_scale(weight: Tensor, codes: Tensor) -> Tensor:
    """Returns the least-squares scale of each channel for given codes, <w, q> / <q, q> (Eq. 5)."""
    dims = tuple(range(1, weight.ndim))
    fit = (weight.double() * codes).sum(dim=dims, keepdim=True)
    size = codes.square().sum(dim=dims, keepdim=True, dtype=torch.float64)
    # A channel of zeros has no codes to fit: 0 / 1, and then the scale 1.
    return or_one((fit / or_one(size)).to(weight.dtype))


def checked_weight(weight: Tensor) -> Tensor:
    """Returns the weights in the type to compute in, or says why they cannot be quantized."""
    if weight.ndim < 2:
        raise ValueError(f"weights must have shape (out, *), got {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"weights have no elements: their shape is {tuple(weight.shape)}")
    finite = weight.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"weights are NaN or infinite in {len(bad)} of {len(finite)} output channels, "
            f"the first of them channel {bad[0]}"
        )
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def check_scale(scale: Tensor, weight: Tensor) -> None:
    """Says what is wrong with the scales of weights, if anything is."""
    shape = (len(weight), *[1] * (weight.ndim - 1))
    if scale.shape != shape:
        raise ValueError(f"scale must have shape {shape}, got {tuple(scale.shape)}")
    if not ((scale > 0) & scale.isfinite()).all():
        raise ValueError("scale must be positive and finite in each channel")
