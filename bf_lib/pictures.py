"""Images in figures: grids with captions, and rows to compare."""

__all__ = ["captioned", "draw_rows", "image_rows"]

import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure, SubFigure
from numpy import ndarray as Array

WIDTH = 7.0  # inches, of a figure over the whole page
SMALL = 6.5  # points, of captions


def captioned(images: Array, captions: Sequence[str], columns: int = 6) -> Figure:
    """A grid of images (n, h, w, 3), each with its caption below."""
    rows = -(-len(images) // columns)
    side = WIDTH / columns  # inches
    texts = [textwrap.fill(text, int(side / 0.055)) for text in captions]
    height = rows * (side + 0.12 * (1 + max(text.count("\n") for text in texts)))
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
        axis.set_anchor("N")
    for axis, image, text in zip(axes.flat, images, texts, strict=False):
        axis.imshow(image)
        axis.text(
            0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=SMALL
        )
    return figure


def image_rows(rows: Mapping[str, Array], below: Sequence[str] = ()) -> Figure:
    """Rows of images (n, h, w, 3), each with its name at the left, and captions below the last."""
    columns = max(map(len, rows.values()))
    side = min(0.9, (WIDTH - 1.3) / columns)  # inches, of an image
    height = side * len(rows) + (0.9 if below else 0.1)
    figure = plt.figure(figsize=(1.3 + side * columns, height))
    axes = draw_rows(figure, rows)
    for axis, text in zip(axes[-1], below, strict=False):
        axis.set_xlabel(textwrap.fill(text, int(side / 0.055)), fontsize=SMALL)
    return figure


def draw_rows(figure: Figure | SubFigure, rows: Mapping[str, Array]) -> Array:
    """Draws rows of images into a figure and returns its axes, with shape (rows, columns)."""
    columns = max(map(len, rows.values()))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image)
        # Names of layers may break after a dot, numbers may not.
        label = textwrap.fill(re.sub(r"\.(?=[a-z])", ". ", name), 18).replace(". ", ".")
        line[0].set_ylabel(label, fontsize=SMALL, rotation=0, ha="right", va="center")
    return axes
