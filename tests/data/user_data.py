"""Data sets of a user's: samples of many forms, and some that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

NO_CALLABLE = 3


def red(row: int) -> Any:
    """A picture of 8x6 pixels, red as much as its number."""
    pixels = np.zeros((8, 6, 3), np.uint8)
    pixels[:, :, 0] = row
    return pixels


FORMS: dict[str, Callable[[int], Any]] = {
    "picture": lambda row: (Image.fromarray(red(row)), row % 2),
    "grey picture": lambda row: (Image.fromarray(red(row)).getchannel(0), row % 2),
    "cmyk": lambda row: (Image.fromarray(red(row)).convert("CMYK"), np.array([row % 2])),
    "array": lambda row: (red(row), np.int64(row % 2)),
    "channels first": lambda row: (red(row).transpose(2, 0, 1), np.uint16(row % 2)),
    "rows and columns": lambda row: (red(row)[:, :, 0], torch.tensor(row % 2)),
    "dictionary": lambda row: {"image": red(row), "id": "x", "label": row % 2},
    "other keys": lambda row: {"scan": red(row), "grade": row % 2},
    "float": lambda row: (torch.from_numpy(red(row).transpose(2, 0, 1) / 255), row % 2),
    "float64 array": lambda row: (red(row) / 255, row % 2),
    "names": lambda row: (red(row), ["cat", "dog"][row % 2]),
    "labels": lambda row: (red(row), [1, 0, row % 2]),
    "number": lambda row: (red(row), row / 2),
    "numbers": lambda row: (red(row), torch.tensor([0.5, row])),
    "mask": lambda row: (red(row), red(row)[:, :, 0] % 3),
    "mask picture": lambda row: (red(row), Image.fromarray(red(row)[:, :, 0] % 3)),
    "drawn": lambda row: (torch.randint(256, (1, 4, 4), dtype=torch.uint8), row % 3),
    "three": lambda row: (red(row), 1, "x"),
    "whole numbers": lambda row: (red(row).astype(np.int32), 1),
    "channels last": lambda row: (torch.from_numpy(red(row)), 1),
    "unclear": lambda row: (np.zeros((8, 6, 7), np.uint8), 1),
    "no target": lambda row: (red(row), None),
    "raises": lambda row: 1 // 0,
    "no image": lambda row: ("x.png", 1),
    "size": lambda row: (red(row)[: 8 - row // 39], row % 2),
    "range": lambda row: (red(row), row // 13),
    "nan": lambda row: (red(row), 1.0 if row < 39 else float("nan")),
}


class Forms(Dataset[Any]):
    def __init__(self, form: str, count: int = 40, classes: Sequence[str] | None = None, shift: int = 0) -> None:
        self.form, self.count, self.shift = form, count, shift
        if classes is not None:
            self.classes: Sequence[str] = classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return FORMS[self.form](row + self.shift)


class Counted(Forms):
    """Like those of torchvision, it knows its targets without reading samples."""

    def __init__(self, wrong: bool = False, count: int = 40) -> None:
        super().__init__("drawn", count)
        self.targets = [(row + wrong) % 3 for row in range(count)]


class Named(Forms):
    """Its samples have names of classes, and its targets are their numbers."""

    classes = ("cat", "dog")

    def __init__(self, count: int = 40) -> None:
        super().__init__("names", count)
        self.targets = [row % 2 for row in range(count)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield red(0), 0


class Late(Forms):
    """A sample that is needed late in the first epoch can't be read."""

    def __getitem__(self, row: int) -> Any:
        if row == 30:
            raise OSError("scan 30 is torn")
        return super().__getitem__(row)


def failing() -> None:
    raise FileNotFoundError("scans.csv")


class Unequal(Forms):
    """One sample of ten is of class 0, two are of class 1."""

    classes = ("few", "some", "many")

    def __init__(self, count: int = 40) -> None:
        super().__init__("drawn", count)

    def __getitem__(self, row: int) -> Any:
        label = (0, 1, 1, 2, 2, 2, 2, 2, 2, 2)[row % 10]
        return torch.randint(60 * label, 60 * label + 100, (1, 8, 8), dtype=torch.uint8), label
