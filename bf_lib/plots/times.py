"""Time features, and what quantizing the layers that make them does."""

__all__ = ["time_damage", "time_map"]

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH
from bf_lib.plots.families import bits_in_words
from bf_lib.plots.recipes import CLOUD
from bf_lib.plots.sensitivity import METRICS


def time_damage(rows: pd.DataFrame) -> Figure:
    """Image error of quantized time layers beside that of as many weights elsewhere.

    Arguments:
        rows: Columns bits, part ("time layers", or the name of a random set) and mse.
    """
    figure, axis = plt.subplots(figsize=(WIDTH / 2, 2.9))
    sets = rows[rows.part != "time layers"]
    axis.plot(sets.bits, sets.mse, label="other layers, same bytes", **CLOUD)
    middle = sets.groupby("bits").mse.median()
    axis.plot(middle.index, middle, color="#888888", lw=1, label="their median")
    part = rows[rows.part == "time layers"]
    axis.plot(part.bits, part.mse, "o-", color="#D55E00", label="time layers")
    axis.set(yscale="log", ylabel=METRICS["mse"])
    axis.set_xticks(sorted(rows.bits.unique()), map(bits_in_words, sorted(rows.bits.unique())))
    axis.legend()
    return figure


def time_map(timesteps: list[float], values: list[list[float]]) -> Figure:
    """The features that one ResBlock takes from each time-step, as a picture.

    Arguments:
        timesteps: Rising.
        values: One list of features for each of them.
    """
    shown = np.array(values).T
    shown = shown[np.argsort(shown[:, -1] - shown[:, 0])]  # what falls with noise, above
    most = np.abs(shown).max()
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9))
    edges = (timesteps[0], timesteps[-1], len(shown), 0)
    options = {"aspect": "auto", "interpolation": "nearest", "cmap": "RdBu_r"}
    drawn = axis.imshow(shown, extent=edges, vmin=-most, vmax=most, **options)
    axis.set(xlabel="time-step", ylabel="feature, sorted")
    axis.grid(False)
    figure.colorbar(drawn, label="value")
    return figure
