"""How metrics and bit-widths go together over layers."""

__all__ = [
    "correlation_heatmaps",
    "paper_intervals",
    "pull_scatter",
    "reliability_bars",
    "scatter_matrix",
]

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import (
    FAMILIES,
    bits_in_words,
    family_legend,
    family_of,
    short,
)
from bf_lib.plots.sensitivity import LOGARITHMIC, METRICS

NAMES = {"mse": "MSE", "psnr": "PSNR", "perceptual": "percept.", "clip_drop": "CLIP drop"}
OURS, PAPERS = "#0072B2", "#D55E00"


def correlation_heatmaps(metrics: pd.DataFrame, bits: pd.DataFrame) -> Figure:
    """Matrices of correlations: of metrics at each bit-width, of bit-widths in each metric.

    Below the diagonal is |Pearson|, above it |Spearman|.

    Arguments:
        metrics: The table of `correlation.between_metrics`.
        bits: The table of `correlation.between_bits`.
    """
    of_bits = [(bits_in_words(b), metrics[metrics.bits == b]) for b in metrics.bits.unique()]
    of_metrics = [(NAMES[m], bits[bits.metric == m]) for m in bits.metric.unique()]
    figure = plt.figure(figsize=(WIDTH, 4.6))
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    for axis, (title, part) in zip(
        np.atleast_1d(above.subplots(1, len(of_bits))), of_bits, strict=True
    ):
        _matrix(axis, part, "first", "second", list(NAMES), title)
    for axis, (title, part) in zip(
        np.atleast_1d(below.subplots(1, len(of_metrics))), of_metrics, strict=True
    ):
        widths = sorted({*part.bits, *part.other_bits})
        _matrix(axis, part, "bits", "other_bits", widths, title)
        axis.set_xlabel("bits", fontsize=7)
    return figure


def _matrix(
    axis: Axes, part: pd.DataFrame, one: str, other: str, labels: list, title: str
) -> None:
    values = np.ones((len(labels), len(labels)))
    for row in part.to_dict("records"):
        i, j = labels.index(row[one]), labels.index(row[other])
        values[j, i], values[i, j] = abs(row["pearson"]), abs(row["spearman"])
    axis.imshow(values, vmin=0, vmax=1, cmap="cividis")
    for i, j in product(range(len(labels)), repeat=2):
        if i != j:
            colour = "white" if values[i, j] < 0.6 else "black"
            axis.text(
                j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8
            )
    shown = [NAMES.get(label, label) for label in labels]
    rotation = 35 if isinstance(labels[0], str) else 0
    axis.set_xticks(
        range(len(labels)), shown, rotation=rotation, ha="right" if rotation else "center"
    )
    axis.set_yticks(range(len(labels)), shown)
    axis.tick_params(length=0, labelsize=7)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9)


def paper_intervals(metrics: pd.DataFrame, bits: pd.DataFrame) -> Figure:
    """Our correlations with their intervals, and the paper's values beside them.

    Arguments:
        metrics: `correlation.beside_paper` of the correlations between metrics.
        bits: The same of those between bit-widths.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharex=True)
    left = [f"MSE and {NAMES[r.second]}, {bits_in_words(r.bits)}" for r in metrics.itertuples()]
    right = [f"{NAMES[r.metric]}, {r.bits} and {r.other_bits} bits" for r in bits.itertuples()]
    for axis, table, labels in zip(axes, (metrics, bits), (left, right), strict=True):
        place = np.arange(len(table))
        axis.plot(table.ours, place, "o", ms=4, color=OURS)
        axis.hlines(place, table.low, table.high, lw=1.2, color=OURS)
        axis.plot(table.paper, place, "D", ms=5, mfc="none", color=PAPERS)
        axis.set_yticks(place, labels, fontsize=7)
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.grid(axis="x")
        axis.set(xlabel="|Pearson| over layers", xlim=(0, 1.02))
    axes[0].plot([], [], "o-", ms=4, color=OURS, label="this model, 95 % interval")
    axes[0].plot(
        [], [], "D", ms=5, mfc="none", color=PAPERS, label="paper, SD-v1.5, candidates trained"
    )
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def scatter_matrix(rows: pd.DataFrame, bits: int) -> Figure:
    """Every pair of metrics over the layers, coloured by family.

    Arguments:
        rows: The table of the sweep.
        bits: The bit-width.
    """
    part = rows[rows.bits == bits]
    families = part.role.map(family_of)
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 5.6), sharex="col", sharey="row")
    columns, lines = list(NAMES)[:-1], list(NAMES)[1:]
    for (i, y), (j, x) in product(enumerate(lines), enumerate(columns)):
        axis = axes[i, j]
        if j > i:
            axis.set_visible(False)
            continue
        axis.scatter(part[x], part[y], s=7, c=families.map(FAMILIES), lw=0)
        for metric, scale in ((x, axis.set_xscale), (y, axis.set_yscale)):
            if metric in LOGARITHMIC:
                # Layers that change nothing have no place on a logarithmic axis but its end.
                scale("symlog", linthresh=part[metric][part[metric] > 0].quantile(0.02))
        if i == len(lines) - 1:
            axis.set_xlabel(METRICS[x], fontsize=8)
        if j == 0:
            axis.set_ylabel(METRICS[y], fontsize=8)
        axis.tick_params(labelsize=7)
    present = [f for f in FAMILIES if f in set(families)]
    family_legend(figure, present, loc="upper right", bbox_to_anchor=(0.98, 0.98))
    return figure


def pull_scatter(pulls: pd.DataFrame, first: str, second: str, named: int = 3) -> Figure:
    """Two metrics of the layers, the size of a dot being its pull on their correlation.

    Arguments:
        pulls: The table of `correlation.influence`.
        first: A metric in it.
        second: The other.
        named: How many layers to name, those that pull most.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9))
    size = 6 + 240 * pulls["pull"].abs() / max(pulls["pull"].abs().max(), 1e-12)
    colours = pulls.role.map(family_of).map(FAMILIES)
    axis.scatter(pulls[first], pulls[second], s=size, c=colours, lw=0, alpha=0.7)
    middle = (pulls[first].min() + pulls[first].max()) / 2
    for n, row in enumerate(pulls.head(named).to_dict("records")):
        right = row[first] > middle
        axis.annotate(
            f"{short(row['layer'])}: {row['pull']:+.2f}",
            (row[first], row[second]),
            xytext=(-9 if right else 9, 7 * (n % 2)),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=7,
        )
    axis.set(xlabel=METRICS[first], ylabel=METRICS[second])
    return figure


def reliability_bars(rows: pd.DataFrame) -> Figure:
    """How reliable each metric of a sweep is, by bit-width.

    Arguments:
        rows: The table of `reliability.reliability_table`.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 2.4))
    widths = sorted(rows.bits.unique())
    metrics = list(rows.metric.unique())
    for n, (b, shade) in enumerate(zip(widths, ("#003f5c", "#0072B2", "#8ec4e8"), strict=False)):
        part = rows[rows.bits == b].set_index("metric").loc[metrics]
        place = np.arange(len(metrics)) + 0.26 * (n - (len(widths) - 1) / 2)
        axis.bar(place, part.icc, 0.24, color=shade, label=bits_in_words(b))
        axis.vlines(place, part.low, part.high, color="#222222", lw=1)
    axis.set_xticks(range(len(metrics)), [METRICS[m].split(" (")[0] for m in metrics])
    axis.axhline(0, color="#444444", lw=0.5)
    axis.set(ylabel="reliability (ICC)", ylim=(min(0.0, rows.low.min()) - 0.05, 1.05))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
