"""Figures of notebook 90: training of the embedded model."""

__all__ = ["training_curves"]

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH

COLUMNS = 4


def training_curves(**logs: pd.DataFrame) -> Figure:
    """The loss of each training by step, on a logarithmic scale."""
    rows = math.ceil(len(logs) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(WIDTH, 2.0 * rows), squeeze=False)
    for axis in axes.flat[len(logs) :]:
        axis.remove()
    for axis, (name, log) in zip(axes.flat, logs.items(), strict=False):
        axis.plot(log.step, log.loss, lw=0.8)
        axis.set(title=name.replace("_", " "), xlabel="step", yscale="log")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    return figure
