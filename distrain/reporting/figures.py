"""Pictures for TensorBoard, drawn by matplotlib on no screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 30
#: Images side by side; sides of the square that each lies in, and room for the words above it, in inches.
_COLUMNS, _CELL, _TITLE = 8, 1.3, 0.3


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """True classes by row, predicted classes by column, coloured by the row's share.

    Args:
        confusion: int64 ``[classes, classes]`` counts.
        classes: Their names.
    """
    figure = _figure(max(4.0, min(12.0, 1.8 + 0.55 * len(classes))))
    axes = figure.subplots()
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= _MOST_LABELS:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def predictions(images: Tensor, labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> Figure:
    """A grid of images with what was predicted; what was wrong is red and also says the truth.

    Args:
        images: uint8 ``[N, C, H, W]``; 3 channels are shown in colour, of another number the first one in grey.
        labels: int64 ``[N]``.
        predicted: int64 ``[N]``.
        classes: Class names.
    """
    columns = min(_COLUMNS, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure = _figure(_CELL * columns, (_CELL + _TITLE) * rows, layout=None)
    # One pair of axes for all, in inches of the figure: a pair for each image takes ten times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    height, width = images.shape[2:]
    right, down = (0.85 * _CELL * side / max(height, width) / 2 for side in (width, height))
    for number, (image, label, guess) in enumerate(zip(images, labels.tolist(), predicted.tolist(), strict=True)):
        row, column = divmod(number, columns)
        x, y = (column + 0.5) * _CELL, (row + 1) * (_CELL + _TITLE) - 0.5 * _CELL
        pixels = image.permute(1, 2, 0) if len(image) == 3 else image[0]
        place = (x - right, x + right, y + down, y - down)
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, extent=place, aspect="auto")
        said = classes[guess] if label == guess else f"{classes[guess]}\n(is {classes[label]})"
        colour = "green" if label == guess else "red"
        axes.text(x, y - down - 0.05, said, fontsize=8, color=colour, ha="center", va="bottom")
    axes.set_xlim(0, columns * _CELL)
    axes.set_ylim(rows * (_CELL + _TITLE), 0)
    return figure


def histogram(counts: Mapping[str, Mapping[int, int]], values: str, what: str) -> Figure:
    """Bars of how often whole numbers occurred, one on top of the other.

    Args:
        counts: For each part of the bars how often which number occurred.
        values: What the numbers are.
        what: What is counted.
    """
    figure = _figure(6.0, 3.5)
    axes = figure.subplots()
    numbers = sorted({number for part in counts.values() for number in part})
    below = np.zeros(len(numbers))
    for name, part in counts.items():
        heights = np.array([part.get(number, 0) for number in numbers], dtype=float)
        axes.bar(numbers, heights, bottom=below, label=name)
        below += heights
    axes.set_xlabel(values)
    axes.set_ylabel(what)
    axes.legend()
    return figure


def _figure(width: float, height: float | None = None, layout: Literal["constrained"] | None = "constrained") -> Figure:
    # Made without pyplot: no global state, no backend that looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or width), layout=layout, dpi=110)
    FigureCanvasAgg(figure)
    return figure
