"""Changes of colour of whole batches, equal to Pillow's: by a table of the 256 values, or by blending two images."""

from __future__ import annotations

import torch
from torch import Tensor

#: Weights of red, green and blue in greyscale (ITU-R 601) in 16-bit fixed point, as in Pillow.
_RED, _GREEN, _BLUE, _HALF, _GREY_BITS = 19595, 38470, 7471, 0x8000, 16


def grey(images: Tensor) -> Tensor:
    """Greyscale versions, whole numbers as float32 [n, 1, H, W], of uint8 images [n, 3, H, W] or [n, 1, H, W]."""
    pixels = images.float()
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels[:, :1], pixels[:, 1:2], pixels[:, 2:]
    # All sums are below 2**24, and so exact.
    return (red * _RED).add_(green * _GREEN).add_(blue * _BLUE).add_(_HALF).mul_(2.0**-_GREY_BITS).floor_()


def mean_grey(images: Tensor) -> Tensor:
    """The mean of each image's greyscale version, rounded, float32 [n]."""
    # Summed as integers: in another order than on another device, float32 would be rounded otherwise.
    values = grey(images).flatten(1).int()
    return ((values.sum(1) * 2 + values.shape[1]) // (2 * values.shape[1])).float()


def blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """``first + factor * (second - first)`` in the range of a pixel; fractions are cut off.

    Args:
        first: Whole numbers as float32.
        second: The same, of a shape that can be combined with it.
        factor: float32; 0 gives ``first`` and 1 gives ``second``, other numbers go beyond them.

    Returns:
        uint8.
    """
    # Not torch.lerp, whose rounding is another.
    return (second - first).mul_(factor).add_(first).clamp_(0, 255).to(torch.uint8)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image with its greyscale version; factors are float32 [n]."""
    return blend(grey(images), images.float(), factor.view(-1, 1, 1, 1))


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Blends each image with a smoothed version, whose border is the image's own; factors are float32 [n]."""
    pixels = images.float()
    smooth = pixels.clone()
    if min(images.shape[2:]) > 2:
        rows = (pixels[:, :, :-2] + pixels[:, :, 1:-1]).add_(pixels[:, :, 2:])
        neighbours = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(pixels[:, :, 1:-1, 1:-1] * 4)
        # The mean with weight 5 for the pixel itself and 1 for its neighbours, rounded. The sums are exact, and the
        # quotient is at least 1/26 away from a number that would be rounded otherwise.
        smooth[:, :, 1:-1, 1:-1] = neighbours.div_(13).add_(0.5).floor_()
    return blend(smooth, pixels, factor.view(-1, 1, 1, 1))


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue in the HSV model, without rounding before the end.

    Args:
        images: uint8 [n, 3, H, W].
        turns: Share of a whole turn, float32 [n].

    Returns:
        uint8 [n, 3, H, W].
    """
    red, green, blue = images.float().unbind(1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    range_ = highest - torch.minimum(torch.minimum(red, green), blue)
    divisor = range_.clamp_min(1)
    sixths = torch.where(
        red == highest,
        (green - blue) / divisor,
        torch.where(green == highest, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1)
    # A channel is highest around its own hue, lowest around the opposite one, and linear between them.
    channels = []
    for offset in (5, 3, 1):
        place = (sixths + offset).remainder(6)
        channels.append(highest - range_ * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, dim=1).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


# --- tables: uint8 [n, C, 256] or [n, 1, 256], from the new value of each value ---------------------------------------


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replaces each value of uint8 images [n, C, H, W] by that in its image's table, uint8 [n, C or 1, 256]."""
    tables = tables.expand(-1, images.shape[1], -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _values(like: Tensor) -> Tensor:
    """All values of a pixel, float32 [1, 1, 256]."""
    return torch.arange(256, dtype=torch.float32, device=like.device).view(1, 1, -1)


def blend_table(level: Tensor, factor: Tensor) -> Tensor:
    """Blends with an image of one grey level: 0 for brightness, the mean for contrast; both float32 [n]."""
    return blend(level.view(-1, 1, 1), _values(level), factor.view(-1, 1, 1))


def posterize_table(bits: Tensor) -> Tensor:
    """Keeps the upper bits, whose number is float32 [n]."""
    step = torch.exp2(8 - bits.floor()).round().view(-1, 1, 1)
    values = _values(bits)
    return (values - values.remainder(step)).to(torch.uint8)


def solarize_table(threshold: Tensor) -> Tensor:
    """Inverts values that are not below the threshold, float32 [n]."""
    values = _values(threshold)
    return torch.where(values < threshold.view(-1, 1, 1), values, 255 - values).to(torch.uint8)


def autocontrast_table(images: Tensor) -> Tensor:
    """Stretches the values of each channel so that they reach from 0 to 255."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    values = _values(images).double()
    # Not 255 / range, which torch computes as 255 times a rounded reciprocal.
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)
    stretched = (values * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def equalize_table(images: Tensor) -> Tensor:
    """Makes the values of each channel equally frequent, as far as possible."""
    count, channels, height, width = images.shape
    rows = torch.arange(count * channels, device=images.device).view(-1, 1) * 256
    places = (images.reshape(count * channels, -1).long() + rows).flatten()
    histogram = torch.bincount(places, minlength=count * channels * 256).view(count, channels, 256)
    total = height * width
    highest = images.flatten(2).amax(2, keepdim=True).long()
    step = (total - histogram.gather(2, highest)) // 255
    below = histogram.cumsum(2) - histogram
    spread = ((step // 2 + below) // step.clamp_min(1)).clamp(max=255)
    return torch.where(step > 0, spread, _values(images).long()).to(torch.uint8)
