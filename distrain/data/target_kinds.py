"""Targets as arrays: which kind they are, and the form in which a task takes them; a wrong one is found by its row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrain.data.base import IGNORED

Array: TypeAlias = npt.NDArray[Any]
#: More classes are a mistake: labels that are no class numbers.
MOST_CLASSES = 1 << 20
#: Rows of targets that are checked at once.
_CHUNK_ROWS = 4096


class TargetError(ValueError):
    """Targets are of the wrong shape or type, or one of them has a wrong value.

    Args:
        row: Index of the first wrong sample; ``None`` if all are wrong.
        problem: What is wrong, without naming the targets.

    Attributes:
        row: As above.
        problem: As above.
    """

    def __init__(self, row: int | None, problem: str) -> None:
        super().__init__(problem)
        self.row, self.problem = row, problem


def kind_of(targets: Array) -> str:
    """The kind that shape and type of targets suggest; see :attr:`distrain.data.base.DataSpec.target`.

    ``[N]`` or ``[N, 1]`` of whole numbers is ``class``; ``[N, C]`` of them is ``labels``; ``[N]`` or ``[N, C]`` of
    floating-point numbers is ``numbers``; ``[N, H, W]`` of whole numbers is ``mask``.

    Raises:
        TargetError: It is none of them.
    """
    shape, whole = _squeezed(targets).shape, targets.dtype.kind in "iub"
    if whole and len(shape) in (1, 2, 3):
        return ("class", "labels", "mask")[len(shape) - 1]
    if targets.dtype.kind == "f" and len(shape) in (1, 2):
        return "numbers"
    if targets.dtype.kind == "f" and len(shape) == 3:
        raise TargetError(None, f"is {described(targets)}; masks hold whole numbers, the class of each pixel")
    raise TargetError(
        None,
        f"is {described(targets)}; targets are class numbers [N], labels [N, C] of 0 and 1, floating-point numbers "
        "[N] or [N, C], or masks [N, H, W] of whole numbers",
    )


def is_one_hot(targets: Array) -> bool:
    """Whether each row ``[N, C]`` is 0 but for one 1."""
    return targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all())


def to_targets(kind: str, targets: Array) -> Tensor:
    """Targets in the form in which a task takes them; see :attr:`distrain.data.base.DataSpec.target`.

    Raises:
        TargetError: They are of another shape or type, or a value is wrong.
    """
    return {"class": _class_numbers, "labels": _labels, "numbers": _numbers, "mask": _masks}[kind](targets)


def described(array: Array) -> str:
    """Type and shape of an array, for messages: ``float32 [100, 3]``."""
    return f"{array.dtype} {list(array.shape)}"


def _class_numbers(targets: Array) -> Tensor:
    """int64 [N] of [N], [N, 1], or rows [N, C] of which one number is 1."""
    if is_one_hot(targets) and targets.shape[1] > 1:
        return torch.from_numpy(targets.argmax(1).astype(np.int64))
    numbers = _squeezed(targets)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iubf":
        raise TargetError(None, f"is {described(targets)}; a class number for each sample is needed, [N]")
    _check(numbers, lambda value: value == np.floor(value), "is {}; class numbers are whole numbers")
    _check(numbers, lambda value: value >= 0, "is {}; classes are numbered from 0")
    _check(numbers, lambda value: value < MOST_CLASSES, f"is {{}}; class numbers are below {MOST_CLASSES}")
    return torch.from_numpy(numbers.astype(np.int64))


def _labels(targets: Array) -> Tensor:
    """uint8 [N, C] of 0 and 1."""
    if targets.ndim not in (1, 2) or targets.dtype.kind not in "iubf":
        raise TargetError(None, f"is {described(targets)}; 0 or 1 for each of C labels is needed, [N, C]")
    table = targets.reshape(len(targets), -1)
    _check(table, lambda value: (value == 0) | (value == 1), "holds {}; a label is 0 or 1")
    return torch.from_numpy(table.astype(np.uint8))


def _numbers(targets: Array) -> Tensor:
    """float32 [N, C]."""
    if targets.ndim not in (1, 2) or targets.dtype.kind not in "iubf":
        raise TargetError(None, f"is {described(targets)}; numbers [N] or [N, C] are needed")
    table = targets.reshape(len(targets), -1)
    with np.errstate(over="ignore"):
        numbers = table.astype(np.float32)
    _check(table, lambda _: np.isfinite(numbers), "holds {}; a finite number is needed")
    return torch.from_numpy(numbers)


def _masks(targets: Array) -> Tensor:
    """uint8 [N, H, W]."""
    masks = _squeezed(targets)
    if masks.ndim != 3 or masks.dtype.kind not in "iub":
        raise TargetError(None, f"is {described(targets)}; masks [N, H, W] of whole numbers are needed")
    for start in range(0, len(masks), _CHUNK_ROWS):
        chunk = masks[start : start + _CHUNK_ROWS]
        problem = f"holds {{}}; a mask holds the class of each pixel, 0 to 254, or {IGNORED} where it is unknown"
        _check(chunk, lambda value: (value >= 0) & (value <= IGNORED), problem, start)
    return torch.from_numpy(masks.astype(np.uint8))


def _squeezed(targets: Array) -> Array:
    """Without a dimension of one channel: [N, 1] as [N], [N, 1, H, W] and [N, H, W, 1] as [N, H, W]."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        return targets[:, 0]
    if targets.ndim == 4 and 1 in (targets.shape[1], targets.shape[3]):
        return targets[:, 0] if targets.shape[1] == 1 else targets[..., 0]
    return targets


def _check(targets: Array, holds: Callable[[Array], Array], problem: str, first: int = 0) -> None:
    """Refuses targets of which one is wrong.

    Args:
        targets: Their values, ``[N, …]``.
        holds: Says for each value whether it is right.
        problem: What is wrong, with ``{}`` for the value.
        first: Index of the first row.

    Raises:
        TargetError: A value is wrong.
    """
    wrong = ~holds(targets)
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise TargetError(first + place[0], problem.format(targets[place]))


def whiten(masks: Tensor) -> Tensor:
    """Masks in which 255 stands for the second class, as drawing programs save black and white, with 1 for it."""
    return (masks == IGNORED).to(torch.uint8)


def is_black_and_white(parts: Iterable[Tensor]) -> bool:
    """Whether all masks hold 0 and 255 alone, and so show two classes, not one class and unknown pixels."""
    white = False
    for masks in parts:
        present = torch.bincount(masks.flatten(), minlength=IGNORED + 1)
        if present[1:IGNORED].any():
            return False
        white = white or bool(present[IGNORED])
    return white
