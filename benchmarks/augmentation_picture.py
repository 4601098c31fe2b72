"""Draws augmented images of distrain beside torchvision's: ``docs/augmentation.png``.

Needs torchvision (``pip install torchvision``)::

    python benchmarks/augmentation_picture.py docs/augmentation.png
    python benchmarks/augmentation_picture.py mine.png --image photo.jpg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distrain.config.augment import (
    AugmentConfig,
    AutoAugmentConfig,
    ColorJitterConfig,
    MixingConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)
from distrain.data.base import DataSpec, Images
from distrain.data.loader import Loader

#: Pixels of an image, images in a row, and pixels between images, between the two halves and above a row.
SIDE, COLUMNS, GAP, MIDDLE, TITLE = 96, 6, 6, 30, 22
Colour = tuple[int, int, int]
HOUSE: list[tuple[str, tuple[float, ...], Colour]] = [
    ("ellipse", (0.68, 0.06, 0.9, 0.28), (250, 205, 70)),
    ("rectangle", (0, 0.7, 1, 1), (95, 150, 70)),
    ("rectangle", (0.12, 0.45, 0.55, 0.82), (190, 110, 85)),
    ("polygon", (0.06, 0.46, 0.335, 0.18, 0.61, 0.46), (110, 60, 60)),
    ("rectangle", (0.2, 0.54, 0.32, 0.66), (240, 235, 200)),
    ("rectangle", (0.38, 0.58, 0.49, 0.82), (80, 55, 45)),
    ("rectangle", (0.76, 0.55, 0.81, 0.8), (100, 70, 45)),
    ("ellipse", (0.64, 0.32, 0.93, 0.62), (45, 110, 60)),
]
#: What the house is mixed with.
BOAT: list[tuple[str, tuple[float, ...], Colour]] = [
    ("rectangle", (0, 0.66, 1, 1), (60, 95, 150)),
    ("polygon", (0.14, 0.62, 0.86, 0.62, 0.72, 0.8, 0.28, 0.8), (235, 235, 235)),
    ("polygon", (0.47, 0.14, 0.47, 0.56, 0.18, 0.56), (215, 70, 60)),
    ("polygon", (0.52, 0.22, 0.52, 0.56, 0.78, 0.56), (240, 240, 225)),
]
#: Makes images ``[N, 3, SIDE, SIDE]`` of as many, as torchvision does.
Reference = Callable[[Tensor], Tensor]


def drawn(side: int, sky: Colour, shapes: Iterable[tuple[str, tuple[float, ...], Colour]]) -> Image.Image:
    """A drawn picture, so that what happens to it can be seen; places are shares of its side."""
    large = 4 * side
    image = Image.new("RGB", (large, large), sky)
    pen = ImageDraw.Draw(image)
    for name, shape, colour in shapes:
        getattr(pen, name)([large * place for place in shape], fill=colour)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def one_by_one(transform: Callable[[Image.Image], Image.Image]) -> Reference:
    """A transform of torchvision that takes Pillow's images."""
    from torchvision.transforms import functional

    return lambda images: torch.stack(
        [functional.pil_to_tensor(transform(functional.to_pil_image(image))) for image in images]
    )


