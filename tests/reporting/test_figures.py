"""Figures show what they should, and can be drawn without a display."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distrain.reporting import figures


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_confusion_matrix_counts_true_classes_by_row() -> None:
    confusion = torch.tensor([[90, 10, 0], [0, 5, 0], [0, 0, 0]])
    figure = figures.confusion_matrix(confusion, ("cat", "dog", "eel"))
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "eel"]
    # Colours are shares of a row; the row of a class without samples is empty.
    (image,) = axes.images
    shares = image.get_array()
    assert shares is not None
    np.testing.assert_allclose(shares, [[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "90", (1, 0): "10", (1, 1): "5"}
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x^$", r"\$x^\$"),
        ("a\x1b[2J\nb", r"a\x1b[2J\nb"),
        ("\udcff", r"\udcff"),
        ("猫", "class 0"),
        ("Äffchen", "Äffchen"),
        ("$\\frac{$", r"\$\frac{\$"),
    ],
)
def test_a_class_name_is_text_and_no_formula(name: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine without a Chinese font.
    monkeypatch.setattr(figures, "_FONTS", ("DejaVu Sans",))
    figures._available_fonts.cache_clear()
    figures._drawable_letters.cache_clear()
    matrix = figures.confusion_matrix(torch.eye(2, dtype=torch.int64), (name, "dog"))
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    grid = figures.predictions(images, torch.tensor([0, 0]), torch.tensor([0, 1]), (name, "dog"))
    assert matrix.axes[0].get_yticklabels()[0].get_text() == shown
    assert texts(grid) == [shown, f"dog\n(is {shown})"]
    for figure in (matrix, grid):
        figure.canvas.draw()


def test_long_names_are_shortened_and_no_two_texts_overlap() -> None:
    names = [f"a rather long name of a class {number}" for number in range(10)]
    matrix = figures.confusion_matrix(torch.eye(10, dtype=torch.int64), names)
    labels = torch.arange(10)
    grid = figures.predictions(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), labels, labels.roll(1), names)
    assert matrix.axes[0].get_yticklabels()[0].get_text() == "a rather lon…f a class 0"
    assert texts(grid)[0] == "a rathe…class 9\n(is a rathe…class 0)"
    grid.canvas.draw()
    boxes = [text.get_window_extent() for text in grid.axes[0].texts]
    for position, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:position])


def test_a_confusion_matrix_of_many_classes_has_no_text() -> None:
    figure = figures.confusion_matrix(torch.eye(200, dtype=torch.int64), [str(i) for i in range(200)])
    assert texts(figure) == []
    assert max(figure.get_size_inches()) <= 12


def test_wrong_predictions_are_red_and_show_the_true_class() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    figure = figures.predictions(images, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), ("cat", "dog"))
    (axes,) = figure.axes
    captions = [(text.get_text(), text.get_color()) for text in axes.texts]
    assert captions == [("cat", "green"), ("cat\n(is dog)", "red"), ("dog", "green")]
    for image, text in zip(axes.images, axes.texts, strict=True):
        left, right, bottom, top = image.get_extent()
        x, y = text.get_position()
        assert x == pytest.approx((left + right) / 2), "each caption is above its image"
        assert 0 < y < top < bottom
    figure.canvas.draw()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_are_shown(channels: int) -> None:
    images = torch.arange(2 * channels * 6).remainder(256).to(torch.uint8).view(2, channels, 2, 3)
    figure = figures.predictions(images, torch.tensor([0, 0]), torch.tensor([0, 0]), ("cat",))
    shown = figure.axes[0].images[1].get_array()
    assert shown is not None
    expected = images[1].permute(1, 2, 0) if channels == 3 else images[1, 0]
    np.testing.assert_array_equal(shown, expected.numpy())


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (8, 8, 1), (9, 8, 2), (32, 8, 4)])
def test_the_grid_has_eight_columns(count: int, columns: int, rows: int) -> None:
    labels = torch.zeros(count, dtype=torch.int64)
    figure = figures.predictions(torch.zeros(count, 1, 2, 4, dtype=torch.uint8), labels, labels, ("cat",))
    (axes,) = figure.axes
    assert not axes.axison
    extents = [image.get_extent() for image in axes.images]
    assert len(extents) == count
    assert len({extent[0] for extent in extents}) == columns
    assert len({extent[2] for extent in extents}) == rows
    # Each image is twice as wide as high, and the unit of the axes is an inch.
    assert all(right - left == pytest.approx(2 * (bottom - top)) for left, right, bottom, top in extents)
    assert (axes.get_xlim()[1], axes.get_ylim()[0]) == pytest.approx(tuple(figure.get_size_inches()))


def test_neither_pyplot_nor_a_display_is_needed() -> None:
    figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b"))
    assert "matplotlib.pyplot" not in vars(figures)
    figure = figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b"))
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_table_has_a_row_for_each_name_up_to_a_limit() -> None:
    rows = [{"label": f"label {place} $", "f1": None if place else 0.25, "count": place} for place in range(60)]
    (axes,) = figures.table(rows).axes
    cells = {place: cell.get_text().get_text() for place, cell in axes.tables[0].get_celld().items()}
    assert [cells[0, column] for column in range(3)] == ["label", "f1", "count"]
    assert [cells[1, column] for column in range(3)] == [r"label 0 \$", "0.2500", "0"]
    assert cells[50, 1] == "-"
    assert max(cells)[0] == 50
    assert axes.get_title() == "the first 50 of 60"


def test_a_histogram_stacks_its_parts() -> None:
    figure = figures.histogram({"one": {0: 2, 3: 1}, "two": {0: 5}, "none": {}}, "late", "pushes")
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_height()]
    actual = [(round(bar.get_x() + bar.get_width() / 2), bar.get_y(), bar.get_height()) for bar in bars]
    assert actual == [(0, 0, 2), (3, 0, 1), (0, 2, 5)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("late", "pushes")
    figure.canvas.draw()
