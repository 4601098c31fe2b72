"""Applies to each image of a batch the operation that was drawn for it; images with similar operations go together."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from distrain.data.augmentation import affine, colour


class Operation(IntEnum):
    """What can be done to an image, and what its magnitude means."""

    IDENTITY = 0
    SHEAR_X = 1  # the shear, a share of the height
    SHEAR_Y = 2  # the shear, a share of the width
    TRANSLATE_X = 3  # pixels to the right
    TRANSLATE_Y = 4  # pixels down
    ROTATE = 5  # degrees, counterclockwise
    BRIGHTNESS = 6  # change of the factor, which is 1 at the magnitude 0; also for the next three
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10  # bits that are kept
    SOLARIZE = 11  # the smallest value that is inverted
    AUTOCONTRAST = 12  # no magnitude; also the next two
    EQUALIZE = 13
    INVERT = 14
    HUE = 15  # a share of a whole turn


MOVES = tuple(
    map(
        int,
        (
            Operation.SHEAR_X,
            Operation.SHEAR_Y,
            Operation.TRANSLATE_X,
            Operation.TRANSLATE_Y,
            Operation.ROTATE,
        ),
    )
)


def apply(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Applies one operation to each image.

    Args:
        images: uint8 [n, 3, H, W] or [n, 1, H, W]; not changed.
        operations: An :class:`Operation` for each, int64 [n] on the CPU.
        magnitudes: float64 [n] on the CPU.

    Returns:
        uint8 of the same shape.
    """
    changed = _moved(images, operations, magnitudes, outside=0)
    for rows, table in _tables(images, operations, magnitudes):
        changed.append((rows, colour.look_up(images.index_select(0, rows), table)))
    blends: list[tuple[Operation, Callable[[Tensor, Tensor], Tensor]]] = [(Operation.SHARPNESS, colour.sharpen)]
    if images.shape[1] == 3:
        # Grey images have no colour to change.
        blends += [(Operation.COLOR, colour.saturate), (Operation.HUE, colour.shift_hue)]
    for operation, change in blends:
        rows = _rows(operations == operation)
        if len(rows):
            amounts = magnitudes[rows] if operation == Operation.HUE else 1 + magnitudes[rows]
            places = rows.to(images.device)
            changed.append((places, change(images.index_select(0, places), amounts.float().to(images.device))))
    return _with(images, changed)


def move_masks(masks: Tensor, operations: Tensor, magnitudes: Tensor, outside: int) -> Tensor:
    """Moves masks, uint8 [n, H, W], as :func:`apply` moves their images; ``outside`` fills what comes into view."""
    masks = masks.unsqueeze(1)
    return _with(masks, _moved(masks, operations, magnitudes, outside)).squeeze(1)


def _moved(images: Tensor, operations: Tensor, magnitudes: Tensor, outside: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of the images that have a geometric operation, on the images' device, and these images moved."""
    rows = _rows(torch.isin(operations, torch.tensor(MOVES)))
    if not len(rows):
        return []
    matrices = _matrices(operations[rows], magnitudes[rows], *images.shape[2:])
    places = rows.to(images.device)
    return [(places, affine.move(images.index_select(0, places), matrices, outside))]


def _with(images: Tensor, changed: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A copy of the images with others in the place of some rows; no row is named twice."""
    places = torch.arange(len(images), device=images.device)
    first = len(images)
    for rows, part in changed:
        places[rows] = torch.arange(first, first + len(part), device=images.device)
        first += len(part)
    # Two copies in order are several times faster than index_copy_ for bytes.
    return torch.cat([images, *(part for _, part in changed)]).index_select(0, places)


def _matrices(operations: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """Affine matrices of geometric operations, float64 [6, n]."""

    def only(operation: Operation) -> Tensor:
        return torch.where(operations == operation, magnitudes, 0.0)

    sheared = affine.shear(only(Operation.SHEAR_X), only(Operation.SHEAR_Y))
    translated = affine.translation(only(Operation.TRANSLATE_X), only(Operation.TRANSLATE_Y))
    turned = affine.rotation(only(Operation.ROTATE), height, width)
    is_shear = (operations == Operation.SHEAR_X) | (operations == Operation.SHEAR_Y)
    return torch.where(operations == Operation.ROTATE, turned, torch.where(is_shear, sheared, translated))


def _tables(images: Tensor, operations: Tensor, magnitudes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of the images that are changed by a table, on the images' device, and their tables."""
    made = []

    def add(operation: Operation, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        rows = _rows(operations == operation)
        if len(rows):
            amounts = magnitudes[rows].float().to(images.device)
            rows = rows.to(images.device)
            made.append((rows, make(rows, amounts).expand(-1, images.shape[1], -1)))

    def chosen(rows: Tensor) -> Tensor:
        return images.index_select(0, rows)

    add(Operation.BRIGHTNESS, lambda _, change: colour.blend_table(torch.zeros_like(change), 1 + change))
    add(Operation.CONTRAST, lambda rows, change: colour.blend_table(colour.mean_grey(chosen(rows)), 1 + change))
    add(Operation.POSTERIZE, lambda _, bits: colour.posterize_table(bits))
    add(Operation.SOLARIZE, lambda _, threshold: colour.solarize_table(threshold))
    add(Operation.AUTOCONTRAST, lambda rows, _: colour.autocontrast_table(chosen(rows)))
    add(Operation.EQUALIZE, lambda rows, _: colour.equalize_table(chosen(rows)))
    add(Operation.INVERT, lambda _, unused: colour.solarize_table(torch.zeros_like(unused)))
    if not made:
        return []
    rows, tables = zip(*made, strict=True)
    return [(torch.cat(rows), torch.cat(tables))]


def _rows(chosen: Tensor) -> Tensor:
    return chosen.nonzero().squeeze(1)
