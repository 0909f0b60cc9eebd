"""The families of layers: their colours and names are the same in every figure."""

__all__ = ["FAMILIES", "bits_in_words", "family_legend", "family_of", "mark_blocks", "short"]

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


def bits_in_words(bits: int) -> str:
    """Returns a bit-width as a title has it: "1 bit", "2 bits"."""
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def family_legend(figure: Figure, families: list[str], **options: object) -> None:
    """Adds a legend of families and their colours to a figure."""
    handles = [Patch(color=FAMILIES[family], label=family) for family in families]
    figure.legend(handles=handles, frameon=False, **options)


def mark_blocks(axis: Axes, layers: pd.DataFrame) -> None:
    """Labels the axis of depth by the blocks, and draws lines between them."""
    spans = layers.groupby("block").depth.agg(["min", "max"]).sort_values("min")
    middle = spans.mean(axis=1)
    # down3 has four layers, too few for a label beside that of mid.
    low = middle.index.intersection(["down3"])
    axis.set_xticks(middle.drop(low), middle.index.drop(low), fontsize=7)
    axis.set_xticks(middle[low], low, fontsize=7, minor=True)
    axis.tick_params(axis="x", which="minor", length=0, pad=12)
    axis.tick_params(axis="x", length=0)
    for end in spans["max"].iloc[:-1]:
        axis.axvline(end + 0.5, color="#bbbbbb", lw=0.5, zorder=0)
    axis.set_xlim(layers.depth.min() - 0.5, layers.depth.max() + 0.5)
