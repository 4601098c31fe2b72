"""Views of an image are weighted as the paper says, and averaged over logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.data.evaluation_views import averaged_logits

IMAGES = torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def corners(images: Tensor) -> Tensor:
    """Tells every view apart, and is not linear."""
    return images[:, :, ::5, ::6].flatten(1).exp()


def mirrored(images: Tensor) -> Tensor:
    return (corners(images) + corners(images.flip(3))) / 2


def moved(images: Tensor, rows: int, columns: int) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return padded.roll((rows, columns), (2, 3))[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ("plain", corners(IMAGES)),
        ("flip", mirrored(IMAGES)),
        (
            "flip_translate",
            mirrored(IMAGES) / 2 + mirrored(moved(IMAGES, 1, 1)) / 4 + mirrored(moved(IMAGES, -1, -1)) / 4,
        ),
    ],
)
def test_views_are_weighted_as_they_say(views: str, expected: Tensor) -> None:
    torch.testing.assert_close(averaged_logits(corners, IMAGES, views), expected)


def test_a_view_may_be_overwritten_by_the_next() -> None:
    memory = torch.empty_like(corners(IMAGES))

    def reuses(images: Tensor) -> Tensor:
        return memory.copy_(corners(images))

    torch.testing.assert_close(averaged_logits(reuses, IMAGES, "flip"), mirrored(IMAGES))
