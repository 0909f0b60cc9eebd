"""Figures of trainings: losses, and errors over time."""

__all__ = ["losses", "time_errors", "training_curves"]

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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


def losses(log: pd.DataFrame) -> Figure:
    """The losses of one training by step, each on a scale of its own.

    A part that is all of the loss is not shown again. Scales are logarithmic for losses that
    change by a factor of more than two.

    Arguments:
        log: The log of `bf_lib.training`: columns step, lr, the losses, and seconds_per_step.
    """
    known = log.drop(columns=["step", "lr", "seconds_per_step"]).T.drop_duplicates().T
    figure, axes = plt.subplots(1, len(known.columns), figsize=(WIDTH, 2.2), squeeze=False)
    for axis, (name, values) in zip(axes.flat, known.items(), strict=True):
        axis.plot(log.step, values, lw=1)
        axis.set(title=name, xlabel="step")
        if values.max() > 2 * values.min() > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("mean squared error")
    return figure


def time_errors(rows: pd.DataFrame, densities: dict[str, list[float]]) -> Figure:
    """The error of students over time, and how often time-steps are trained on (Fig. 4).

    Arguments:
        rows: Columns student, t and latent_mse, as `time_errors.errors_over_time` returns the
            latter two.
        densities: Probabilities of equal stretches of time, by what they are called.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained")
    for name, part in rows.groupby("student", sort=False):
        left.plot(part.t, part.latent_mse, "o-", ms=3, label=name)
    left.set(xlabel="time-step t", ylabel="squared error of latents", yscale="log")
    for name, density in densities.items():
        width = 1000 / len(density)
        places = [(i + 0.5) * width for i in range(len(density))]
        right.plot(places, [1000 * p / width for p in density], label=name)
    right.set(xlabel="time-step t", ylabel="density, 1 if uniform", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=7)
    return figure
