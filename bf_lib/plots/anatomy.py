"""Where the parameters of a UNet are."""

__all__ = ["parameters_by_block", "parameters_by_depth", "parameters_by_role"]

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import FAMILIES, family_legend, family_of, mark_blocks

SD15 = "Stable Diffusion v1.5"


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
    family_legend(figure, list(FAMILIES), loc="outside lower center", ncols=4)
    return figure


def parameters_by_depth(layers: pd.DataFrame) -> Figure:
    """Bars: the weights of each layer in order of execution, on a logarithmic scale."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.6))
    axis.bar(layers.depth, layers.params, color=layers.role.map(family_of).map(FAMILIES), width=1)
    axis.set(yscale="log", ylabel="weights", xlabel="layer, in order of execution")
    mark_blocks(axis, layers)
    family_legend(figure, list(FAMILIES), loc="outside upper center", ncols=4)
    return figure
