"""Figures for TensorBoard, drawn by matplotlib without a display."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from distrain.files.escaping import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A confusion matrix of more classes has no class names and no numbers.
_MAX_LABELLED_CLASSES = 50
#: Of more classes than this, names and numbers are smaller.
_MAX_CLASSES_IN_FULL_SIZE = 20
#: Longer names are shortened: in the confusion matrix, and above an image, which is narrow.
_LONGEST_LABEL, _LONGEST_CAPTION = 24, 15
#: Fonts that are tried, in order, for letters that matplotlib's own font lacks, such as Chinese ones.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "SimHei", "Arial Unicode MS",
)  # fmt: skip
#: Rows of a table.
_MAX_ROWS = 50
#: Images in a row of the grid.
_COLUMNS = 8
#: Side of each image's square cell, and height of the caption above it, in inches.
_CELL, _TITLE = 1.3, 0.3


def _labels(classes: Sequence[str], longest: int) -> list[str]:
    """Class names as matplotlib shows them, which would read ``$…$`` as a formula and fail at a wrong one.

    A name with letters that no font here has is replaced by the class's number.
    """
    letters = _drawable_letters() if not all(name.isascii() for name in classes) else None
    labels = []
    for number, name in enumerate(classes):
        label = escaped(name)
        if letters is not None and not letters.issuperset(map(ord, label)):
            label = f"class {number}"
        if len(label) > longest:
            # In the middle, since long names often differ at their ends.
            end = (longest - 1) // 2
            label = f"{label[: longest - 1 - end]}…{label[-end:]}"
        labels.append(label.replace("$", r"\$"))
    return labels


@functools.cache
def _available_fonts() -> list[str]:
    from matplotlib import font_manager

    available = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in available]


@functools.cache
def _drawable_letters() -> frozenset[int]:
    """Code points for which a font is available."""
    from matplotlib import font_manager, ft2font

    paths = [font_manager.findfont(name) for name in _available_fonts()]
    return frozenset(letter for path in paths for letter in ft2font.FT2Font(path).get_charmap())


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Draws a confusion matrix: true classes by row, predicted classes by column.

    Each cell shows the count; its colour is the count's share of the row.

    Args:
        confusion: int64 ``[classes, classes]`` counts.
        classes: Class names.
    """
    figure = _figure(max(4.0, min(12.0, 1.8 + 0.55 * len(classes))))
    axes = figure.subplots()
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= _MAX_LABELLED_CLASSES:
        fonts, size = _available_fonts(), 9 if len(classes) <= _MAX_CLASSES_IN_FULL_SIZE else 6
        labels, places = _labels(classes, _LONGEST_LABEL), range(len(classes))
        axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor", family=fonts, fontsize=size)
        axes.set_yticks(places, labels, family=fonts, fontsize=size)
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=size - 1
                )
    return figure


def predictions(images: Tensor, labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> Figure:
    """Draws a grid of images with their predicted classes; wrong ones are red and followed by the true class.

    Args:
        images: uint8 ``[N, C, H, W]``, or floating point, which is drawn from its smallest value (black) to its largest
            (white). Images of 3 channels are shown in colour, of others the first channel in grey.
        labels: True classes, int64 ``[N]``.
        predicted: Predicted classes, int64 ``[N]``.
        classes: Class names.
    """
    labels_of_classes = _labels(classes, _LONGEST_CAPTION)
    if images.is_floating_point():
        low, high = images.min(), images.max()
        images = ((images - low) * (255 / (high - low).clamp_min(1e-30))).byte()
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
        caption = labels_of_classes[guess]
        caption += "" if label == guess else f"\n(is {labels_of_classes[label]})"
        colour = "green" if label == guess else "red"
        axes.text(
            x,
            y - half_height - 0.05,
            caption,
            fontsize=8,
            color=colour,
            ha="center",
            va="bottom",
            family=_available_fonts(),
        )
    axes.set_xlim(0, columns * _CELL)
    axes.set_ylim(rows * (_CELL + _TITLE), 0)
    return figure


def table(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws rows of names and numbers; of very many, the first ones, and says how many there are.

    Args:
        rows: At least one; the keys of the first one head the columns. The first column holds names. ``None`` is shown
            as a dash.
    """
    shown = rows[:_MAX_ROWS]
    columns = list(rows[0])
    names = _labels([str(row[columns[0]]) for row in shown], _LONGEST_LABEL)
    cells = [[name, *map(cell_text, list(row.values())[1:])] for name, row in zip(names, shown, strict=True)]
    figure = _figure(1.4 * len(columns), 0.25 * (len(shown) + 3))
    axes = figure.subplots()
    axes.axis("off")
    if len(rows) > len(shown):
        axes.set_title(f"the first {len(shown)} of {len(rows)}", fontsize=8)
    drawn = axes.table(cells, colLabels=columns, loc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for place in range(1, len(cells) + 1):
        drawn[place, 0].get_text().set_fontfamily(_available_fonts())
    return figure


def cell_text(value: object) -> str:
    """A value in a table of metrics; a dash where a metric is not defined."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


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


def filters(weights: Tensor) -> Figure:
    """Draws the filters of a convolution in a grid, each stretched to its whole range of values.

    Args:
        weights: ``[filters, channels, height, width]``; filters of three channels are drawn in colour, others as the
            mean over their channels.
    """
    count, channels, height, width = weights.shape
    pictures = weights if channels == 3 else weights.mean(1, keepdim=True)
    low, high = (pictures.flatten(1).aminmax(dim=1)[side][:, None, None, None] for side in (0, 1))
    pictures = ((pictures - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1)
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    # One picture with a margin of a pixel around each filter, which an Axes per filter would take long to draw.
    grid = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, pictures.shape[-1]))
    for number, picture in enumerate(pictures.numpy()):
        row, column = divmod(number, columns)
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        grid[top : top + height, left : left + width] = picture
    figure = _figure(4.0, 4.0 * grid.shape[0] / grid.shape[1])
    axes = figure.subplots()
    axes.axis("off")
    axes.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", interpolation="nearest")
    return figure
