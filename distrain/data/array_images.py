"""What is known of images as arrays, whoever gives them: their usual channels, and whether they hold numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Numbers of channels that images usually have, by which their dimension is recognised.
USUAL_CHANNELS = (1, 3, 4)
_CHUNK_BYTES = 1 << 24


def first_not_finite(images: Tensor) -> int | None:
    """Index of the first image that holds NaN or infinity; ``None`` if there is none.

    Args:
        images: Floating point [N, …], possibly a memory map.
    """
    start = 0
    for chunk in _chunks(images):
        finite = chunk.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            return start + int((~finite).nonzero()[0])
        start += len(chunk)
    return None


def float_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of floating-point images [N, C, H, W]."""
    first, second = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in _chunks(images):
        values = chunk.double()
        first, second = first + values.sum((0, 2, 3)), second + values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = first / count
    return mean.tolist(), (second / count - mean.square()).clamp(min=0).sqrt().tolist()


def _chunks(images: Tensor) -> Iterator[Tensor]:
    """The images in order, some megabytes at a time."""
    if len(images):
        yield from images.split(max(1, _CHUNK_BYTES // max(1, images[0].numel() * images.element_size())))
