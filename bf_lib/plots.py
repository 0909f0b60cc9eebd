"""Figures: functions of tables, so that each can be drawn again without computing anything."""

__all__ = [
    "FAMILIES",
    "METRICS",
    "error_by_levels",
    "family_of",
    "layer_card",
    "parameters_by_block",
    "parameters_by_depth",
    "parameters_by_role",
    "sensitivity_bars",
    "sensitivity_by_role",
    "short",
    "steps_to_converge",
    "training_curves",
    "weight_histograms",
]

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy import ndarray as Array

from bf_lib.pictures import WIDTH, draw_rows

SD15 = "Stable Diffusion v1.5"

# family of layers -> its colour (Okabe and Ito's, safe for the colour-blind), the same everywhere
FAMILIES = {
    "resnet conv": "#0072B2",
    "conv shortcut": "#D55E00",
    "resampling conv": "#56B4E9",
    "proj in/out": "#999999",
    "self-attention": "#009E73",
    "cross-attention": "#CC79A7",
    "feed-forward": "#E69F00",
}
METRICS = {
    "mse": "MSE (0-255 units, squared)",
    "psnr": "PSNR (dB)",
    "lpips": "perceptual distance",
    "clip_drop": "CLIP score drop",
}
_FAMILY_OF_ROLE = {
    "resnet.conv1": "resnet conv",
    "resnet.conv2": "resnet conv",
    "resnet.conv_shortcut": "conv shortcut",
    "downsample": "resampling conv",
    "upsample": "resampling conv",
    "proj_in": "proj in/out",
    "proj_out": "proj in/out",
    "ff.in": "feed-forward",
    "ff.out": "feed-forward",
}


def family_of(role: str) -> str:
    """Returns the family of a layer's role, which gives its colour."""
    if role.startswith("self_attn."):
        return "self-attention"
    if role.startswith("cross_attn."):
        return "cross-attention"
    return _FAMILY_OF_ROLE[role]


def short(layer: str) -> str:
    """Shortens a layer's name as the paper does: "down.1.attn.0.attn2.to_k"."""
    words = layer.replace("_blocks", "").replace("_block", "").replace(".transformer_blocks.0", "")
    return words.replace("attentions", "attn").replace("resnets", "res")


def _legend(figure: Figure, families: list[str], **options: object) -> None:
    handles = [Patch(color=FAMILIES[family], label=family) for family in families]
    figure.legend(handles=handles, frameon=False, **options)


def training_curves(**logs: pd.DataFrame) -> Figure:
    """The loss of each training by step, on a logarithmic scale."""
    figure, axes = plt.subplots(1, len(logs), figsize=(WIDTH, 2.2))
    for axis, (name, log) in zip(axes, logs.items(), strict=True):
        axis.plot(log.step, log.loss, lw=0.8)
        axis.set(title=name.replace("_", " "), xlabel="step", yscale="log")
    axes[0].set_ylabel("loss")
    return figure


# ---- 01: where the parameters are


def parameters_by_role(layers: pd.DataFrame, sd15: pd.DataFrame, name: str) -> Figure:
    """Bars: the share of the quantizable weights that each role of layer holds, in two UNets."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    order = sd15.groupby("role").params.sum().sort_values().index
    for axis, title, table in zip(axes, (name, SD15), (layers, sd15), strict=True):
        share = 100 * table.groupby("role").params.sum() / table.params.sum()
        colours = [FAMILIES[family_of(role)] for role in order]
        bars = axis.barh(order, share[order], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        axis.set(title=title, xlabel="share of the quantizable weights (%)")
        axis.margins(x=0.12)
    return figure


def parameters_by_block(layers: pd.DataFrame, sd15: pd.DataFrame, name: str) -> Figure:
    """Stacked bars: how the quantizable weights are spread over blocks and families of layers."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True)
    blocks = ["down0", "down1", "down2", "down3", "mid", "up0", "up1", "up2", "up3"]
    for axis, title, table in zip(axes, (name, SD15), (layers, sd15), strict=True):
        family = table.role.map(family_of).rename("family")
        share = table.groupby([table.block, family]).params.sum().unstack(fill_value=0)
        share = 100 * share.reindex(index=blocks, columns=list(FAMILIES)).fillna(0)
        share = share / table.params.sum()
        share.plot.bar(stacked=True, ax=axis, color=FAMILIES, legend=False, width=0.8, rot=45)
        axis.set(title=title, xlabel="", ylabel="share of the quantizable weights (%)")
    _legend(figure, list(FAMILIES), loc="outside lower center", ncols=4)
    return figure


