"""Shears, translations and rotations of whole batches: the nearest pixel, in Pillow's fixed-point arithmetic.

Integers make the result the same on every device and in every batch, and equal to Pillow's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Fractional bits of a coordinate.
_BITS = 16


def shear(horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Matrices that shear about the upper left corner.

    Args:
        horizontal: Pixels by which a row lies further left than the row above, float64 [n].
        vertical: Pixels by which a column lies further up than the column to its left, float64 [n].

    Returns:
        float64 [6, n]; see :func:`move`.
    """
    one, zero = torch.ones_like(horizontal), torch.zeros_like(horizontal)
    return torch.stack((one, horizontal, zero, vertical, one, zero))


def translation(right: Tensor, down: Tensor) -> Tensor:
    """Matrices that move images by whole pixels, float64 [6, n]; fractions are cut off."""
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    return torch.stack((one, zero, -right.trunc(), zero, one, -down.trunc()))


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Matrices that turn images of one size counterclockwise about their centres, float64 [6, n]."""
    angle = torch.deg2rad(-degrees)
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return torch.stack((cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


def move(images: Tensor, matrices: Tensor, outside: int) -> Tensor:
    """Takes each pixel from another place.

    Args:
        images: uint8 [n, C, H, W].
        matrices: float64 [6, n] on the CPU: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), where the
            first pixel's centre is (0.5, 0.5).
        outside: Value of pixels that come from outside of the image.

    Returns:
        uint8 [n, C, H, W].
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrices
    # In steps of one pixel from the centre of the first one.
    steps = torch.stack((a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e))
    fixed = (steps * 2**_BITS + 0.5).floor().to(torch.int32).to(images.device).view(6, count, 1, 1)
    columns = torch.arange(width, dtype=torch.int32, device=images.device)
    rows = torch.arange(height, dtype=torch.int32, device=images.device).view(-1, 1)
    x = ((fixed[2] + fixed[0] * columns) + fixed[1] * rows).bitwise_right_shift_(_BITS)
    y = ((fixed[5] + fixed[3] * columns) + fixed[4] * rows).bitwise_right_shift_(_BITS)
    near_x, near_y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    is_outside = (near_x != x).logical_or_(near_y != y)
    # One more pixel takes the place of all that lie outside.
    places = near_y.mul_(width).add_(near_x).masked_fill_(is_outside, height * width).flatten(1).long()
    pixels = F.pad(images.flatten(2), (0, 1), value=outside)
    return pixels.gather(2, places.unsqueeze(1).expand(-1, channels, -1)).view_as(images)
