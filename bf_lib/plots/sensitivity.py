"""What a sweep of layers found."""

__all__ = ["METRICS", "layer_card", "sensitivity_bars", "sensitivity_by_role"]

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy import ndarray as Array

from bf_lib.pictures import WIDTH, draw_rows
from bf_lib.plots.families import FAMILIES, family_legend, family_of, mark_blocks, short

METRICS = {
    "mse": "MSE (0-255 units, squared)",
    "rmse": "root MSE (0-255 units)",
    "psnr": "PSNR (dB)",
    "perceptual": "perceptual distance",
    "clip_drop": "CLIP score drop",
}

LOGARITHMIC = ("mse", "perceptual")  # they spread over orders of magnitude


def sensitivity_bars(rows: pd.DataFrame, metric: str) -> Figure:
    """Bars over the layers in order of execution, one row of axes per bit-width (Figs. 2, 9-12).

    Arguments:
        rows: The table of the sweep.
        metric: One of `METRICS`.
    """
    bits = sorted(rows.bits.unique())
    size = (WIDTH, 1.35 * len(bits) + 0.9)
    figure, axes = plt.subplots(
        len(bits), 1, figsize=size, sharex=True, sharey=metric in LOGARITHMIC, squeeze=False
    )
    for axis, b in zip(axes[:, 0], bits, strict=True):
        part = rows[rows.bits == b].sort_values("depth")
        colours = part.role.map(family_of).map(FAMILIES)
        axis.bar(part.depth, part[metric], color=colours, width=1.0)
        axis.set_ylabel(f"{b} bit" + ("s" if b > 1 else ""))
        if metric in LOGARITHMIC:
            axis.set_yscale("log")
        else:
            axis.axhline(0, color="#444444", lw=0.5)
    figure.align_ylabels()
    mark_blocks(axes[-1, 0], rows)
    figure.supylabel(METRICS[metric], fontsize=9)
    axes[-1, 0].set_xlabel("layer, in order of execution")
    present = set(rows.role.map(family_of))
    family_legend(
        figure, [f for f in FAMILIES if f in present], loc="outside upper center", ncols=4
    )
    return figure


def sensitivity_by_role(rows: pd.DataFrame, bits: int = 1) -> Figure:
    """Every layer as a dot, by role: MSE and CLIP drop at one bit-width."""
    part = rows[rows.bits == bits]
    order = part.groupby("role").mse.median().sort_values(ascending=False).index
    place = part.role.map({role: i for i, role in enumerate(order)})
    # A seed of its own, so that the figure is the same each time.
    shifted = place + np.random.default_rng(0).uniform(-0.2, 0.2, len(part))
    colours = part.role.map(family_of).map(FAMILIES)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.22 * len(order) + 1.2), sharey=True)
    for axis, metric in zip(axes, ("mse", "clip_drop"), strict=True):
        axis.scatter(part[metric], shifted, s=12, c=colours, lw=0)
        middle = part.groupby("role")[metric].median().reindex(order)
        axis.plot(middle, range(len(order)), "|", color="#222222", ms=11, mew=1.6)
        axis.set(xlabel=METRICS[metric], ylabel="")
        axis.grid(axis="x")
    axes[0].set_xscale("log")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(len(order) - 0.5, -0.5)  # the most sensitive role on top
    return figure


def layer_card(
    layer: str,
    bits: int,
    steps: Array,
    rows: pd.DataFrame,
    images: Mapping[str, Array],
) -> Figure:
    """What one layer does at one bit-width: its images, its weights, its place among all layers.

    Arguments:
        layer: The layer's name.
        bits: The paper's b.
        steps: Its weights over the scale of their channel, before rounding.
        rows: The table of the sweep.
        images: Rows of images (n, h, w, 3) by name.
    """
    figure = plt.figure(figsize=(WIDTH, 4.6))
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    draw_rows(above, images)
    left, right = below.subplots(1, 2)
    left.hist(steps, bins=120, color="#bbbbbb")
    for level in range(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1):
        left.axvline(level, color="#0072B2", lw=0.8)
    left.set(yticks=[], xlabel="weight / scale; lines are the levels", title=short(layer))
    values = rows[(rows.bits == bits) & (rows.layer == layer)].squeeze()
    right.set_title(
        f"MSE {values.mse:.3g}, PSNR {values.psnr:.1f} dB,\nperceptual {values.perceptual:.3g}, "
        f"CLIP drop {values.clip_drop:.3g}"
    )
    ranked = rows[rows.bits == bits].sort_values("mse", ignore_index=True)
    right.plot(ranked.index, ranked.mse, color="#999999")
    place = ranked.index[ranked.layer == layer]
    right.plot(place, ranked.mse[place], "o", color="#D55E00", ms=6)
    right.set(yscale="log", xlabel=f"layers by error at {bits} bit(s)", ylabel="MSE")
    return figure
