"""Random erasing: hides a random box of an image, as torchvision does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain import rng
from distrain.config.augment import RandomErasingConfig
from distrain.data.augmentation.draws import Draws, between, first_true, index_below
from distrain.runtime.device import is_mps

#: Identify these draws among those of a sample.
_ERASE, _NOISE = 4, 5
#: Boxes that are tried for a sample; if none of them fits, nothing is erased.
_ATTEMPTS = 10
#: Noise takes one of this many values, the quantiles of the normal distribution; 16 random bits choose.
_LEVELS = 1 << 16


def boxes(config: RandomErasingConfig, draws: Draws, height: int, width: int) -> Tensor:
    """Boxes to hide, of random area and shape at random places.

    Returns:
        int64 [5, n]: top, left, height and width, which are 0 for an image that stays as it is, and 64 random bits.
    """
    uniform = draws.uniform(_ERASE, 2 * _ATTEMPTS + 3)
    area = height * width * between(config.scale[0], config.scale[1], uniform[:_ATTEMPTS])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    shape = between(low, high, uniform[_ATTEMPTS : 2 * _ATTEMPTS]).exp()
    heights, widths = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (heights < height) & (widths < width)
    chosen = first_true(fits).unsqueeze(0)
    erased = fits.any(0) & (uniform[-1] < config.probability)
    box_height = torch.where(erased, heights.gather(0, chosen)[0], 0.0).long()
    box_width = torch.where(erased, widths.gather(0, chosen)[0], 0.0).long()
    top = index_below(height - box_height + 1, uniform[-3])
    left = index_below(width - box_width + 1, uniform[-2])
    return torch.stack((top, left, box_height, box_width, draws.bits(_NOISE, 1)[0]))


class Erasing:
    """Hides boxes of normalised images.

    Args:
        value: ``zero``, or ``random`` for normal noise.
    """

    def __init__(self, value: str) -> None:
        self._quantiles: Tensor | None = None
        if value == "random":
            middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
            self._quantiles = torch.special.ndtri(middles).float()

    def erase_(self, images: Tensor, erased: Tensor) -> Tensor:
        """Hides boxes.

        Args:
            images: Normalised images [n, C, H, W], changed in place.
            erased: Result of :func:`boxes`, on the CPU.

        Returns:
            ``images``.
        """
        rows = (erased[2] * erased[3] > 0).nonzero().squeeze(1)
        if not len(rows):
            return images
        top, left, height, width, bits = erased[:, rows].to(images.device).unsqueeze(2)
        lines = torch.arange(images.shape[2], device=images.device)
        columns = torch.arange(images.shape[3], device=images.device)
        hidden_rows = (lines >= top) & (lines < top + height)
        hidden_columns = (columns >= left) & (columns < left + width)
        hidden = (hidden_rows.unsqueeze(2) & hidden_columns.unsqueeze(1)).unsqueeze(1)
        places = rows.to(images.device)
        chosen = images.index_select(0, places)
        return images.index_copy_(0, places, torch.where(hidden, self._shown(bits, chosen), chosen))

    def _shown(self, bits: Tensor, images: Tensor) -> Tensor:
        """What takes the place of the pixels: a scalar, or numbers of the shape of ``images``."""
        if self._quantiles is None:
            return images.new_zeros(())
        # Integers of 64 bits wrap around in the hash, of which Apple's GPUs promise nothing.
        device = torch.device("cpu") if is_mps(images.device) else images.device
        self._quantiles = self._quantiles.to(device)
        size = images[0].numel()
        # A hash of 64 bits serves four numbers.
        words = rng.bits(bits.to(device), torch.arange(-(-size // 4), device=device))
        levels = torch.stack([(words >> shift) & (_LEVELS - 1) for shift in (0, 16, 32, 48)], dim=2)
        noise = self._quantiles[levels.flatten(1)[:, :size]]
        return noise.view_as(images).to(images)
