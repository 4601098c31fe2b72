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
#: Filters are multiples of 1 / 2**16. Weights are multiples of 1 / 2**16 too, and add up to 1 exactly; where some are
#: negative, so that their absolute values may add up to 1.3, they are multiples of 1 / 2**15. So all products with
#: pixels from 0 to 255, and all sums of them, are exact in float32: the result doesn't depend on the order of
#: summation, and so not on the batch.
_FILTER_STEPS, _WEIGHT_STEPS, _SIGNED_WEIGHT_STEPS = 2.0**16, 2.0**16, 2.0**15
#: Numbers of images that are resized together on a CPU.
_PIXELS_TOGETHER = 1 << 19
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


def resize(
    images: Tensor, boxes: Tensor, height: int, width: int, interpolation: str, mirrored: Tensor | None = None
) -> Tensor:
    """Cuts a box out of each image and gives it another size; pixels outside of the box have no influence.

    A box that is made smaller is smoothed before (antialiasing), unless ``interpolation`` is ``nearest``.

    Args:
        images: uint8 or floating point [n, C, H, W].
        boxes: int64 [4, n] as :func:`random_boxes` returns, on the same device.
        height: Rows of the result.
        width: Columns of the result.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        mirrored: Which results are mirrored, bool [n] on the same device; ``None``: none of them.

    Returns:
        [n, C, height, width] of the same type. uint8 results are Pillow's, up to rounding.
    """
    top, left, box_height, box_width = boxes.float().unbind()
    weights = _WEIGHTS[interpolation]
    order = torch.arange(width, device=images.device).expand(len(images), -1)
    if mirrored is not None:
        order = torch.where(mirrored.unsqueeze(1), width - 1 - order, order)
    columns = weights(left, box_width, images.shape[3], width, order)
    rows = weights(top, box_height, images.shape[2], height, torch.arange(height, device=images.device).unsqueeze(0))
    return _weighted(images, rows, columns, overshoots=interpolation == "bicubic")


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

    def centre(size: int, result: int, first: int, shown: int) -> Tensor:
        order = torch.arange(first, first + shown, device=images.device).unsqueeze(0)
        return _WEIGHTS[interpolation](start, start + size, size, result, order)

    columns = centre(images.shape[3], whole[1], left, width)
    rows = centre(images.shape[2], whole[0], top, height)
    return _weighted(images, rows, columns, overshoots=interpolation == "bicubic")


