"""Sensitivities that were estimated or trained, beside those of the sweep."""

__all__ = ["estimate_scatter", "fidelity", "training_gain", "training_scatter"]

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import FAMILIES, bits_in_words, family_legend, family_of
from bf_lib.plots.sensitivity import METRICS

# method -> its colour and marker
METHODS = {
    "image gradient": ("#0072B2", "o"),
    "noise gradient": ("#E69F00", "s"),
    "single step": ("#009E73", "^"),
}


def fidelity(rows: pd.DataFrame, ceilings: pd.DataFrame, metric: str) -> Figure:
    """How well estimates rank the layers, against their cost, one pair of axes a bit-width.

    Arguments:
        rows: The table of `fidelity.fidelity_table`.
        ceilings: Columns metric, bits, ceiling (`fidelity.ceilings`).
        metric: "mse" or "clip_drop", which the estimates are compared with.
    """
    rows, ceilings = (t[t.metric == metric] for t in (rows, ceilings))
    widths = sorted(rows.bits.unique())
    figure, axes = plt.subplots(
        1, len(widths), figsize=(WIDTH, 2.5), sharex=True, sharey=True, squeeze=False
    )
    for axis, b in zip(axes[0], widths, strict=True):
        part = rows[rows.bits == b]
        title = "all together" if b == "all" else bits_in_words(int(b))
        for method, (colour, marker) in METHODS.items():
            line = part[part.method == method].sort_values("share")
            cost = 100 * line.share
            axis.plot(cost, line.spearman, color=colour, marker=marker, ms=4, lw=1, label=method)
            axis.vlines(cost, line.low, line.high, color=colour, lw=0.7)
        axis.axhline(
            ceilings[ceilings.bits == b].ceiling.iloc[0],
            color="#444444",
            lw=1,
            ls="--",
            label="root of the sweep's reliability",
        )
        axis.set(xscale="log", title=title, xlabel="% of the sweep's cost")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid()
    axes[0, 0].set_ylabel("Spearman with the sweep's\n" + METRICS[metric].split(" (")[0])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=7)
    return figure


def estimate_scatter(rows: pd.DataFrame) -> Figure:
    """Estimated against measured image error, one pair of axes a bit-width.

    Arguments:
        rows: One row a candidate: role, bits, mse and error.
    """
    widths = sorted(rows.bits.unique())
    figure, axes = plt.subplots(
        1, len(widths), figsize=(WIDTH, 2.9), sharex=True, sharey=True, squeeze=False
    )
    families = rows.role.map(family_of)
    least = rows.mse[rows.mse > 0].min()
    for axis, b in zip(axes[0], widths, strict=True):
        part = rows[rows.bits == b]
        colours = families[part.index].map(FAMILIES)
        axis.scatter(part.error, part.mse.clip(lower=least), s=7, c=colours, lw=0)
        ends = [least, rows.mse.max()]
        axis.plot(ends, ends, color="#888888", lw=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=bits_in_words(b), xlabel="estimated MSE")
    axes[0, 0].set_ylabel("MSE of the sweep")
    present = [f for f in FAMILIES if f in set(families)]
    family_legend(figure, present, loc="outside upper center", ncols=4)
    return figure


def training_scatter(rows: pd.DataFrame) -> Figure:
    """Image error before and after a candidate is trained, one pair of axes a bit-width.

    Arguments:
        rows: One row a candidate: role, bits, mse and mse_trained.
    """
    widths = sorted(rows.bits.unique())
    figure, axes = plt.subplots(
        1, len(widths), figsize=(WIDTH, 2.9), sharex=True, sharey=True, squeeze=False
    )
    families = rows.role.map(family_of)
    both = pd.concat([rows.mse, rows.mse_trained])
    ends = [both[both > 0].min(), both.max()]
    for axis, b in zip(axes[0], widths, strict=True):
        part = rows[rows.bits == b]
        colours = families[part.index].map(FAMILIES)
        x, y = (part[c].clip(lower=ends[0]) for c in ("mse", "mse_trained"))
        axis.scatter(x, y, s=14, c=colours, lw=0)
        axis.plot(ends, ends, color="#888888", lw=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=bits_in_words(b), xlabel="MSE, untrained")
    axes[0, 0].set_ylabel("MSE, trained")
    present = [f for f in FAMILIES if f in set(families)]
    family_legend(figure, present, loc="outside upper center", ncols=4)
    return figure


def training_gain(rows: pd.DataFrame) -> Figure:
    """The share of the noise error that training takes away, by role and bit-width.

    Arguments:
        rows: One row a candidate: role, bits, and taken, the share.
    """
    order = rows.groupby("role").taken.median().sort_values(ascending=False).index
    figure, axis = plt.subplots(figsize=(WIDTH, 0.2 * len(order) + 1.1))
    for n, (b, marker) in enumerate(zip(sorted(rows.bits.unique()), "os^Dv", strict=False)):
        part = rows[rows.bits == b]
        place = part.role.map({role: i for i, role in enumerate(order)}) + 0.18 * (n - 1)
        colours = part.role.map(family_of).map(FAMILIES)
        axis.scatter(100 * part.taken, place, s=14, c=colours, marker=marker, lw=0)
        axis.plot([], [], marker, color="#666666", ms=4, label=bits_in_words(b))
    axis.axvline(0, color="#444444", lw=0.5)
    axis.set_yticks(range(len(order)), order, fontsize=7)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.grid(axis="x")
    axis.set_xlim(max(-100, 100 * rows.taken.min() - 5), 105)
    axis.set_xlabel("% of the noise error that training takes away")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
