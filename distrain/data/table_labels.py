"""What the label cells of a table mean: classes, several labels, numbers or the paths of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrain.data.decode import SUFFIXES
from distrain.data.table_files import Table
from distrain.data.target_kinds import MOST_CLASSES
from distrain.errors import ConfigError

_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class Labels:
    """The targets of a table's rows.

    Attributes:
        kind: See :attr:`distrain.data.base.DataSpec.target`.
        classes: Names of the classes, labels or numbers.
        targets: Targets of the rows; ``None`` of masks, which are files.
        guessed: Whether the kind is what the cells look like.
    """

    kind: str
    classes: tuple[str, ...]
    targets: Tensor | None
    guessed: bool


def read_labels(
    table: Table,
    columns: Sequence[str],
    training: Sequence[int],
    *,
    kind: str | None,
    separator: str | None,
    classes: Sequence[str] | None,
) -> Labels:
    """Makes targets of the label columns.

    Args:
        table: The table.
        columns: Names of the label columns.
        training: Indices of the rows to train on; every class must be among them.
        kind: ``data.target``; ``None``: what the cells look like.
        separator: What separates several labels in a cell.
        classes: ``data.classes``.

    Raises:
        ConfigError: A cell doesn't fit the kind, or the names don't.
    """
    chosen, guessed = kind or _kind_of(table, columns, separator), kind is None and separator is None
    if chosen in ("class", "mask") or (chosen == "labels" and separator is not None):
        if len(columns) > 1:
            problem = f"name {len(columns)} columns, and data.target={chosen} needs one"
            raise ConfigError("data.label_column", list(columns), problem)
        column = columns[0]
        if chosen == "mask":
            return Labels(chosen, _mask_classes(classes), None, guessed)
        if chosen == "class":
            names, targets = _classes(table, column, training, classes)
        else:
            assert separator is not None
            names, targets = _several(table, column, training, separator, classes)
        return Labels(chosen, names, targets, guessed)
    if classes is not None and len(classes) != len(columns):
        problem = f"are {len(classes)} names, and data.label_column names {len(columns)} columns"
        raise ConfigError("data.classes", list(classes), problem)
    values = _flags(table, columns) if chosen == "labels" else _numbers(table, columns)
    return Labels(chosen, tuple(classes or columns), torch.from_numpy(values), guessed)


def _kind_of(table: Table, columns: Sequence[str], separator: str | None) -> str:
    """What the cells look like."""
    if separator is not None:
        return "labels"
    cells = table.columns[columns[0]]
    if len(columns) > 1:
        flags = all(cell.lower() in _FLAGS for column in columns for cell in table.columns[column])
        return "labels" if flags else "numbers"
    if all(cell.lower().endswith(SUFFIXES) for cell in cells):
        return "mask"
    # Whole numbers are classes, which a number with a fraction can't be.
    fractions = False
    for cell in cells:
        number = _number(cell)
        if number is None:
            return "class"
        fractions = fractions or not number.is_integer()
    return "numbers" if fractions else "class"


def _number(cell: str) -> float | None:
    """A cell as a finite number; ``None`` if it is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _refuse_empty(table: Table, column: str, problem: str) -> None:
    cells = table.columns[column]
    for empty in ("", "nan", "NaN", "NA", "N/A", "null", "None"):
        if empty in cells:
            shown = f"is {empty}" if empty else "is empty"
            raise table.wrong(cells.index(empty), column, f"{shown}; {problem}")


def _classes(
    table: Table, column: str, training: Sequence[int], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes, and int64 [N]."""
    _refuse_empty(table, column, "the class of each image is needed")
    cells = table.columns[column]
    names = tuple(classes) if classes is not None else _in_order({cells[index] for index in training})
    if len(names) < 2:
        problem = f"column {column} has one class alone, {', '.join(names)}; two or more are needed"
        raise ConfigError("data.root", table.path, problem)
    if len(names) > MOST_CLASSES:
        raise ConfigError("data.label_column", column, f"has {len(names):,} classes; data.target=numbers reads numbers")
    numbers = {name: number for number, name in enumerate(names)}
    found = [numbers.get(cell, -1) for cell in cells]
    if -1 in found:
        raise _unknown(table, found.index(-1), column, cells[found.index(-1)], classes)
    return names, torch.tensor(found, dtype=torch.int64)


def _several(
    table: Table, column: str, training: Sequence[int], separator: str, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the labels, and uint8 [N, C]; an empty cell means none of them."""
    cells = table.columns[column]
    # Cells repeat, so each different one is taken apart once.
    parts = {cell: [part for part in map(str.strip, cell.split(separator)) if part] for cell in set(cells)}
    present = {part for index in training for part in parts[cells[index]]}
    names = tuple(classes) if classes is not None else _in_order(present)
    if not names:
        raise ConfigError("data.root", table.path, f"column {column} has no label in any row")
    numbers = {name: number for number, name in enumerate(names)}
    for cell, labels in parts.items():
        unknown = [label for label in labels if label not in numbers]
        if unknown:
            raise _unknown(table, cells.index(cell), column, unknown[0], classes)
    flags = np.zeros((len(cells), len(names)), dtype=np.uint8)
    for row, cell in enumerate(cells):
        flags[row, [numbers[label] for label in parts[cell]]] = 1
    return names, torch.from_numpy(flags)


def _unknown(table: Table, index: int, column: str, label: str, classes: Sequence[str] | None) -> ConfigError:
    why = "no training row has it" if classes is None else "it is none of data.classes"
    return table.wrong(index, column, f"{label} can't be learned: {why}")


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Names in alphabetical order; whole numbers by their value."""
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _flags(table: Table, columns: Sequence[str]) -> npt.NDArray[np.uint8]:
    """uint8 [N, C] of columns that hold 0 or 1."""
    values = np.zeros((len(table.rows), len(columns)), dtype=np.uint8)
    for place, column in enumerate(columns):
        found = [_FLAGS.get(cell.lower(), -1) for cell in table.columns[column]]
        if -1 in found:
            index = found.index(-1)
            shown = table.columns[column][index] or "empty"
            raise table.wrong(index, column, f"is {shown}; a label is 0 or 1")
        values[:, place] = found
    return values


def _numbers(table: Table, columns: Sequence[str]) -> npt.NDArray[np.float32]:
    """float32 [N, C] of columns that hold numbers."""
    values = np.zeros((len(table.rows), len(columns)), dtype=np.float32)
    largest = float(np.finfo(np.float32).max)
    for place, column in enumerate(columns):
        for index, number in enumerate(map(_number, table.columns[column])):
            if number is None or abs(number) > largest:
                shown = table.columns[column][index] or "empty"
                hint = "; decimals are written with a point" if "," in shown else ""
                raise table.wrong(index, column, f"is {shown}; a finite number is needed{hint}")
            values[index, place] = number
    return values


def _mask_classes(classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None or len(classes) < 2:
        problem = "masks need the names of the classes in the order of their numbers: data.classes=[background,crack]"
        raise ConfigError("data.classes", None if classes is None else list(classes), problem)
    return tuple(classes)


def describe(labels: Labels, columns: Sequence[str]) -> str:
    """What the label columns were taken for, in one line."""
    count = len(labels.classes)
    words = {
        "class": f"one of {count} classes an image",
        "labels": f"any of {count} labels an image",
        "numbers": f"{count} numbers an image",
        "mask": f"one of {count} classes a pixel",
    }
    said = ", by what the cells look like (data.target=… says otherwise)" if labels.guessed else ""
    return f"{', '.join(columns)}: {words[labels.kind]}{said}"
