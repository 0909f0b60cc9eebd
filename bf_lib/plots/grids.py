"""Grids, scales and the errors they leave."""

__all__ = ["error_by_layer", "error_by_levels", "steps_to_converge", "weight_histograms"]

import itertools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import mark_blocks, short

SCALES = {  # way to choose the scale -> its label, colour and marker
    "plain minmax": ("plain $2^b$ levels, min-max", "#999999", "x"),
    "plain alternating": ("plain $2^b$ levels, alternating", "#E69F00", "D"),
    "shifted alternating": ("half-shifted $2^b$ levels, alternating", "#009E73", "v"),
    "minmax": ("min-max", "#D55E00", "s"),
    "alternating": ("alternating, 10 steps", "#56B4E9", "^"),
    "optimal": ("optimum", "#0072B2", "o"),
}


def weight_histograms(weights: pd.DataFrame, scales: pd.DataFrame) -> Figure:
    """Histograms of single channels, with the levels that each way to choose a scale puts there.

    Arguments:
        weights: Columns channel, weight.
        scales: Columns channel, method, levels (odd), scale.
    """
    channels = list(dict.fromkeys(weights.channel))
    columns = min(4, len(channels))
    rows = -(-len(channels) // columns)
    size = (WIDTH, 2.3 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, channel in zip(axes.flat, channels, strict=False):
        axis.hist(weights.weight[weights.channel == channel], bins=40, color="#bbbbbb")
        top = axis.get_ylim()[1]
        chosen = scales[scales.channel == channel]
        for line, row in enumerate(chosen.itertuples()):
            label, colour, marker = SCALES[row.method]
            levels = (np.arange(row.levels) - (row.levels - 1) // 2) * row.scale
            height = np.full(row.levels, -top * (0.08 + 0.09 * line))
            style = {"marker": marker, "color": colour, "label": label, "ls": "none"}
            axis.plot(levels, height, **style)
        axis.axhline(0, color="#444444", lw=0.6)
        axis.set_ylim(-top * 0.34, top * 1.02)
        axis.set_title(_broken(short(channel)), fontsize=6)
        axis.set(yticks=[], xlabel="weight")
        axis.tick_params(axis="x", labelsize=6)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _broken(name: str, width: int = 26) -> str:
    """Breaks a dotted name into lines."""
    return "\n".join(
        line for part in name.split("\n") for line in textwrap.wrap(part.replace(".", ". "), width)
    ).replace(". ", ".")


def error_by_levels(errors: pd.DataFrame) -> Figure:
    """The error that each way to choose the scale leaves, beside what any code must leave.

    Arguments:
        errors: Columns layer, method, levels, relative_mse, over all layers.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for method, (label, colour, marker) in SCALES.items():
        part = errors[errors.method == method]
        spread = part.groupby("levels").relative_mse.quantile([0.05, 0.5, 0.95]).unstack()
        bits = np.log2(spread.index.to_numpy())
        middle = spread[0.5].to_numpy()
        bars = np.abs(spread[[0.05, 0.95]].to_numpy().T - middle)
        style = {"marker": marker, "color": colour, "label": label, "capsize": 2}
        left.errorbar(bits, middle, bars, **style)
        right.plot(bits, 10 * np.log10(middle * 4**bits), marker=marker, color=colour)
    rate = np.linspace(1, np.log2(errors.levels.max()) + 0.1, 50)
    left.plot(rate, 4.0**-rate, "--", color="#444444", label="Gaussian rate-distortion bound")
    left.set(yscale="log", xlabel="bits per weight, log2(levels)", ylabel="relative squared error")
    right.axhline(0, ls="--", color="#444444")
    right.set(xlabel="bits per weight, log2(levels)", ylabel="median, dB above the bound")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def error_by_layer(errors: pd.DataFrame) -> Figure:
    """The error of each layer on balanced grids, one row of axes per number of levels.

    Arguments:
        errors: Columns layer, method, levels, relative_mse, depth, block.
    """
    balanced = errors[errors.levels % 2 == 1]
    counts = sorted(balanced.levels.unique())
    size = (WIDTH, 1.35 * len(counts) + 0.9)
    figure, axes = plt.subplots(len(counts), 1, figsize=size, sharex=True, squeeze=False)
    for axis, levels in zip(axes[:, 0], counts, strict=True):
        for method, (label, colour, marker) in SCALES.items():
            part = balanced[(balanced.levels == levels) & (balanced.method == method)]
            style = {"marker": marker, "ms": 2, "ls": "none", "color": colour, "label": label}
            if len(part):
                axis.plot(part.depth, part.relative_mse, **style)
        axis.set(yscale="log", ylabel=f"{levels} levels")
    figure.align_ylabels()
    mark_blocks(axes[-1, 0], balanced)
    figure.supylabel("relative squared error", fontsize=9)
    axes[-1, 0].set_xlabel("layer, in order of execution")
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=3, markerscale=2.5)
    return figure


def steps_to_converge(excess: pd.DataFrame) -> Figure:
    """How far the alternating scale is from the optimum after each step, and from its own end.

    Arguments:
        excess: Columns levels, steps, excess (of the error over the optimum's, relative) and
            settled (share of channels that have converged), one row a layer.
    """
    figure, (axis, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0))
    marks = itertools.cycle("os^Dv")
    for levels, part in excess.groupby("levels"):
        by_step = part.groupby("steps").excess.quantile([0.25, 0.5, 0.75]).unstack()
        (line,) = axis.plot(
            by_step.index, 100 * by_step[0.5], marker=next(marks), label=f"{levels} levels"
        )
        shade = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
        axis.fill_between(by_step.index, 100 * by_step[0.25], 100 * by_step[0.75], **shade)
        settled = 100 * part.groupby("steps").settled.mean()
        right.plot(settled, marker=line.get_marker(), color=line.get_color())
    for each in (axis, right):
        each.axvline(10, color="#444444", ls=":", lw=0.8)
    right.set(xlabel="alternating steps from min-max", ylabel="channels that have converged (%)")
    right.annotate(
        "the paper's 10 steps",
        (10, 0.03),
        (4, 0),
        fontsize=8,
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
    )
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set(xlabel="alternating steps from min-max", ylabel="error above the optimum's (%)")
    axis.set_ylim(0, 200 * excess.excess.max() + 0.1)
    axis.legend()
    return figure
