"""Test-time augmentation: evaluation averages the model's outputs over several views of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor


def averaged_outputs(forward: Callable[[Tensor], Tensor], images: Tensor, views: str) -> Tensor:
    """The weighted mean of a model's outputs over views of each image (Jordan 2024, arXiv 2404.00498, §3.5).

    Args:
        forward: The model, from images [n, C, H, W] to logits or numbers [n, …]. Outputs for each pixel, [n, …, H, W],
            can't be averaged with ``flip_translate``.
        images: Normalised images [n, C, H, W].
        views: ``plain``: the image only. ``flip``: the image and its mirror image. ``flip_translate``: these two with
            half of the total weight; the other half is shared by both shifted by one pixel up and left, and both
            shifted by one pixel down and right, where the edges are filled by reflection.

    Returns:
        Outputs [n, …].
    """
    if views == "plain":
        return forward(images)
    # Each view is weighted before the next forward pass, which may reuse the logits' memory (CUDA graphs do).
    outputs = (_upright(forward(view), mirrored) * weight for view, mirrored, weight in _views(images, views))
    return sum(outputs, start=images.new_zeros(()))


def _upright(outputs: Tensor, mirrored: bool) -> Tensor:
    """Outputs for each pixel of a mirrored image, where the pixels lie in the image; other outputs as they are."""
    return outputs.flip(-1) if mirrored and outputs.dim() > 2 else outputs


def _views(images: Tensor, views: str) -> Iterator[tuple[Tensor, bool, float]]:
    """Views, whether they are mirrored, and their weights.

    Each has memory of its own, since a model may change the images that it is given.
    """
    if views == "flip":
        yield from ((images.clone(), False, 1 / 2), (images.flip(3), True, 1 / 2))
        return
    yield from ((images.clone(), False, 1 / 4), (images.flip(3), True, 1 / 4))
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    for start in (0, 2):
        moved = padded[:, :, start : start + height, start : start + width]
        yield from ((moved.clone(), False, 1 / 8), (moved.flip(3), True, 1 / 8))