def mixed(transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Reference:
    """A transform of torchvision that mixes the images of a batch, each time anew."""

    def mix(images: Tensor) -> Tensor:
        # In a batch all pairs get the same share, and each image its neighbour.
        pairs = zip(images, images.roll(1, 0), strict=True)
        labels = torch.zeros(2, dtype=torch.int64)
        return torch.stack([transform(torch.stack(pair).float(), labels)[0][0] for pair in pairs])

    return mix


def rows() -> dict[str, tuple[AugmentConfig, Reference]]:
    """What each row shows: keys of distrain, and the same of torchvision."""
    from torchvision import transforms
    from torchvision.transforms import autoaugment, v2

    whole: dict[str, Any] = {"flip": False, "crop_padding": 0, "cutout": 0}
    cifar10, imagenet = autoaugment.AutoAugmentPolicy.CIFAR10, autoaugment.AutoAugmentPolicy.IMAGENET
    erasing = transforms.RandomErasing(1.0)
    return {
        "random-resized crop": (
            AugmentConfig(**whole, random_resized_crop=RandomResizedCropConfig([0.2, 1.0])),
            one_by_one(transforms.RandomResizedCrop(SIDE, (0.2, 1.0))),
        ),
        "colour jitter": (
            AugmentConfig(**whole, color_jitter=ColorJitterConfig(0.4, 0.4, 0.4, 0.1)),
            one_by_one(transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        ),
        "RandAugment": (
            AugmentConfig(**whole, auto_augment=AutoAugmentConfig("randaugment")),
            one_by_one(autoaugment.RandAugment()),
        ),
        "TrivialAugment": (
            AugmentConfig(**whole, auto_augment=AutoAugmentConfig("trivialaugment")),
            one_by_one(autoaugment.TrivialAugmentWide()),
        ),
        "AutoAugment, CIFAR-10": (
            AugmentConfig(**whole, auto_augment=AutoAugmentConfig("autoaugment_cifar10")),
            one_by_one(autoaugment.AutoAugment(cifar10)),
        ),
        "AutoAugment, ImageNet": (
            AugmentConfig(**whole, auto_augment=AutoAugmentConfig("autoaugment_imagenet")),
            one_by_one(autoaugment.AutoAugment(imagenet)),
        ),
        "random erasing": (
            AugmentConfig(**whole, random_erasing=RandomErasingConfig(1.0)),
            lambda images: torch.stack([erasing(image) for image in images]),
        ),
        "mixup": (
            AugmentConfig(**whole, mixing=MixingConfig(mixup_alpha=1.0, mode="pair")),
            mixed(v2.MixUp(alpha=1.0, num_classes=2)),
        ),
        "CutMix": (
            AugmentConfig(**whole, mixing=MixingConfig(cutmix_alpha=1.0, mode="pair")),
            mixed(v2.CutMix(alpha=1.0, num_classes=2)),
        ),
    }


def augmented(config: AugmentConfig, images: Tensor) -> Tensor:
    """What distrain makes of a batch, in the range of its pixels."""
    loader = Loader(
        Images(images, torch.arange(len(images)) % 2),
        batch_size=len(images),
        shard=(0, 1),
        # Without normalisation, so that an erased box is black, as torchvision's is here.
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
        seed=1,
        augment=config,
        spec=DataSpec(3, SIDE, SIDE, ("house", "boat")),
    )
    return 255 * next(loader.epoch(0)).inputs


def picture(path: Path, image: Path | None) -> None:
    """Draws augmented images of distrain and of torchvision in rows, side by side."""
    from torchvision.transforms import functional

    house = Image.open(image).convert("RGB").resize((SIDE, SIDE)) if image else drawn(SIDE, (135, 190, 235), HOUSE)
    boat = drawn(SIDE, (245, 215, 170), BOAT)
    torch.manual_seed(0)
    step, wanted = SIDE + GAP, rows()
    half = COLUMNS * step + MIDDLE
    sheet = Image.new("RGB", (half + COLUMNS * step, len(wanted) * (step + TITLE) + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for text, left in (("distrain", 0), ("torchvision", half)):
        pen.text((left + COLUMNS * step // 2, 4), text, fill="black", anchor="ma", font_size=14)
    for line, (name, (config, reference)) in enumerate(wanted.items()):
        shown = [house, boat if config.mixing.active else house] * (COLUMNS // 2)
        images = torch.stack([functional.pil_to_tensor(each) for each in shown])
        top = line * (step + TITLE) + 2 * TITLE
        pen.text((0, top - TITLE + 5), name, fill="black", font_size=13)
        for left, found in ((0, augmented(config, images)), (half, reference(images))):
            for place, pixels in enumerate(found.round().clamp(0, 255).to(torch.uint8)):
                sheet.paste(functional.to_pil_image(pixels), (left + place * step, top))
    sheet.save(path, optimize=True)


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--image", type=Path, help="picture to augment; by default a drawn one")
    options = parser.parse_args()
    picture(options.path, options.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
