"""Curves of a training."""

__all__ = ["training_curves"]

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bf_lib.pictures import WIDTH


def training_curves(**logs: pd.DataFrame) -> Figure:
    """The loss of each training by step, on a logarithmic scale."""
    figure, axes = plt.subplots(1, len(logs), figsize=(WIDTH, 2.2))
    for axis, (name, log) in zip(axes, logs.items(), strict=True):
        axis.plot(log.step, log.loss, lw=0.8)
        axis.set(title=name.replace("_", " "), xlabel="step", yscale="log")
    axes[0].set_ylabel("loss")
    return figure
