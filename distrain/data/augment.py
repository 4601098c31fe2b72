"""Whole-batch augmentation: a few tensor operations a batch, none a sample.

Each sample's draws depend on (seed, epoch, position in the split) alone (:mod:`distrain.rng`), so a sample is
augmented alike on whatever rank and in whatever batch it lands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain import rng
from distrain.config.schema import AugmentConfig

_AUGMENT = 4


class Augmentation:
    """Flip, padded crop and cutout of batches of one image size.

    With ``flip=alternating`` chance says of each image whether it is mirrored in the first epoch, and then it is in
    every other one: two epochs see both versions of all images (Jordan 2024, arXiv 2404.00498, §3.6). That is still a
    function of (seed, epoch, position in the split) alone.

    Args:
        config: Which of them, and how far.
        height: Rows of an image.
        width: Columns of an image.
        seed: The run's seed.
    """

    def __init__(self, config: AugmentConfig, height: int, width: int, seed: int) -> None:
        self._flip, self._padding, self._side = bool(config.flip), config.crop_padding, config.cutout
        self._alternating, self._mirrored = config.flip == "alternating", config.crop_border == "reflect"
        self._height, self._width, self._seed = height, width, seed
        # How many values each of the five draws can take: flip, crop's top and left, cutout's row and column.
        shifts = 2 * config.crop_padding + 1
        self._limits = (2, shifts, shifts, height, width)

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self._flip or self._padding > 0 or self._side > 0

    def draws(self, epoch: int, positions: Tensor) -> Tensor:
        """All random choices for these samples of an epoch.

        Args:
            epoch: Counted from 0.
            positions: int64 [n], positions in the split.

        Returns:
            int64 [5, n] on the same device: flip or not, top and left of the crop, row and column of the cutout.
        """
        chosen = [
            rng.below(limit, rng.bits(rng.key(_AUGMENT, self._seed, epoch, kind), positions))
            for kind, limit in enumerate(self._limits)
        ]
        if self._alternating:
            first = rng.below(2, rng.bits(rng.key(_AUGMENT, self._seed, 0, 0), positions))
            chosen[0] = (first + epoch) % 2
        return torch.stack(chosen)

    def flip_and_crop(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flips and crops; what a crop sees outside of the image is 0 (black before normalisation), or its mirror.

        Args:
            images: uint8 [n, C, H, W].
            draws: int64 [5, n] from :meth:`draws`, on the same device.
        """
        count = len(images)
        if count == 0:
            return images
        which = torch.arange(count, device=images.device)
        if self._flip:
            # Picking from both versions is faster than torch.where on uint8, and needs no synchronisation on CUDA.
            images = torch.cat((images, images.flip(3))).index_select(0, which + draws[0] * count)
        if self._padding:
            windows = self._padded(images).unfold(2, self._height, 1).unfold(3, self._width, 1)
            images = windows[which, :, draws[1], draws[2]]
        return images

    def _padded(self, images: Tensor) -> Tensor:
        if not self._mirrored:
            return F.pad(images, (self._padding,) * 4)
        # By index: torch's own reflection takes no uint8.
        for dim, size in ((2, self._height), (3, self._width)):
            lines = torch.arange(-self._padding, size + self._padding, device=images.device)
            images = images.index_select(dim, size - 1 - (size - 1 - lines.abs()).abs())
        return images

    def cutout_(self, images: Tensor, draws: Tensor) -> Tensor:
        """Sets a square around the drawn pixel, clipped at the borders, to 0: the mean after normalisation.

        After DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.

        Args:
            images: Normalised [n, C, H, W], changed in place.
            draws: int64 [5, n] from :meth:`draws`, on the same device.
        """
        if not self._side:
            return images
        rows = self._covered(draws[3], self._height).to(images.dtype).unsqueeze(2)
        columns = self._covered(draws[4], self._width).to(images.dtype).unsqueeze(1)
        # Multiplying by exactly 0 or 1 is several times faster on CPU than filling under a broadcast mask.
        return images.mul_((1 - rows * columns).unsqueeze(1))

    def _covered(self, centres: Tensor, size: int) -> Tensor:
        """Which of ``size`` lines the squares cover: bool [n, size]."""
        start = (centres - self._side // 2).unsqueeze(1)
        lines = torch.arange(size, device=centres.device)
        return (lines >= start) & (lines < start + self._side)
