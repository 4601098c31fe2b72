"""Cuts a box out of each image and resizes it, as Pillow does, with two matrix products for a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distrain.data.augmentation.draws import Draws, between, first_true, index_below

#: Identifies these draws among those of a sample.
_CROP = 1
#: Boxes that are tried for a sample before the largest centred one is taken, as in torchvision.
_ATTEMPTS = 10
#: Filters are multiples of 1 / 2**16, and weights of 1 / 2**15. So all products with pixels from 0 to 255, and all sums
#: of them, are exact in float32: the result doesn't depend on the order of summation, and so not on the batch.
_FILTER_STEPS, _WEIGHT_STEPS = 2.0**16, 2.0**15
#: On a GPU that multiplies in TF32 (11 bits) weights are split at this bit into two parts of few bits.
_SPLIT = 2.0**-8


def random_boxes(draws: Draws, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Boxes of random area and shape at random places (Szegedy et al. 2015, arXiv 1409.4842), as torchvision's.

    Args:
        draws: Of the samples.
        height: Rows of an image.
        width: Columns of an image.
        scale: Smallest and largest area, as shares of the image's.
        ratio: Smallest and largest ratio of width to height; its logarithm is uniform.

    Returns:
        int64 [4, n]: top, left, height, width.
    """
    uniform = draws.uniform(_CROP, 2 * _ATTEMPTS + 2)
    area = height * width * between(scale[0], scale[1], uniform[:_ATTEMPTS])
    shape = between(math.log(ratio[0]), math.log(ratio[1]), uniform[_ATTEMPTS : 2 * _ATTEMPTS]).exp()
    widths, heights = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    chosen = first_true(fits).unsqueeze(0)
    any_fits = fits.any(0)
    fallback_height, fallback_width = _largest_box(height, width, ratio)
    box_height = torch.where(any_fits, heights.gather(0, chosen)[0].long(), fallback_height)
    box_width = torch.where(any_fits, widths.gather(0, chosen)[0].long(), fallback_width)
    top = torch.where(any_fits, index_below(height - box_height + 1, uniform[-2]), (height - fallback_height) // 2)
    left = torch.where(any_fits, index_below(width - box_width + 1, uniform[-1]), (width - fallback_width) // 2)
    return torch.stack((top, left, box_height, box_width))


def _largest_box(height: int, width: int, ratio: Sequence[float]) -> tuple[int, int]:
    """Height and width of the largest box of an allowed shape."""
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def resize(images: Tensor, boxes: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """Cuts a box out of each image and gives it another size; pixels outside of the box have no influence.

    A box that is made smaller is smoothed before (antialiasing), unless ``interpolation`` is ``nearest``.

    Args:
        images: uint8 or floating point [n, C, H, W].
        boxes: int64 [4, n] as :func:`random_boxes` returns, on the same device.
        height: Rows of the result.
        width: Columns of the result.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.

    Returns:
        [n, C, height, width] of the same type. uint8 results are Pillow's, up to rounding.
    """
    top, left, box_height, box_width = boxes.float().unbind()
    filtered = _FILTERS[interpolation]
    columns = filtered(left, box_width, images.shape[3], width)
    rows = filtered(top, box_height, images.shape[2], height)
    return _weighted(images, rows, columns)


def resize_centre(images: Tensor, share: float, height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    """Resizes whole images to ``height / share`` and ``width / share``, and keeps the centre of height times width.

    Args:
        images: uint8 or floating point [n, C, H, W].
        share: Share of each side that the result shows.
        height: Rows of the result.
        width: Columns of the result.
        interpolation: See :func:`resize`.

    Returns:
        [n, C, height, width] of the same type.
    """
    whole = (max(height, math.floor(height / share)), max(width, math.floor(width / share)))
    top, left = round((whole[0] - height) / 2), round((whole[1] - width) / 2)
    if whole == tuple(images.shape[2:]):
        return images[:, :, top : top + height, left : left + width]
    start = torch.zeros(1, device=images.device)
    filtered = _FILTERS[interpolation]
    columns = filtered(start, start + images.shape[3], images.shape[3], whole[1])[:, left : left + width]
    rows = filtered(start, start + images.shape[2], images.shape[2], whole[0])[:, top : top + height]
    return _weighted(images, rows, columns)


def _weighted(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted sums of an image's columns, and of the rows of these.

    Args:
        images: [n, C, H, W].
        rows: Weights, float32 [n or 1, height, H].
        columns: Weights, float32 [n or 1, width, W].

    Returns:
        [n, C, height, width] of the type of ``images``.
    """
    count, channels, height, width = images.shape
    exact = images.dtype == torch.uint8
    pixels = images.to(torch.float32 if exact else images.dtype)
    rows, columns = rows.to(pixels.dtype), columns.to(pixels.dtype)
    flat = pixels.reshape(count, channels * height, width)
    narrow = _product(flat, columns.transpose(1, 2)).view(count, channels, height, columns.shape[1])
    if exact:
        narrow = narrow.add_(0.5).clamp_(0, 255).floor_()
    result = _product(narrow, rows.unsqueeze(1), swapped=True)
    # The conversion cuts fractions off.
    return result.add_(0.5).clamp_(0, 255).to(torch.uint8) if exact else result


def _product(pixels: Tensor, weights: Tensor, *, swapped: bool = False) -> Tensor:
    """``pixels @ weights``, or ``weights @ pixels`` if swapped; exact for pixels of 8 bits."""
    if pixels.device.type == "cpu" or pixels.dtype != torch.float32:
        return weights @ pixels if swapped else pixels @ weights
    high = (weights / _SPLIT).round() * _SPLIT
    parts = (high, weights - high)
    first, second = ((part @ pixels if swapped else pixels @ part) for part in parts)
    return first + second


def _smooth(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """Weights by a kernel, a function of the distance in pixels, that is wider where the result is smaller."""

    def weights(start: Tensor, length: Tensor, size: int, result: int) -> Tensor:
        scale = (length / result).view(-1, 1, 1)
        first = start.view(-1, 1, 1)
        centres = first + (torch.arange(result, device=start.device) + 0.5).view(1, -1, 1) * scale
        lines = torch.arange(size, device=start.device, dtype=torch.float32)
        inside = (lines >= first) & (lines < first + length.view(-1, 1, 1))
        # In place, since these are as many numbers as the pixels of the images.
        distance = (lines + 0.5 - centres).div_(scale.clamp_min(1)).abs_()
        filtered = kernel(distance).mul_(_FILTER_STEPS).round_().mul_(inside.float())
        return filtered.mul_(_WEIGHT_STEPS / filtered.sum(2, keepdim=True)).round_().mul_(1 / _WEIGHT_STEPS)

    return weights


def _nearest(start: Tensor, length: Tensor, size: int, result: int) -> Tensor:
    """Weights that take the pixel below the centre of each pixel of the result."""
    # In integers, since a centre may lie exactly between two pixels.
    steps = 2 * torch.arange(result, device=start.device) + 1
    chosen = start.long().view(-1, 1) + steps * length.long().view(-1, 1) // (2 * result)
    return (torch.arange(size, device=start.device) == chosen.unsqueeze(2)).float()


def _bilinear(distance: Tensor) -> Tensor:
    """A triangle; the distances are changed in place."""
    return distance.neg_().add_(1).clamp_min_(0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys's kernel (1981) with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


#: Weights [n, result, size] from (start [n], length [n], size, result), for each interpolation.
_FILTERS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "nearest": _nearest,
    "bilinear": _smooth(_bilinear),
    "bicubic": _smooth(_bicubic),
}
