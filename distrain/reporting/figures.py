"""Figures for TensorBoard, drawn by matplotlib without a display."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from distrain.files.escaping import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A confusion matrix of more classes has no class names and no numbers.
_MAX_LABELLED_CLASSES = 30
#: Images in a row of the grid.
_COLUMNS = 8
#: Side of each image's square cell, and height of the caption above it, in inches.
_CELL, _TITLE = 1.3, 0.3


def _label(name: str) -> str:
    """A class name as matplotlib shows it, which would read ``$…$`` as a formula and fail at a wrong one."""
    return escaped(name).replace("$", r"\$")


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Draws a confusion matrix: true classes by row, predicted classes by column.

    Each cell shows the count; its colour is the count's share of the row.

    Args:
        confusion: int64 ``[classes, classes]`` counts.
        classes: Class names.
    """
    classes = list(map(_label, classes))
    figure = _figure(max(4.0, min(12.0, 1.8 + 0.55 * len(classes))))
    axes = figure.subplots()
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= _MAX_LABELLED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def predictions(images: Tensor, labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> Figure:
    """Draws a grid of images with their predicted classes; wrong ones are red and followed by the true class.

    Args:
        images: uint8 ``[N, C, H, W]``. Images of 3 channels are shown in colour, of others the first channel in grey.
        labels: True classes, int64 ``[N]``.
        predicted: Predicted classes, int64 ``[N]``.
        classes: Class names.
    """
    classes = list(map(_label, classes))
    columns = min(_COLUMNS, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure = _figure(_CELL * columns, (_CELL + _TITLE) * rows, layout=None)
    # One Axes for all images, whose unit is an inch of the figure: an Axes per image takes ten times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    height, width = images.shape[2:]
    half_width, half_height = (0.85 * _CELL * side / max(height, width) / 2 for side in (width, height))
    for number, (image, label, guess) in enumerate(zip(images, labels.tolist(), predicted.tolist(), strict=True)):
        row, column = divmod(number, columns)
        x, y = (column + 0.5) * _CELL, (row + 1) * (_CELL + _TITLE) - 0.5 * _CELL
        pixels = image.permute(1, 2, 0) if len(image) == 3 else image[0]
        extent = (x - half_width, x + half_width, y + half_height, y - half_height)
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
        caption = classes[guess] if label == guess else f"{classes[guess]}\n(is {classes[label]})"
        colour = "green" if label == guess else "red"
        axes.text(x, y - half_height - 0.05, caption, fontsize=8, color=colour, ha="center", va="bottom")
    axes.set_xlim(0, columns * _CELL)
    axes.set_ylim(rows * (_CELL + _TITLE), 0)
    return figure


def histogram(counts: Mapping[str, Mapping[int, int]], x_label: str, y_label: str) -> Figure:
    """Draws a stacked histogram of integers.

    Args:
        counts: For each part of the stack, by its name: how often each integer occurred.
        x_label: Meaning of the integers.
        y_label: Meaning of the counts.
    """
    figure = _figure(6.0, 3.5)
    axes = figure.subplots()
    numbers = sorted({number for part in counts.values() for number in part})
    below = np.zeros(len(numbers))
    for name, part in counts.items():
        heights = np.array([part.get(number, 0) for number in numbers], dtype=float)
        axes.bar(numbers, heights, bottom=below, label=name)
        below += heights
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend()
    return figure


def _figure(width: float, height: float | None = None, layout: Literal["constrained"] | None = "constrained") -> Figure:
    # Created without pyplot, which has global state and may look for a display.
    # Without a home folder it advises on its own cache in five lines.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or width), layout=layout, dpi=110)
    FigureCanvasAgg(figure)
    return figure
