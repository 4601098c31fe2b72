"""Augmented samples follow their random draws, which depend on seed, epoch and position only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distrain.data.augmentation.shifts import Shifts
from distrain.data.base import IGNORED
from tests.data.helpers import augment, random_images

HEIGHT, WIDTH = 8, 6


def test_each_sample_is_augmented_by_its_draws() -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=2, cutout=3), HEIGHT, WIDTH, seed=1)
    images = random_images(60).images
    draws = augmentation.draws(0, torch.arange(60))
    cropped = augmentation.flip_and_crop(images, draws)
    cut = augmentation.cutout_(cropped.float() + 1, draws)
    for i, (flip, top, left, row, column) in enumerate(draws.T.tolist()):
        expected = images[i].flip(2) if flip else images[i]
        expected = F.pad(expected, (2, 2, 2, 2))[:, top : top + HEIGHT, left : left + WIDTH]
        assert cropped[i].equal(expected)
        expected = expected.float() + 1
        expected[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0
        assert cut[i].equal(expected)


def test_channels_last_images_give_the_same_result() -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=2), HEIGHT, WIDTH, seed=1)
    images = random_images(20).images
    draws = augmentation.draws(0, torch.arange(20))
    cropped = augmentation.flip_and_crop(images.contiguous(memory_format=torch.channels_last), draws)
    assert cropped.equal(augmentation.flip_and_crop(images, draws))


def test_draws_depend_on_seed_epoch_and_position_only() -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=4, cutout=2), HEIGHT, WIDTH, seed=1)
    draws = augmentation.draws(3, torch.arange(100))
    chosen = torch.tensor([17, 99, 0])
    assert augmentation.draws(3, chosen).equal(draws[:, chosen])
    assert not augmentation.draws(4, torch.arange(100)).equal(draws)
    other = Shifts(augment(flip=True, crop_padding=4, cutout=2), HEIGHT, WIDTH, seed=2)
    assert not other.draws(3, torch.arange(100)).equal(draws)


def test_draws_are_uniform_and_independent() -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=1, cutout=2), HEIGHT, WIDTH, seed=0)
    draws = augmentation.draws(0, torch.arange(24_000))
    for row, limit in zip(draws, (2, 3, 3, HEIGHT, WIDTH), strict=True):
        counts = row.bincount(minlength=limit)
        assert len(counts) == limit
        assert (counts / 24_000 * limit - 1).abs().max() < 0.08
    correlation = torch.corrcoef(draws.double()) - torch.eye(5)
    assert correlation.abs().max() < 0.04


def test_alternating_flips_alternate_from_epoch_to_epoch() -> None:
    alternating = Shifts(augment(flip="alternating"), HEIGHT, WIDTH, seed=1)
    positions = torch.arange(100)
    first = alternating.draws(0, positions)[0]
    assert first.equal(Shifts(augment(flip=True), HEIGHT, WIDTH, seed=1).draws(0, positions)[0])
    for epoch in range(5):
        assert alternating.draws(epoch, positions)[0].equal(first if epoch % 2 == 0 else 1 - first)


def test_a_reflected_border_agrees_with_torch() -> None:
    augmentation = Shifts(augment(crop_padding=3, crop_border="reflect"), HEIGHT, WIDTH, seed=1)
    images = random_images(20).images
    draws = augmentation.draws(0, torch.arange(20))
    padded = F.pad(images.double(), (3, 3, 3, 3), mode="reflect").byte()
    for cropped, whole, (_, top, left, _, _) in zip(
        augmentation.flip_and_crop(images, draws), padded, draws.T.tolist(), strict=True
    ):
        assert cropped.equal(whole[:, top : top + HEIGHT, left : left + WIDTH])


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_may_be_empty(count: int) -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=1, cutout=2), HEIGHT, WIDTH, seed=0)
    images = random_images(count).images
    draws = augmentation.draws(0, torch.arange(count))
    augmented = augmentation.cutout_(augmentation.flip_and_crop(images, draws).float(), draws)
    assert augmented.shape == (count, 3, HEIGHT, WIDTH)


def test_augmentation_is_active_only_if_configured() -> None:
    assert not Shifts(augment(), HEIGHT, WIDTH, seed=0).active
    assert Shifts(augment(cutout=1), HEIGHT, WIDTH, seed=0).active


@pytest.mark.parametrize("border", ["zeros", "reflect"])
def test_masks_move_with_their_images_and_are_unknown_outside(border: str) -> None:
    augmentation = Shifts(augment(flip=True, crop_padding=2, crop_border=border, cutout=3), HEIGHT, WIDTH, seed=1)
    # As images without a black pixel, masks are moved to the same places.
    images = random_images(40, channels=1).images.clamp(1, 200)
    draws = augmentation.draws(0, torch.arange(40))
    moved = augmentation.flip_and_crop(images, draws)
    masks = augmentation.move_masks(images.squeeze(1), draws)
    assert masks.equal(moved.squeeze(1).masked_fill(moved.squeeze(1) == 0, IGNORED))
    assert bool((masks == IGNORED).any()) == (border == "zeros")
    assert augmentation.move_masks(images[:0].squeeze(1), draws[:, :0]).shape == (0, HEIGHT, WIDTH)
