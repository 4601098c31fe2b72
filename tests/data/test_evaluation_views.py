"""The logits of the views of an image are averaged with the weights of the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.data.evaluation_views import averaged_outputs

IMAGES = torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def corners(images: Tensor) -> Tensor:
    """A model that gives different logits for every view and is not linear."""
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
def test_views_have_their_documented_weights(views: str, expected: Tensor) -> None:
    torch.testing.assert_close(averaged_outputs(corners, IMAGES, views), expected)


def test_a_forward_pass_may_overwrite_the_logits_of_the_one_before() -> None:
    memory = torch.empty_like(corners(IMAGES))

    def reusing_memory(images: Tensor) -> Tensor:
        return memory.copy_(corners(images))

    torch.testing.assert_close(averaged_outputs(reusing_memory, IMAGES, "flip"), mirrored(IMAGES))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("views", ["plain", "flip", "flip_translate"])
@pytest.mark.parametrize("change", [lambda x: x.sub_(0.5).div_(2.0), lambda x: x[:, :, 1:].zero_(), Tensor.relu_])
def test_a_model_that_changes_its_images_in_place_sees_each_view_unchanged(
    change: Callable[[Tensor], Tensor], views: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    def changing(images: Tensor) -> Tensor:
        change(images)
        return corners(images)

    with mode():
        expected = averaged_outputs(lambda images: changing(images.clone()), IMAGES.clone(), views)
        assert torch.equal(averaged_outputs(changing, IMAGES.clone(), views), expected)
