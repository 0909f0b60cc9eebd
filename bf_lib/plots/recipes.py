"""Recipes: what they weigh, what they do to images, and how they spend their bits."""

__all__ = [
    "additivity",
    "block_sizes",
    "cumulative_damage",
    "eta_study",
    "frontier",
    "roles_compared",
]

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import FAMILIES, family_legend, family_of
from bf_lib.plots.sensitivity import METRICS

# method -> its colour and marker, the same in every figure
METHODS = {
    "uniform": ("#555555", "s"),
    "paper's rule": ("#E69F00", "o"),
    "paper's rule with CLIP": ("#D55E00", "o"),
    "optimum to 17 levels": ("#56B4E9", "^"),
    "optimum, sweep": ("#0072B2", "^"),
    "optimum, estimate": ("#009E73", "v"),
    "published for SD-v1.5": ("#CC79A7", "D"),
}
SCORES = {
    "mse": METRICS["mse"],
    "clip": "CLIP score",
    "scene": "scene score",
}
CLOUD = {"color": "#bbbbbb", "marker": ".", "ms": 6, "lw": 0, "zorder": 1}


def frontier(rows: pd.DataFrame, full: Mapping[str, float]) -> Figure:
    """What recipes do to images against what they weigh, one pair of axes a score.

    Arguments:
        rows: One row a recipe: method (one of `METHODS`, or "random"), stored_mb, mse, clip and,
            where there is a scene judge, scene.
        full: The scores of full precision: clip, and scene.
    """
    shown = [score for score in SCORES if score in rows]
    figure, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.9), squeeze=False)
    for axis, score in zip(axes[0], shown, strict=True):
        cloud = rows[rows.method == "random"]
        axis.plot(cloud.stored_mb, cloud[score], label="random", **CLOUD)
        for method, (colour, marker) in METHODS.items():
            part = rows[rows.method == method].sort_values("stored_mb")
            style = {"color": colour, "marker": marker, "ms": 4, "lw": 1}
            axis.plot(part.stored_mb, part[score], label=method, **style)
        if score in full:
            axis.axhline(full[score], color="#444444", lw=1, ls="--", label="full precision")
        axis.set(xlabel="stored MB", title=SCORES[score].split(" (")[0])
        if score == "mse":
            axis.set_yscale("log")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def additivity(rows: pd.DataFrame) -> Figure:
    """Measured against predicted image error of whole recipes.

    Arguments:
        rows: One row a recipe: method, predicted (the sum over layers) and mse.
    """
    figure, axis = plt.subplots(figsize=(0.75 * WIDTH, 3.2))
    for method, (colour, marker) in METHODS.items():
        part = rows[rows.method == method]
        axis.plot(part.predicted, part.mse, marker, color=colour, ms=4, label=method)
    cloud = rows[rows.method == "random"]
    axis.plot(cloud.predicted, cloud.mse, label="random", **CLOUD)
    ends = [rows[["predicted", "mse"]].min().min(), rows[["predicted", "mse"]].max().max()]
    axis.plot(ends, ends, color="#888888", lw=0.8, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="sum of the layers' MSE", ylabel="measured MSE")
    figure.legend(loc="outside right center")
    return figure


def cumulative_damage(rows: pd.DataFrame) -> Figure:
    """Image error as layers are quantized one after the other, the least sensitive first.

    Arguments:
        rows: Columns share (of the weights that are quantized), layers (how many), mse and
            predicted (the sum of the layers' own).
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.7), sharey=True)
    for axis, column, label in zip(
        axes, ("layers", "share"), ("layers quantized", "% of the weights quantized"), strict=True
    ):
        place = rows[column] * (100 if column == "share" else 1)
        axis.plot(place, rows.mse, "o-", color="#0072B2", ms=3, label="measured")
        axis.plot(place, rows.predicted, "--", color="#E69F00", label="sum of single layers")
        axis.set(yscale="log", xlabel=label)
    axes[0].set_ylabel(METRICS["mse"])
    axes[0].legend()
    return figure


def eta_study(rows: pd.DataFrame) -> Figure:
    """What the exponent of the layers' sizes does at equal stored size, with 95 % intervals.

    Arguments:
        rows: Columns eta, score (one of `SCORES`), value, low, high.
    """
    shown = [score for score in SCORES if score in set(rows.score)]
    figure, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.4), squeeze=False)
    for axis, score in zip(axes[0], shown, strict=True):
        part = rows[rows.score == score].sort_values("eta")
        axis.vlines(part.eta, part.low, part.high, color="#0072B2", lw=1)
        axis.plot(part.eta, part.value, "o-", color="#0072B2")
        axis.set(xlabel="eta", title=SCORES[score].split(" (")[0], xticks=part.eta)
    return figure


def roles_compared(rows: pd.DataFrame, column: str) -> Figure:
    """Mean bits of two recipes by role or by block, one line from one to the other.

    Arguments:
        rows: A column of roles or blocks, and one for each of the two recipes, by its name.
        column: "role" or "block".
    """
    rows = rows.set_index(column)
    first, second = rows.columns
    rows = rows.sort_values(first, ascending=False) if column == "role" else rows
    place = np.arange(len(rows))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.2 * len(rows) + 1.1))
    colours = ["#888888"] * len(rows)
    if column == "role":
        colours = [FAMILIES[family_of(role)] for role in rows.index]
    axis.hlines(place, rows[first], rows[second], color=colours, lw=1)
    axis.scatter(rows[first], place, s=24, c=colours, marker="o", label=first)
    axis.scatter(rows[second], place, s=24, c=colours, marker="D", label=second)
    axis.set_yticks(place, rows.index)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x")
    axis.set_xlabel("mean b over the layers (2^b + 1 levels)")
    figure.legend(loc="outside upper center", ncols=2)
    if column == "role":
        found = {family_of(role) for role in rows.index}
        shown = [family for family in FAMILIES if family in found]
        family_legend(figure, shown, loc="outside lower center", ncols=4)
    return figure


def block_sizes(parts: pd.DataFrame) -> Figure:
    """The stored bytes of a UNet by block, and in each block by kind.

    Arguments:
        parts: Columns block, kind and stored_bytes.
    """
    sums = parts.pivot_table(
        index="block", columns="kind", values="stored_bytes", aggfunc="sum", sort=False
    ).fillna(0)
    sums = sums.loc[sums.any(axis=1), sums.sum().sort_values(ascending=False).index] / 1e6
    figure, axis = plt.subplots(figsize=(WIDTH, 0.25 * len(sums) + 1.1))
    left = np.zeros(len(sums))
    for kind in sums:
        axis.barh(sums.index, sums[kind], left=left, label=kind)
        left += sums[kind].to_numpy()
    labels = [f"{mb:.2f}" if mb > 0.1 else f"{1e3 * mb:.1f} kB" for mb in left]
    axis.bar_label(axis.containers[-1], labels, fontsize=7, padding=2)
    axis.invert_yaxis()
    axis.grid(axis="x")
    axis.set_xlabel("stored MB")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