def parameters_by_depth(layers: pd.DataFrame) -> Figure:
    """Bars: the weights of each layer in order of execution, on a logarithmic scale."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.6))
    axis.bar(layers.depth, layers.params, color=layers.role.map(family_of).map(FAMILIES), width=1)
    axis.set(yscale="log", ylabel="weights", xlabel="layer, in order of execution")
    _mark_blocks(axis, layers)
    _legend(figure, list(FAMILIES), loc="outside upper center", ncols=4)
    return figure


def _mark_blocks(axis: Axes, layers: pd.DataFrame) -> None:
    """Labels the axis of depth by the first layer of each block."""
    starts = layers.groupby("block").depth.min().sort_values()
    axis.set_xticks(starts - 0.5, starts.index, rotation=45, ha="left", fontsize=7)
    axis.margins(x=0.005)


# ---- 02: grids and scales

SCALES = {  # way to choose the scale -> its label, colour and marker
    "plain minmax": ("plain $2^b$ levels, min-max", "#999999", "x"),
    "plain alternating": ("plain $2^b$ levels, alternating", "#E69F00", "D"),
    "minmax": ("min-max", "#D55E00", "s"),
    "alternating": ("alternating, 10 steps", "#56B4E9", "^"),
    "optimal": ("optimum", "#0072B2", "o"),
}


def weight_histograms(weights: pd.DataFrame, scales: pd.DataFrame) -> Figure:
    """Histograms of single channels, with the levels that each way to choose a scale puts there.

    Arguments:
        weights: Columns channel, weight.
        scales: Columns channel, method, levels, scale.
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
        axis.set_title(_broken(channel), fontsize=6)
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
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def steps_to_converge(excess: pd.DataFrame) -> Figure:
    """How far the alternating scale is from the optimum after each step.

    Arguments:
        excess: Columns levels, steps, excess (of the error over the optimum's, relative), one row
            a layer.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.2))
    marks = iter("os^Dv")
    for levels, part in excess.groupby("levels"):
        by_step = part.groupby("steps").excess.quantile([0.25, 0.5, 0.75]).unstack()
        (line,) = axis.plot(
            by_step.index, 100 * by_step[0.5], marker=next(marks), label=f"{levels} levels"
        )
        shade = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
        axis.fill_between(by_step.index, 100 * by_step[0.25], 100 * by_step[0.75], **shade)
    axis.axvline(10, color="#444444", ls=":", lw=0.8)
    axis.annotate(
        "the paper's 10 steps",
        (10, 0.97),
        (4, 0),
        va="top",
        fontsize=8,
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
    )
    axis.set(yscale="symlog", xlabel="alternating steps from min-max")
    axis.set(ylabel="error above the optimum's (%)")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.legend()
    return figure


# ---- 03: sensitivity


def sensitivity_bars(rows: pd.DataFrame, metric: str) -> Figure:
    """Bars over the layers in order of execution, one row of axes per bit-width (Figs. 2, 9-12).

    Arguments:
        rows: The table of the sweep.
        metric: One of `METRICS`.
    """
    bits = sorted(rows.bits.unique())
    size = (WIDTH, 1.35 * len(bits) + 0.9)
    figure, axes = plt.subplots(len(bits), 1, figsize=size, sharex=True, squeeze=False)
    for axis, b in zip(axes[:, 0], bits, strict=True):
        part = rows[rows.bits == b].sort_values("depth")
        colours = part.role.map(family_of).map(FAMILIES)
        axis.bar(part.depth, part[metric], color=colours, width=1.0)
        axis.set_ylabel(f"{b} bit" + ("s" if b > 1 else ""))
        axis.axhline(0, color="#444444", lw=0.5)
    _mark_blocks(axes[-1, 0], rows)
    figure.supylabel(METRICS[metric], fontsize=9)
    axes[-1, 0].set_xlabel("layer, in order of execution")
    present = set(rows.role.map(family_of))
    _legend(figure, [f for f in FAMILIES if f in present], loc="outside upper center", ncols=4)
    return figure


def sensitivity_by_role(rows: pd.DataFrame, bits: int = 1) -> Figure:
    """Every layer as a dot, by role: MSE and CLIP drop at one bit-width."""
    part = rows[rows.bits == bits]
    order = part.groupby("role").mse.median().sort_values(ascending=False).index
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.22 * len(order) + 1.2), sharey=True)
    for axis, metric in zip(axes, ("mse", "clip_drop"), strict=True):
        colours = {role: FAMILIES[family_of(role)] for role in order}
        options = {"order": order, "hue": "role", "palette": colours, "legend": False}
        sns.stripplot(part, x=metric, y="role", ax=axis, size=3.5, jitter=0.2, **options)
        middle = part.groupby("role")[metric].median().reindex(order)
        axis.plot(middle, range(len(order)), "|", color="#222222", ms=11, mew=1.6)
        axis.set(xlabel=METRICS[metric], ylabel="")
        axis.grid(axis="x")
    axes[0].set_xscale("log")
    return figure


def layer_card(
    layer: str,
    bits: int,
    codes: Array,
    rows: pd.DataFrame,
    images: Mapping[str, Array],
) -> Figure:
    """What one layer does at one bit-width: its images, its weights, its place among all layers.

    Arguments:
        layer: The layer's name.
        bits: The paper's b.
        codes: Its weights over the scale of their channel, before rounding.
        rows: The table of the sweep.
        images: Rows of images (n, h, w, 3) by name.
    """
    figure = plt.figure(figsize=(WIDTH, 4.6))
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    draw_rows(above, images)
    left, right = below.subplots(1, 2)
    left.hist(codes, bins=120, color="#bbbbbb")
    for level in range(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1):
        left.axvline(level, color="#0072B2", lw=0.8)
    left.set(yticks=[], xlabel="weight / scale; lines are the levels", title=short(layer))
    ranked = rows[rows.bits == bits].sort_values("mse", ignore_index=True)
    right.plot(ranked.index, ranked.mse, color="#999999")
    place = ranked.index[ranked.layer == layer]
    right.plot(place, ranked.mse[place], "o", color="#D55E00", ms=6)
    right.set(yscale="log", xlabel=f"layers by error at {bits} bit(s)", ylabel="MSE")
    return figure
