"""Every operation on images gives Pillow's pixels."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from distrain.data.augmentation import operations, resize
from distrain.data.augmentation.operations import Operation

COUNT, HEIGHT, WIDTH = 24, 19, 26


def pictures(channels: int = 3) -> Tensor:
    """Smooth pictures with a little noise, some of them of low contrast, one of one colour."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(COUNT, channels, 4, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") * 255
    images = images + 8 * torch.randn(images.shape, generator=generator)
    images[1::4] = 60 + images[1::4] / 3
    images[0] = 77
    return images.clamp(0, 255).to(torch.uint8)


def picture(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def pixels(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def moved(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


PILLOWS: dict[Operation, Callable[[Image.Image, float], Image.Image]] = {
    Operation.IDENTITY: lambda image, _: image,
    Operation.SHEAR_X: lambda image, m: moved(image, 1, m, 0, 0, 1, 0),
    Operation.SHEAR_Y: lambda image, m: moved(image, 1, 0, 0, m, 1, 0),
    Operation.TRANSLATE_X: lambda image, m: moved(image, 1, 0, -int(m), 0, 1, 0),
    Operation.TRANSLATE_Y: lambda image, m: moved(image, 1, 0, 0, 0, 1, -int(m)),
    Operation.ROTATE: lambda image, m: image.rotate(m, Image.Resampling.NEAREST),
    Operation.BRIGHTNESS: lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    Operation.COLOR: lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    Operation.CONTRAST: lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    Operation.SHARPNESS: lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    Operation.POSTERIZE: lambda image, m: ImageOps.posterize(image, int(m)),
    Operation.SOLARIZE: lambda image, m: ImageOps.solarize(image, math.ceil(m)),
    Operation.AUTOCONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Operation.INVERT: lambda image, _: ImageOps.invert(image),
}


def magnitudes(operation: Operation) -> Tensor:
    """What an operation may be asked for, spread over its range."""
    spread = torch.linspace(-1, 1, COUNT, dtype=torch.float64)
    if operation in (Operation.SHEAR_X, Operation.SHEAR_Y):
        return 0.99 * spread
    if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        return 32 * spread
    if operation == Operation.POSTERIZE:
        return torch.linspace(2, 8, COUNT, dtype=torch.float64).round()
    if operation == Operation.SOLARIZE:
        return 127.5 + 127.5 * spread
    return (135 if operation == Operation.ROTATE else 0.99) * spread


@pytest.mark.parametrize("channels", [3, 1])
def test_each_operation_gives_pillows_pixels(channels: int) -> None:
    images = pictures(channels)
    for operation, of_pillow in PILLOWS.items():
        strengths = magnitudes(operation)
        changed = operations.apply(images, torch.full((COUNT,), operation), strengths)
        for image, result, strength in zip(images, changed, strengths.tolist(), strict=True):
            expected = pixels(of_pillow(picture(image), strength))
            assert result.equal(expected), (operation.name, strength)


def test_each_image_gets_its_own_operation() -> None:
    images = pictures()
    drawn = torch.randint(0, len(Operation), (COUNT,), generator=torch.Generator().manual_seed(1))
    strengths = torch.stack([magnitudes(Operation(int(each)))[row] for row, each in enumerate(drawn)])
    before = images.clone()
    together = operations.apply(images, drawn, strengths)
    assert images.equal(before)
    for row in range(COUNT):
        alone = operations.apply(images[row : row + 1], drawn[row : row + 1], strengths[row : row + 1])
        assert together[row].equal(alone[0])


def test_hue_turns_in_the_hsv_model() -> None:
    images, turns = pictures(), torch.linspace(-0.5, 0.5, COUNT, dtype=torch.float64)
    changed = operations.apply(images, torch.full((COUNT,), Operation.HUE), turns)
    for image, result, turn in zip(images, changed, turns.tolist(), strict=True):
        for row, column in ((0, 0), (7, 11), (18, 25)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
            assert (result[:, row, column] - expected).abs().max() <= 0.51
    assert operations.apply(images, torch.full((COUNT,), Operation.HUE), torch.zeros(COUNT)).equal(images)


def test_masks_move_like_their_images() -> None:
    images = pictures(1)
    for operation in Operation:
        drawn, strengths = torch.full((COUNT,), operation), magnitudes(operation)
        masks = operations.move_masks(images[:, 0], drawn, strengths, outside=255)
        if operation in operations.MOVES:
            shown = operations.apply(torch.full_like(images, 1), drawn, strengths)[:, 0] > 0
            assert masks[shown].equal(operations.apply(images, drawn, strengths)[:, 0][shown])
            assert bool((masks[~shown] == 255).all())
        else:
            assert masks.equal(images[:, 0])


FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(12, 9), (HEIGHT, WIDTH), (40, 33)])
def test_boxes_are_resized_as_by_pillow(interpolation: str, size: tuple[int, int]) -> None:
    images = pictures()
    generator = torch.Generator().manual_seed(2)
    height, width = (torch.randint(1, limit + 1, (COUNT,), generator=generator) for limit in (HEIGHT, WIDTH))
    top = (torch.rand(COUNT, generator=generator) * (HEIGHT - height + 1)).long()
    left = (torch.rand(COUNT, generator=generator) * (WIDTH - width + 1)).long()
    boxes = torch.stack((top, left, height, width))
    resized = resize.resize(images, boxes, *size, interpolation)
    mirrored = torch.arange(COUNT) % 3 == 0
    turned = resize.resize(images, boxes, *size, interpolation, mirrored)
    assert turned.equal(torch.where(mirrored.view(-1, 1, 1, 1), resized.flip(3), resized))
    worst, differing = 0, 0.0
    for row, result in enumerate(resized):
        box = images[row, :, top[row] : top[row] + height[row], left[row] : left[row] + width[row]]
        # The rows first; for some shapes of boxes Pillow 13 begins with the columns.
        lines = picture(box).resize((size[1], int(height[row])), FILTERS[interpolation])
        expected = pixels(lines.resize((size[1], size[0]), FILTERS[interpolation]))
        difference = (result.int() - expected.int()).abs()
        worst, differing = max(worst, int(difference.max())), differing + float((difference > 0).float().mean()) / COUNT
    # Weights have 15 or 16 bits here and 22 in Pillow. Where a nearest pixel is exactly between two, any will do.
    assert differing < (0.02 if interpolation == "nearest" else 0.01)
    assert worst <= 2 or interpolation == "nearest"


def test_a_box_is_resized_alike_in_every_batch() -> None:
    images = pictures()
    boxes = torch.tensor([3, 2, 11, 17]).view(4, 1).expand(4, COUNT)
    together = resize.resize(images, boxes, 30, 30, "bicubic")
    for row in (0, 5, COUNT - 1):
        assert resize.resize(images[row : row + 1], boxes[:, :1], 30, 30, "bicubic")[0].equal(together[row])


@pytest.mark.parametrize("share", [1.0, 0.875, 0.7])
def test_the_centre_is_that_of_the_resized_image(share: float) -> None:
    images = pictures()
    whole = (math.floor(14 / share), math.floor(21 / share))
    top, left = round((whole[0] - 14) / 2), round((whole[1] - 21) / 2)
    for image, result in zip(images, resize.resize_centre(images, share, 14, 21), strict=True):
        resized = pixels(picture(image).resize((whole[1], whole[0]), Image.Resampling.BILINEAR))
        assert (result.int() - resized[:, top : top + 14, left : left + 21].int()).abs().max() <= 1
    assert resize.resize_centre(images, 1.0, HEIGHT, WIDTH).equal(images)
    cut = resize.resize_centre(images, 15 / HEIGHT, 15, 20)
    assert cut.equal(images[:, :, 2:17, 3:23]) == (math.floor(20 / (15 / HEIGHT)) == WIDTH)
