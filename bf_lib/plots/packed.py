"""Packed checkpoints: what codes cost, how fast they are decoded, and what others store."""

__all__ = ["code_bits", "decoding", "layer_bits", "stored_by"]

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH

# way of storing codes -> what it is called, its colour and marker
WAYS = {
    "fields": ("a field of whole bits each", "#555555", "s"),
    "words": ("packed", "#0072B2", "o"),
    "zstd": ("packed and entropy-coded", "#009E73", "v"),
    "entropy": ("entropy of their frequencies", "#E69F00", "_"),
}


def code_bits(rows: pd.DataFrame) -> Figure:
    """Bits of a code above those of equally frequent levels, by how it is stored.

    Arguments:
        rows: Columns levels, log2 and those of `WAYS`, as `packed_bits.code_costs` returns them.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.0))
    places = range(len(rows))
    for way, (label, colour, marker) in WAYS.items():
        axis.plot(places, rows[way] - rows.log2, marker, color=colour, label=label, ms=6)
    axis.axhline(0, color="#444444", lw=1, ls="--")
    axis.set_xticks(places, rows.levels)
    axis.set(xlabel="levels", ylabel="bits of a code, above log2(levels)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def layer_bits(rows: pd.DataFrame) -> Figure:
    """Bits of the codes of each layer against the entropy of their frequencies.

    Arguments:
        rows: Columns levels and those of `WAYS` but "fields", as `packed_bits.layer_costs`
            returns them.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.0))
    for way in ("words", "zstd"):
        label, colour, marker = WAYS[way]
        style = {"color": colour, "ms": 3, "alpha": 0.6}
        axis.plot(rows.entropy, rows[way], marker, label=label, **style)
    ends = [rows.entropy.min(), rows.entropy.max()]
    axis.plot(ends, ends, color="#444444", lw=1, ls="--", label="no more than entropy")
    axis.set(xlabel="entropy of a layer's codes (bits)", ylabel="stored bits of a code")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def decoding(rows: pd.DataFrame) -> Figure:
    """Weights decoded a second by a thread, and float32 written to memory in the same time.

    Arguments:
        rows: Columns levels, weights_per_s and written_per_s, one row for each number of levels,
            as `packed_study.decode_speeds` returns them.
    """
    figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 3.0))
    places = range(len(rows))
    axis.bar(places, rows.weights_per_s / 1e9, color=WAYS["words"][1], width=0.6, label="decoded")
    label = "written, at most"
    axis.plot(places, rows.written_per_s / 1e9, "_", color="#444444", ms=22, label=label)
    axis.set_xticks(places, rows.levels)
    axis.set(xlabel="levels", ylabel="billion weights a second")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def stored_by(rows: pd.DataFrame, ours: str = "bf_lib") -> Figure:
    """What each system stores of the same UNet, and how far that is from the original.

    Arguments:
        rows: Columns peer, stored_bits and relative_error; rows without numbers are left out.
        ours: How the names of our own rows begin.
    """
    rows = rows.dropna(subset=["stored_bits", "relative_error"])
    rows = rows.sort_values("stored_bits", ascending=False, ignore_index=True)
    colours = ["#0072B2" if peer.startswith(ours) else "#555555" for peer in rows.peer]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.0 + 0.2 * len(rows)), sharey=True, layout="constrained"
    )
    left.barh(rows.index, rows.stored_bits, color=colours, height=0.7)
    for place, bits in rows.stored_bits.items():
        left.annotate(
            f"{bits:.2f}", (bits, place), (3, 0), textcoords="offset points", va="center", size=7
        )
    left.set(xlabel="stored bits of a parameter", xlim=(0, rows.stored_bits.max() * 1.15))
    left.set_yticks(rows.index, rows.peer)
    left.grid(axis="y", visible=False)
    errors = rows.relative_error.where(rows.relative_error > 0)
    decades = np.floor(np.log10(errors.min())), np.ceil(np.log10(errors.max()))
    right.scatter(errors, rows.index, c=colours)
    right.set(xscale="log", xlim=[10.0**ten for ten in decades], xlabel="relative error of a step")
    for place in rows.index[rows.relative_error == 0]:  # which has no place on this axis
        right.annotate("0", (0.01, place), xycoords=("axes fraction", "data"), va="center", size=7)
    return figure