def _weighted(images: Tensor, rows: Tensor, columns: Tensor, *, overshoots: bool) -> Tensor:
    """As :func:`_weighted_part`; on a CPU a few images at a time, whose intermediate results stay in its cache."""
    count = len(images)
    together = max(1, _PIXELS_TOGETHER // max(1, images[:1].numel()))
    if images.device.type != "cpu" or count <= together:
        return _weighted_part(images, rows, columns, overshoots=overshoots)
    parts = (each.expand(count, -1, -1).split(together) for each in (rows, columns))
    pieces = zip(images.split(together), *parts, strict=True)
    return torch.cat([_weighted_part(*piece, overshoots=overshoots) for piece in pieces])


def _weighted_part(images: Tensor, rows: Tensor, columns: Tensor, *, overshoots: bool) -> Tensor:
    """Weighted sums of an image's columns, and of the rows of these.

    Args:
        images: [n, C, H, W].
        rows: Weights, float32 [n or 1, height, H].
        columns: Weights, float32 [n or 1, width, W].
        overshoots: Whether sums may be outside of the range of a pixel.

    Returns:
        [n, C, height, width] of the type of ``images``.
    """
    count, channels, height, width = images.shape
    exact = images.dtype == torch.uint8
    dtype = torch.float32 if exact else images.dtype
    rows, columns = (each.to(dtype).expand(count, -1, -1) for each in (rows, columns))
    # With the channels of a line side by side, all of an image's are one matrix in both products.
    lines = images.permute(0, 2, 1, 3).to(dtype, memory_format=torch.contiguous_format)
    # What is rounded is cut off after a half is added.
    added = 0.5 if exact else 0.0
    narrow = _product(lines.reshape(count, height * channels, width), columns.transpose(1, 2), added)
    shown = channels, columns.shape[1]
    if exact:
        narrow = (narrow.clamp_(0, 255) if overshoots else narrow).floor_()
    result = _product(rows, narrow.view(count, height, math.prod(shown)), added, weights_first=True)
    if exact and overshoots:
        result.clamp_(0, 255)
    # The channels are separated when the numbers are bytes, which moves a quarter of the memory.
    return result.to(images.dtype).view(count, rows.shape[1], *shown).permute(0, 2, 1, 3).contiguous()


def _product(first: Tensor, second: Tensor, added: float, *, weights_first: bool = False) -> Tensor:
    """Matrix products plus a number; exact for pixels of 8 bits."""
    if first.device.type == "cpu" or first.dtype != torch.float32:
        return torch.bmm(first, second).add_(added)
    weights = first if weights_first else second
    high = (weights / _SPLIT).round() * _SPLIT
    parts = (high, weights - high)
    one, other = ((part @ second if weights_first else first @ part) for part in parts)
    return one.add_(other).add_(added)


def _smooth(
    kernel: Callable[[Tensor], Tensor], reach: int, steps: float
) -> Callable[[Tensor, Tensor, int, int, Tensor], Tensor]:
    """Weights by a kernel, which is wider where the result is smaller.

    Args:
        kernel: A function of the distance in pixels.
        reach: The distance from which on it is 0.
        steps: Weights are multiples of 1 / steps.
    """

    def weights(start: Tensor, length: Tensor, size: int, result: int, order: Tensor) -> Tensor:
        first, length = start.view(-1, 1), length.view(-1, 1)
        scale = length / result
        stretch = scale.clamp_min(1)
        centres = first + (order + 0.5) * scale
        # Computed for the pixels around each centre, which are few of the line; all others' are 0.
        near = min(size, math.floor(2 * reach * max(1.0, size / result)) + 2)
        lowest = (centres - reach * stretch).floor_().clamp_(0, size - near)
        lines = lowest.unsqueeze(2) + torch.arange(near, device=start.device, dtype=torch.float32)
        inside = (lines >= first.unsqueeze(2)) & (lines < (first + length).unsqueeze(2))
        distance = ((lines + 0.5 - centres.unsqueeze(2)) / stretch.unsqueeze(2)).abs_()
        filtered = kernel(distance).mul_(_FILTER_STEPS).round_().mul_(inside)
        filtered = filtered.mul_(steps / filtered.sum(2, keepdim=True)).round_()
        # The largest takes what rounding has left, so that the sum is exact.
        largest = filtered.argmax(2, keepdim=True)
        filtered.scatter_add_(2, largest, steps - filtered.sum(2, keepdim=True))
        whole = torch.zeros(*filtered.shape[:2], size, device=start.device)
        return whole.scatter_(2, lines.long(), filtered.mul_(1 / steps))

    return weights


def _nearest(start: Tensor, length: Tensor, size: int, result: int, order: Tensor) -> Tensor:
    """Weights that take the pixel below the centre of each pixel of the result."""
    # In integers, since a centre may lie exactly between two pixels.
    chosen = start.long().view(-1, 1) + (2 * order + 1) * length.long().view(-1, 1) // (2 * result)
    return (torch.arange(size, device=start.device) == chosen.unsqueeze(2)).float()


def _bilinear(distance: Tensor) -> Tensor:
    """A triangle; the distances are changed in place."""
    return distance.neg_().add_(1).clamp_min_(0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys's kernel (1981) with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


#: Weights [n, m, size] from (start [n], length [n], size, result, order [n or 1, m]), for each interpolation. They give
#: the m pixels ``order`` of a line of ``result`` pixels, from a part of a line of ``size`` pixels.
_WEIGHTS: dict[str, Callable[[Tensor, Tensor, int, int, Tensor], Tensor]] = {
    "nearest": _nearest,
    "bilinear": _smooth(_bilinear, 1, _WEIGHT_STEPS),
    "bicubic": _smooth(_bicubic, 2, _SIGNED_WEIGHT_STEPS),
}
