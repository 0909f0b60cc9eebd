"""Figures of trained students: scores with intervals, differences, quality against size."""

__all__ = ["differences", "scores", "trained_frontier"]

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bf_lib.pictures import WIDTH

LABELS = {
    "passed": "challenges passed",
    "clip": "CLIP score",
    "mse": "MSE to full precision",
    "psnr": "PSNR, dB",
    "perceptual": "perceptual distance",
}
ROW = 0.22  # inches
MARKERS = "osD^vPX*hp"  # as many as there are colours


def scores(rows: pd.DataFrame, reference: str = "full precision") -> Figure:
    """Scores with their intervals, a line each, with the reference's as a vertical line.

    Arguments:
        rows: Columns name, score, value, low and high.
        reference: Whose value is the vertical line.
    """
    names, kinds = list(rows.name.unique()), list(rows.score.unique())
    figure, axes = _lines(len(names), kinds)
    for axis, kind in zip(axes, kinds, strict=True):
        part = rows[rows.score == kind].set_index("name").loc[names]
        _dots(axis, part)
        if kind != "mse" and reference in part.index:
            axis.axvline(part.value[reference], color="0.6", lw=0.8, zorder=0)
    axes[0].set_yticks(range(len(names)), names)
    return figure


def differences(rows: pd.DataFrame, margins: Mapping[str, float] | None = None) -> Figure:
    """Differences of pairs with their intervals, and zero as a vertical line.

    Arguments:
        rows: Columns name, score, value, low and high.
        margins: By score, how far below zero a dotted line is.
    """
    names, kinds = list(rows.name.unique()), list(rows.score.unique())
    figure, axes = _lines(len(names), kinds)
    for axis, kind in zip(axes, kinds, strict=True):
        _dots(axis, rows[rows.score == kind].set_index("name").reindex(names))
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        if margins and kind in margins:
            axis.axvline(-margins[kind], color="#D55E00", lw=0.8, ls=":", zorder=0)
    axes[0].set_yticks(range(len(names)), names)
    return figure


def trained_frontier(
    rows: pd.DataFrame, groups: Mapping[str, Sequence[str]], reference: str = "full precision"
) -> Figure:
    """Scores against stored bits, with lines through the rows of each group.

    Arguments:
        rows: Columns row, bits, score, value, low and high.
        groups: By what they are called, the rows of each; ten at most.
        reference: Whose value and interval is a band over all sizes.
    """
    if len(groups) > len(MARKERS):
        raise ValueError(f"{len(groups)} groups are too many to tell apart")
    kinds = list(rows.score.unique())
    figure, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 3.0), squeeze=False)
    for axis, kind in zip(axes.flat, kinds, strict=True):
        part = rows[rows.score == kind].set_index("row")
        for marker, (name, members) in zip(MARKERS, groups.items(), strict=False):
            line = part.loc[[m for m in members if m in part.index]].sort_values("bits")
            spread = [line.value - line.low, line.high - line.value]
            axis.errorbar(
                line.bits,
                line.value,
                spread,
                marker=marker,
                ms=4,
                lw=1,
                elinewidth=0.8,
                label=name,
            )
        if reference in part.index and kind != "mse":
            found = part.loc[reference]
            axis.axhspan(found.low, found.high, color="0.9", zorder=0)
            axis.axhline(found.value, color="0.6", lw=0.8, zorder=0)
        axis.set(xlabel="stored bits", title=LABELS[kind])
        if kind == "mse":
            axis.set_yscale("log")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _lines(count: int, kinds: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure of so many lines, with a panel for each score."""
    height = 0.8 + ROW * count
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(WIDTH, height), sharey=True, squeeze=False, layout="constrained"
    )
    axes.flat[0].set_ylim(count - 0.5, -0.5)  # the first is on top
    for axis, kind in zip(axes.flat, kinds, strict=True):
        axis.set_title(LABELS[kind])
        axis.xaxis.set_major_locator(MaxNLocator(4))
    return figure, list(axes.flat)


def _dots(axis: Axes, part: pd.DataFrame) -> None:
    places = range(len(part))
    axis.hlines(places, part.low, part.high, lw=1.2)
    axis.plot(part.value, places, "o", ms=4)
