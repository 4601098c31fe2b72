"""Several views of each image in evaluation: their logits are averaged, so every sample still counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor


def averaged_logits(forward: Callable[[Tensor], Tensor], images: Tensor, views: str) -> Tensor:
    """The weighted mean of what a model says of an image's views (Jordan 2024, arXiv 2404.00498, §3.5).

    Args:
        forward: Images [n, C, H, W] to logits [n, classes].
        images: Normalised [n, C, H, W].
        views: ``plain``: the image. ``flip``: it and its mirror image. ``flip_translate``: these, with half of the
            weight, and both of the image moved by a pixel up and left, and down and right, its edge mirrored.

    Returns:
        Logits [n, classes].
    """
    if views == "plain":
        return forward(images)
    # Each is weighted at once: the next forward pass may reuse the memory (CUDA graphs do).
    return sum((forward(view) * weight for view, weight in _views(images, views)), start=images.new_zeros(()))


def _views(images: Tensor, views: str) -> Iterator[tuple[Tensor, float]]:
    if views == "flip":
        yield from ((images, 1 / 2), (images.flip(3), 1 / 2))
        return
    yield from ((images, 1 / 4), (images.flip(3), 1 / 4))
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    for start in (0, 2):
        moved = padded[:, :, start : start + height, start : start + width]
        yield from ((moved, 1 / 8), (moved.flip(3), 1 / 8))
