"""Explorers: a plotting function with controls when someone is there to use them.

Widgets leave nothing in a rendered page, so a headless run draws the first of each choice once.
"""

__all__ = ["explore"]

import os
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from IPython.display import display
from ipywidgets import Dropdown, interact


def explore(draw: Callable[..., object], /, **choices: Sequence) -> None:
    """Draws for the first of each choice, with live controls for all of them.

    Arguments:
        draw: Takes one of each choice by name, and returns a figure, a table or markdown.
        choices: The values to choose from, the most telling first.
    """
    if empty := [name for name, values in choices.items() if len(values) == 0]:
        raise ValueError(f"nothing to choose from for {empty}")

    def show(**chosen: object) -> None:
        drawn = draw(**chosen)
        plt.close("all")  # or the notebook shows an open figure a second time
        display(drawn)

    if os.environ.get("BF_HEADLESS"):
        show(**{name: values[0] for name, values in choices.items()})
    else:
        # Not the values themselves: `interact` takes three numbers for a slider's range and step.
        interact(show, **{name: Dropdown(options=list(v)) for name, v in choices.items()})
