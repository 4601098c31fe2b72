"""Horizontal flip, padded crop and cutout of whole batches.

A sample's random draws depend only on (seed, epoch, position in the split); see :mod:`distrain.rng`. So the result
doesn't depend on the rank or the batch that the sample is part of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain import rng
from distrain.config.augment import AugmentConfig
from distrain.data.base import IGNORED

#: Identifies these draws among the uses of random numbers.
_AUGMENT = 4


class Shifts:
    """Horizontal flip, padded crop and cutout for batches of one image size.

    With ``flip=alternating``, whether an image is mirrored is random in the first epoch and alternates from then on, so
    that any two successive epochs see both versions of every image (Jordan 2024, arXiv 2404.00498, §3.6).

    Args:
        config: Which augmentations, and how strong they are.
        height: Rows of an image.
        width: Columns of an image.
        seed: The run's seed.
    """

    def __init__(self, config: AugmentConfig, height: int, width: int, seed: int) -> None:
        self._flip, self._padding, self._side = bool(config.flip), config.crop_padding, config.cutout
        self._alternating, self._reflect = config.flip == "alternating", config.crop_border == "reflect"
        self._height, self._width, self._seed = height, width, seed
        # Number of values of each of the five draws: flip; top and left of the crop; row and column of the cutout.
        shifts = 2 * config.crop_padding + 1
        self._limits = (2, shifts, shifts, height, width)

    @property
    def active(self) -> bool:
        """Whether any augmentation is configured."""
        return self._flip or self._padding > 0 or self._side > 0

    def draws(self, epoch: int, positions: Tensor) -> Tensor:
        """Draws all random numbers for some samples of an epoch.

        Args:
            epoch: Counted from 0.
            positions: Positions in the split, int64 [n].

        Returns:
            int64 [5, n] on the same device: 1 to flip, else 0; top and left of the crop; row and column of the cutout.
        """
        values = [
            rng.below(limit, rng.bits(rng.key(_AUGMENT, self._seed, epoch, kind), positions))
            for kind, limit in enumerate(self._limits)
        ]
        if self._alternating:
            first = rng.below(2, rng.bits(rng.key(_AUGMENT, self._seed, 0, 0), positions))
            values[0] = (first + epoch) % 2
        return torch.stack(values)

    def mirrored(self, draws: Tensor) -> Tensor | None:
        """Which images are flipped, bool [n], by the result of :meth:`draws`; ``None`` if none ever is."""
        return draws[0].bool() if self._flip else None

    def flip_and_crop(self, images: Tensor, draws: Tensor, *, flipped: bool = False) -> Tensor:
        """Flips and crops; pixels outside of the image are 0 (black before normalisation) or mirrored at its edge.

        Args:
            images: uint8 [n, C, H, W].
            draws: int64 [5, n] from :meth:`draws`, on the same device.
            flipped: Whether those that are to be flipped are flipped already.

        Returns:
            uint8 [n, C, H, W].
        """
        return self._moved(images, draws, outside=0, flipped=flipped)

    def move_masks(self, masks: Tensor, draws: Tensor, *, flipped: bool = False) -> Tensor:
        """Moves masks as :meth:`flip_and_crop` moves their images; a pixel outside of the image has no known class.

        Cutout leaves masks as they are: what is hidden is still there.

        Args:
            masks: uint8 [n, H, W].
            draws: Those of the images.
            flipped: As for :meth:`flip_and_crop`.

        Returns:
            uint8 [n, H, W].
        """
        return self._moved(masks.unsqueeze(1), draws, outside=IGNORED, flipped=flipped).squeeze(1)

    def _moved(self, images: Tensor, draws: Tensor, outside: int, *, flipped: bool) -> Tensor:
        count = len(images)
        if count == 0:
            return images
        rows = torch.arange(count, device=images.device)
        if self._flip and not flipped:
            # Selecting from both versions is faster than torch.where on uint8, and needs no CUDA synchronisation.
            images = torch.cat((images, images.flip(3))).index_select(0, rows + draws[0] * count)
        if self._padding:
            windows = self._padded(images, outside).unfold(2, self._height, 1).unfold(3, self._width, 1)
            images = windows[rows, :, draws[1], draws[2]]
        return images

    def _padded(self, images: Tensor, outside: int) -> Tensor:
        if not self._reflect:
            return F.pad(images, (self._padding,) * 4, value=outside)
        # By index, since torch's reflection padding doesn't support uint8.
        for dim, size in ((2, self._height), (3, self._width)):
            lines = torch.arange(-self._padding, size + self._padding, device=images.device)
            images = images.index_select(dim, size - 1 - (size - 1 - lines.abs()).abs())
        return images

    def cutout_(self, images: Tensor, draws: Tensor) -> Tensor:
        """Sets a square around a random pixel, clipped at the borders, to 0, which is the mean after normalisation.

        DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.

        Args:
            images: Normalised images [n, C, H, W], changed in place.
            draws: int64 [5, n] from :meth:`draws`, on the same device.

        Returns:
            ``images``.
        """
        if not self._side:
            return images
        rows = self._covered(draws[3], self._height).to(images.dtype).unsqueeze(2)
        columns = self._covered(draws[4], self._width).to(images.dtype).unsqueeze(1)
        # On CPU, multiplying by 0 or 1 is several times faster than filling under a broadcast mask.
        return images.mul_((1 - rows * columns).unsqueeze(1))

    def _covered(self, centres: Tensor, size: int) -> Tensor:
        """Which of ``size`` rows or columns the squares cover: bool [n, size]."""
        start = (centres - self._side // 2).unsqueeze(1)
        lines = torch.arange(size, device=centres.device)
        return (lines >= start) & (lines < start + self._side)
