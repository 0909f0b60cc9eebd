"""Tables of how well grids fit weights, by scale, number of levels and step (§4.1)."""

__all__ = [
    "Example",
    "channel_example",
    "convergence",
    "gaussian_errors",
    "grid_errors",
    "optimum_excess",
    "scale_errors",
]

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bf_lib.grids import (
    alternating_scale,
    fake_quantize,
    fitted_scale,
    levels_of_bits,
    minmax_scale,
    optimal_scale,
    quantize,
    relative_mse,
)
from bf_lib.unbalanced import (
    alternating_grid,
    fake_quantize_unbalanced,
    fixed_grid,
    minmax_grid,
    shifted_grid,
)

SCALES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "minmax": minmax_scale,
    "alternating": alternating_scale,
    "optimal": optimal_scale,
}


def grid_errors(weights: Iterable[tuple[str, Tensor]], bits: Sequence[int]) -> pd.DataFrame:
    """Tabulates the relative squared error of layers on plain and balanced grids.

    Plain grids have 2^b levels: "plain minmax" spans each channel with a zero-point of its own,
    "plain alternating" has the codes {-2^(b-1), ..., 2^(b-1) - 1} and an alternating scale,
    "shifted alternating" as many levels at odd halves, {..., -1/2, 1/2, ...}, and none at zero.
    Balanced grids have 2^b + 1 levels.

    Arguments:
        weights: Names of layers with their weights.
        bits: The paper's b, at least 1.

    Returns:
        Columns layer, method, levels, relative_mse.
    """
    rows = []
    for name, weight in weights:
        for b in bits:
            for method, (levels, approximation) in _approximations(weight, b).items():
                rows.append((name, method, levels, float(relative_mse(weight, approximation))))
    return pd.DataFrame(rows, columns=["layer", "method", "levels", "relative_mse"])


def _approximations(weight: Tensor, bits: int) -> dict[str, tuple[int, Tensor]]:
    """Returns the levels and the quantized weight of each method."""
    plain = {
        "plain minmax": minmax_grid(weight, bits),
        "plain alternating": alternating_grid(weight, bits, fixed_grid(weight, bits)),
        "shifted alternating": alternating_grid(weight, bits, shifted_grid(weight, bits)),
    }
    found = {
        method: (2**bits, fake_quantize_unbalanced(weight, grid, bits))
        for method, grid in plain.items()
    }
    levels = levels_of_bits(bits)
    for method, scale in SCALES.items():
        found[method] = (levels, fake_quantize(weight, scale(weight, levels), levels))
    return found


def scale_errors(weight: Tensor, levels: int) -> dict[str, float]:
    """Returns the relative squared error of one layer by the way to choose the scale."""
    return {
        method: _error(weight, scale(weight, levels), levels) for method, scale in SCALES.items()
    }


def convergence(
    weights: Iterable[tuple[str, Tensor]], levels: Sequence[int], steps: Sequence[int]
) -> pd.DataFrame:
    """Tabulates how far the alternating scale is from the optimum after some steps.

    Returns:
        Columns layer, levels, steps, excess (the error over the optimum's, less one) and settled
        (the share of channels whose codes the next step leaves as they are: they have converged,
        to the optimum or not).
    """
    rows = []
    for name, weight in weights:
        for count in levels:
            best = _error(weight, optimal_scale(weight, count), count)
            for step in steps:
                scale = alternating_scale(weight, count, step)
                excess = _excess(_error(weight, scale, count), best)
                rows.append((name, count, step, excess, _settled(weight, scale, count)))
    return pd.DataFrame(rows, columns=["layer", "levels", "steps", "excess", "settled"])


def _settled(weight: Tensor, scale: Tensor, levels: int) -> float:
    """Returns the share of channels whose codes one more alternating step does not change."""
    codes = quantize(weight, scale, levels).codes
    after = quantize(weight, fitted_scale(weight, codes), levels).codes
    return float((codes == after).flatten(1).all(dim=1).float().mean())


def optimum_excess(weights: Iterable[tuple[str, Tensor]], levels: Sequence[int]) -> float:
    """Returns by how much the optimal scale is worse than another one in any channel at most.

    The relative squared error of each channel is compared with the less of those of min-max and of
    the alternating scale; the optimum is one if the result is not above rounding.
    """
    worst = -math.inf
    for _, weight in weights:
        for count in levels:
            errors = {
                method: relative_mse(
                    weight, fake_quantize(weight, scale(weight, count), count), per_channel=True
                )
                for method, scale in SCALES.items()
            }
            others = torch.minimum(errors["minmax"], errors["alternating"])
            worst = max(worst, float((errors["optimal"] - others).max()))
    return worst


def _excess(error: float, best: float) -> float:
    """Returns how much larger an error is than the best one, relative to it."""
    if best == 0:  # a layer that a grid represents exactly
        return 0.0 if error == 0 else math.inf
    return error / best - 1


def _error(weight: Tensor, scale: Tensor, levels: int) -> float:
    return float(relative_mse(weight, fake_quantize(weight, scale, levels)))


def gaussian_errors(levels: Sequence[int], generator: torch.Generator) -> pd.DataFrame:
    """Tabulates the error of each way to choose the scale on Gaussian channels of 1280 weights."""
    weight = torch.randn(1000, 1280, generator=generator)
    rows = [
        (count, method, error)
        for count in levels
        for method, error in scale_errors(weight, count).items()
    ]
    table = pd.DataFrame(rows, columns=["levels", "method", "relative_mse"])
    return table.pivot(index="levels", columns="method", values="relative_mse")[list(SCALES)]


class Example(NamedTuple):
    """Single channels, and the scales that each method gives them, as `plots` takes them."""

    weights: pd.DataFrame  # columns channel, weight
    scales: pd.DataFrame  # columns channel, method, levels, scale


def channel_example(
    weights: Mapping[str, Tensor], levels: int, channels: Sequence[int] = (0,)
) -> Example:
    """Takes some output channels of each layer, with their scales at a number of levels."""
    values, scales = [], []
    for name, weight in weights.items():
        found = {method: scale(weight, levels).flatten() for method, scale in SCALES.items()}
        for channel in channels:
            label = f"{name}\nchannel {channel}"
            values += [(label, float(w)) for w in weight[channel].flatten()]
            scales += [(label, m, levels, float(s[channel])) for m, s in found.items()]
    return Example(
        pd.DataFrame(values, columns=["channel", "weight"]),
        pd.DataFrame(scales, columns=["channel", "method", "levels", "scale"]),
    )
