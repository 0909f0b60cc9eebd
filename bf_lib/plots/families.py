"""The families of layers: their colours and names are the same in every figure."""

__all__ = ["FAMILIES", "family_legend", "family_of", "mark_blocks", "short"]

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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
    words = layer.replace(".transformer_blocks.0", "").replace("_blocks", "").replace("_block", "")
    return words.replace("attentions", "attn").replace("resnets", "res")


def family_legend(figure: Figure, families: list[str], **options: object) -> None:
    """Adds a legend of families and their colours to a figure."""
    handles = [Patch(color=FAMILIES[family], label=family) for family in families]
    figure.legend(handles=handles, frameon=False, **options)


def mark_blocks(axis: Axes, layers: pd.DataFrame) -> None:
    """Labels the axis of depth by the first layer of each block."""
    starts = layers.groupby("block").depth.min().sort_values()
    axis.set_xticks(starts - 0.5, starts.index, rotation=45, ha="left", fontsize=7)
    axis.margins(x=0.005)
