"""Targets of the parts of a data set, given as arrays: their kind, the names of their classes, and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrain.data.array_files import ArrayFiles
from distrain.data.base import IGNORED
from distrain.data.target_kinds import (
    TargetError,
    described,
    is_black_and_white,
    is_one_hot,
    kind_of,
    to_targets,
    whiten,
)
from distrain.errors import ConfigError

#: What a line says of each kind of targets; the number is that of the classes, labels or numbers.
_WORDS = {
    "class": "one of {} classes a sample",
    "labels": "any of {} labels a sample",
    "numbers": "{} numbers a sample",
    "mask": "one of {} classes a pixel",
}
#: Most names that a line shows.
_NAMED = 10


@dataclass(frozen=True)
class ArrayTargets:
    """Targets of each part.

    Attributes:
        kind: See :attr:`distrain.data.base.DataSpec.target`.
        by_part: Targets of ``train``, and of ``val`` and ``test`` if there are such.
        classes: Names of the classes, labels or numbers.
        names: Names of the arrays that they come from, by part.
        guessed: Whether the kind is that of their shape and type.
    """

    kind: str
    by_part: dict[str, Tensor]
    classes: tuple[str, ...]
    names: Mapping[str, str]
    guessed: bool

    def summary(self) -> str:
        """What the targets are, in one line."""
        said = ", by their shape and type (data.target=… says otherwise)" if self.guessed else ""
        line = f"{', '.join(self.names.values())}: {_WORDS[self.kind].format(len(self.classes))}{said}"
        if self.kind != "class":
            return line
        counts = torch.bincount(self.by_part["train"], minlength=len(self.classes)).tolist()
        missing = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        more = ", …" if len(missing) > _NAMED else ""
        return f"{line}; without training samples: {', '.join(missing[:_NAMED])}{more}" if missing else line


def read_targets(
    files: ArrayFiles, names: Mapping[str, str], kind: str | None, classes: Sequence[str] | None
) -> ArrayTargets:
    """Reads targets.

    Args:
        files: The arrays.
        names: Name of the targets of each part.
        kind: ``data.target``.
        classes: ``data.classes``.

    Raises:
        ConfigError: They are of no known kind, a value is wrong, or there are classes that have no name.
    """
    parts = {part: _Part(files.root, name, np.array(files.read(name))) for part, name in names.items()}
    train = parts["train"]
    if train.values.dtype.kind in "US" and kind in (None, "class"):
        classes = classes or [str(name) for name in np.unique(train.values)]
        by_part = {part: array.numbered(classes) for part, array in parts.items()}
        return ArrayTargets("class", by_part, tuple(classes), names, guessed=False)
    chosen = kind or train.kind()
    if kind is None and chosen == "labels" and all(is_one_hot(array.values) for array in parts.values()):
        chosen = "class"
    by_part = {part: array.targets(chosen) for part, array in parts.items()}
    if chosen == "mask" and is_black_and_white(by_part.values()):
        by_part = {part: whiten(masks) for part, masks in by_part.items()}
    count = _count_classes(chosen, parts, by_part)
    if classes is not None:
        _check_names(classes, chosen, parts, by_part)
    return ArrayTargets(chosen, by_part, tuple(classes or map(str, range(count))), names, guessed=kind is None)


@dataclass(frozen=True)
class _Part:
    """The targets of one part as they are in a file."""

    root: Path
    name: str
    values: npt.NDArray[Any]

    def wrong(self, problem: str, row: int | None = None) -> ConfigError:
        place = "" if row is None else f"[{row}]"
        return ConfigError("data.root", self.root, f"{self.name}{place} {problem}")

    def kind(self) -> str:
        try:
            return kind_of(self.values)
        except TargetError as error:
            raise self.wrong(error.problem) from error

    def targets(self, kind: str) -> Tensor:
        try:
            return to_targets(kind, self.values)
        except TargetError as error:
            raise self.wrong(error.problem, error.row) from error

    def numbered(self, classes: Sequence[str]) -> Tensor:
        """Classes that are given by name, as their numbers."""
        if self.values.dtype.kind not in "US" or self.values.ndim != 1:
            raise self.wrong(f"is {described(self.values)}; the name of a class for each sample is needed, [N]")
        numbers = {name: number for number, name in enumerate(classes)}
        found = [numbers.get(str(name), -1) for name in self.values]
        if -1 in found:
            row = found.index(-1)
            raise self.wrong(f"is {self.values[row]}, and no training sample is of this class", row)
        return torch.tensor(found, dtype=torch.int64)


def _count_classes(kind: str, parts: Mapping[str, _Part], by_part: Mapping[str, Tensor]) -> int:
    """Number of classes, labels or numbers.

    Raises:
        ConfigError: The parts have different numbers of labels or numbers.
    """
    if kind in ("labels", "numbers"):
        width = by_part["train"].shape[1]
        for part, targets in by_part.items():
            if targets.shape[1] != width:
                raise parts[part].wrong(f"has {targets.shape[1]} columns, and {parts['train'].name} {width}")
        return width
    return max(2, 1 + max(_largest(kind, targets) for targets in by_part.values()))


def _check_names(classes: Sequence[str], kind: str, parts: Mapping[str, _Part], by_part: Mapping[str, Tensor]) -> None:
    """Refuses names of which there are too few, or too many where there is one a column.

    Raises:
        ConfigError: As said.
    """
    if kind in ("labels", "numbers"):
        width = by_part["train"].shape[1]
        if len(classes) != width:
            problem = f"are {len(classes)} names, and {parts['train'].name} has {width} columns"
            raise ConfigError("data.classes", classes, problem)
        return
    for part, targets in by_part.items():
        largest = _largest(kind, targets)
        if largest >= len(classes):
            row = int((targets == largest).nonzero()[0, 0])
            problem = f"are {len(classes)} names, for classes from 0 on, and {parts[part].name}[{row}] is of class"
            raise ConfigError("data.classes", classes, f"{problem} {largest}")


def _largest(kind: str, targets: Tensor) -> int:
    """The largest class number."""
    values = targets.numpy()
    return int(values[values != IGNORED].max(initial=0) if kind == "mask" else values.max(initial=0))
