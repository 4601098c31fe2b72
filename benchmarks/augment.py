"""Augmentation: distrain's batches against torchvision's transforms: distributions, pixels and cost.

Needs torchvision (``pip install torchvision``)::

    python benchmarks/augment.py compare              # draws and pixels
    python benchmarks/augment.py cost                 # images per second of both in turn; on an idle machine

``compare`` draws 10,000 times from both and prints, for each augmentation, the range of what was drawn, or how often it
was drawn, and how probable so large a difference is (a test of Kolmogorov and Smirnov, or chi-square). It ends with
exit code 1 if one of them is improbable. ``benchmarks/augmentation_picture.py`` draws what both make of an image.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from distrain.config.augment import (
    AugmentConfig,
    AutoAugmentConfig,
    ColorJitterConfig,
    MixingConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)
from distrain.data.augmentation import erasing, mixing, operations, policies, resize
from distrain.data.augmentation.draws import Draws
from distrain.data.augmentation.operations import Operation
from distrain.data.base import DataSpec, Images
from distrain.data.loader import Loader

DRAWS = 10_000
HEIGHT, WIDTH = 48, 64
#: Below this probability of chance a difference is one. There are about 60 comparisons.
IMPROBABLE = 1e-4
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NAMES = {
    "Identity": Operation.IDENTITY,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
    "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS,
    "Color": Operation.COLOR,
    "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS,
    "Posterize": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
}


class Comparison:
    """Prints comparisons, and remembers whether one failed."""

    failed = False

    def numbers(self, name: str, ours: Iterable[float], theirs: Iterable[float]) -> None:
        """Compares two samples of numbers."""
        a, b = [np.sort(np.asarray(list(each), dtype=np.float64)) for each in (ours, theirs)]
        both = np.concatenate((a, b))
        gaps = np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
        gap = float(np.abs(gaps).max())
        effective = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
        probability = min(1.0, 2 * math.exp(-2 * (gap * effective) ** 2))
        first, second = [f"{each[0]:.3f} … {each.mean():.3f} … {each[-1]:.3f}" for each in (a, b)]
        self._print(name, first, second, probability)

    def counts(self, name: str, ours: Counter[Any], theirs: Counter[Any]) -> None:
        """Compares how often each of some values was drawn."""
        values = sorted(ours | theirs)
        a, b = [np.array([counts[value] for value in values], dtype=np.float64) for counts in (ours, theirs)]
        factor = math.sqrt(b.sum() / a.sum())
        chi = float(((a * factor - b / factor) ** 2 / (a + b)).sum())
        degrees = max(len(values) - 1, 1)
        # Wilson and Hilferty 1931.
        normal = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
        probability = 0.5 * math.erfc(normal / math.sqrt(2))
        first, second = [
            f"{len(+counts)} values, {min(counts.values())} to {max(counts.values())}" for counts in (ours, theirs)
        ]
        self._print(name, first, second, probability)

    def pixels(self, name: str, ours: Tensor, theirs: Tensor, *, most: int = 0, share: float = 0.0) -> None:
        """Compares pixels: the largest difference, and the share of pixels that differ."""
        difference = (ours.int() - theirs.int()).abs()
        worst, differing = int(difference.max()), float((difference > 0).double().mean())
        passed = worst <= most and differing <= share
        self.failed |= not passed
        print(f"{name:44} largest difference {worst}, {differing:.2%} of the values{'' if passed else '  DIFFERENT'}")

    def _print(self, name: str, ours: str, theirs: str, probability: float) -> None:
        passed = probability > IMPROBABLE
        self.failed |= not passed
        print(f"{name:44} {ours:34} {theirs:34} p = {probability:.3f}{'' if passed else '  DIFFERENT'}")


def draws(seed: int = 1) -> Draws:
    return Draws(seed, 0, torch.arange(DRAWS))


def photographs(count: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Smooth random pictures, uint8 [count, 3, height, width]."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 255
    return (images + 6 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def compare_boxes(report: Comparison) -> None:
    from torchvision import transforms

    image = torch.zeros(3, HEIGHT, WIDTH)
    crop = RandomResizedCropConfig([0.08, 1.0])
    boxes = resize.random_boxes(draws(), HEIGHT, WIDTH, [0.08, 1.0], crop.ratio)
    theirs = [transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
    for row, part in enumerate(("top", "left", "height", "width")):
        report.numbers(f"random-resized crop: {part}", boxes[row].tolist(), [box[row] for box in theirs])
    config = RandomErasingConfig(0.3)
    erased = erasing.boxes(config, draws(), HEIGHT, WIDTH)
    reference = transforms.RandomErasing(0.3)
    seen = [reference.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(DRAWS)]
    chosen = erased[2] > 0
    share = Counter(chosen.tolist())
    report.counts("random erasing: images", share, Counter((torch.rand(DRAWS) < 0.3).tolist()))
    for row, part in enumerate(("top", "left", "height", "width")):
        report.numbers(f"random erasing: {part}", erased[row][chosen].tolist(), [box[row] for box in seen])
    noise = erasing.Erasing("random").erase_(torch.zeros(2000, 3, 8, 8), _whole(2000, 8))
    report.numbers("random erasing: noise", noise.flatten()[:DRAWS].tolist(), torch.randn(DRAWS).tolist())


def _whole(count: int, side: int) -> Tensor:
    sizes = torch.tensor([0, 0, side, side]).view(4, 1).expand(4, count)
    return torch.cat((sizes, Draws(1, 0, torch.arange(count)).bits(0, 1)))


def compare_jitter(report: Comparison) -> None:
    from torchvision import transforms

    drawn, changes = policies.color_jitter(ColorJitterConfig(0.4, 0.5, 0.6, 0.1), draws())
    reference = transforms.ColorJitter(0.4, 0.5, 0.6, 0.1)
    limits = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    seen = [reference.get_params(*limits) for _ in range(DRAWS)]
    kinds = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.HUE)
    report.counts(
        "colour jitter: order",
        Counter(tuple(kinds.index(Operation(each)) for each in order) for order in drawn.T.tolist()),
        Counter(tuple(each[0].tolist()) for each in seen),
    )
    for index, kind in enumerate(kinds):
        base = 0.0 if kind == Operation.HUE else 1.0
        report.numbers(
            f"colour jitter: {kind.name.lower()}",
            (changes[drawn == kind] + base).tolist(),
            [float(each[index + 1]) for each in seen],
        )


def drawn_by_torchvision(transform: Any) -> list[list[tuple[int, float]]]:
    """The operations and magnitudes that one of torchvision's policies draws, in DRAWS calls."""
    from torchvision.transforms import autoaugment

    calls: list[list[tuple[int, float]]] = []

    def note(image: Any, name: str, magnitude: float, **_: Any) -> Any:
        calls[-1].append((int(NAMES[name]), round(float(magnitude), 4)))
        return image

    before, image = autoaugment._apply_op, Image.new("RGB", (WIDTH, HEIGHT))
    autoaugment._apply_op = note
    try:
        for _ in range(DRAWS):
            calls.append([])
            transform(image)
    finally:
        autoaugment._apply_op = before
    return calls


def compare_policies(report: Comparison) -> None:
    from torchvision.transforms import autoaugment

    references = {
        "randaugment": autoaugment.RandAugment(2, 9),
        "trivialaugment": autoaugment.TrivialAugmentWide(),
        "autoaugment_cifar10": autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.CIFAR10),
        "autoaugment_imagenet": autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.IMAGENET),
    }
    unsigned = {Operation.AUTOCONTRAST, Operation.EQUALIZE, Operation.INVERT, Operation.IDENTITY}
    for name, reference in references.items():
        drawn, sizes = policies.Policy(AutoAugmentConfig(name), HEIGHT, WIDTH).layers(draws())
        ours: list[list[tuple[int, float]]] = []
        for kinds, values in zip(drawn.T.tolist(), sizes.T.tolist(), strict=True):
            ours.append([(kind, round(value, 4)) for kind, value in zip(kinds, values, strict=True)])
        # An operation that is left out, or that has no magnitude, counts as one with the magnitude 0.
        flat = []
        for calls in (ours, drawn_by_torchvision(reference)):
            kept = [[(kind, 0.0 if kind in unsigned else size) for kind, size in each] for each in calls]
            flat.append([tuple(pair for pair in each if pair[0] != Operation.IDENTITY) for each in kept])
        for what, counted in (
            ("operations", [Counter(kind for each in calls for kind, _ in each) for calls in flat]),
            ("with magnitudes", [Counter(pair for each in calls for pair in each) for calls in flat]),
            ("per image", [Counter(len(each) for each in calls) for calls in flat]),
        ):
            report.counts(f"{name}: {what}", *counted)


def compare_mixing(report: Comparison) -> None:
    from torchvision.transforms import v2

    for alpha in (0.2, 1.0):
        ours = mixing.drawn(MixingConfig(mixup_alpha=alpha), draws(), HEIGHT, WIDTH)
        mixup = v2.MixUp(alpha=alpha, num_classes=2)
        theirs = [float(mixup.make_params([])["lam"]) for _ in range(DRAWS)]
        report.numbers(f"mixup, alpha {alpha}: share", ours[0].tolist(), theirs)
        ours = mixing.drawn(MixingConfig(cutmix_alpha=alpha), draws(), HEIGHT, WIDTH)
        cutmix = v2.CutMix(alpha=alpha, num_classes=2)
        image = torch.zeros(1, 3, HEIGHT, WIDTH)
        seen = [cutmix.make_params([image]) for _ in range(DRAWS)]
        report.numbers(f"cutmix, alpha {alpha}: share", ours[0].tolist(), [each["lam_adjusted"] for each in seen])
        for row, side in ((3, 0), (1, 1), (4, 2), (2, 3)):
            name = ("left", "top", "right", "bottom")[side]
            report.numbers(f"cutmix, alpha {alpha}: {name}", ours[row].tolist(), [each["box"][side] for each in seen])
    both = mixing.drawn(MixingConfig(0.2, 1.0, 0.8, 0.3), draws(), HEIGHT, WIDTH)
    cut, mixed = both[1] >= 0, both[0] < 1
    shares = [float(mixed.double().mean()), float((cut & mixed).sum() / mixed.sum())]
    print(f"{'mixing: mixed, and cut of these':44} {shares[0]:.3f}, {shares[1]:.3f} (asked for: 0.8, 0.3)")


def compare_pixels(report: Comparison) -> None:
    from torchvision.transforms import InterpolationMode, autoaugment, functional

    images = photographs(64)
    for name, operation in NAMES.items():
        sizes = policies._magnitudes(31, 0.99, (32.0, 32.0), 135.0, 0.99, 6)[operation][torch.arange(64) % 31]
        changed = operations.apply(images, torch.full((64,), operation), sizes)
        expected = [
            tensor(autoaugment._apply_op(pil(image), name, size, InterpolationMode.NEAREST, None))
            for image, size in zip(images, sizes.tolist(), strict=True)
        ]
        report.pixels(f"pixels: {name} (torchvision on Pillow)", changed, torch.stack(expected))
    turns = torch.linspace(-0.5, 0.5, 64, dtype=torch.float64)
    changed = operations.apply(images, torch.full((64,), Operation.HUE), turns)
    expected = [functional.adjust_hue(image, turn) for image, turn in zip(images, turns.tolist(), strict=True)]
    # torchvision cuts fractions off, which are rounded here.
    report.pixels("pixels: hue (torchvision on tensors)", changed, torch.stack(expected), most=1, share=0.7)
    boxes = resize.random_boxes(Draws(1, 0, torch.arange(64)), HEIGHT, WIDTH, [0.08, 1.0], [3 / 4, 4 / 3])
    for name, mode in (("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)):
        changed = resize.resize(images, boxes, 32, 32, name)
        pairs = list(zip(images, boxes.T.tolist(), strict=True))
        rows_first = [tensor(rows_resized_first(pil(image), box, name)) for image, box in pairs]
        report.pixels(
            f"pixels: crop, {name} (Pillow, rows first)", changed, torch.stack(rows_first), most=1, share=0.01
        )
        # For some boxes, higher than wide, Pillow 13 resizes the columns first, and the pixels in between are rounded.
        expected = [tensor(functional.resized_crop(pil(image), *box, [32, 32], mode)) for image, box in pairs]
        report.pixels(f"pixels: crop, {name} (torchvision)", changed, torch.stack(expected), most=2, share=0.06)


def rows_resized_first(image: Image.Image, box: list[int], interpolation: str) -> Image.Image:
    """A box of an image in 32x32, its rows resized before its columns."""
    resampling = Image.Resampling[interpolation.upper()]
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    return part.resize((32, height), resampling).resize((32, 32), resampling)


def compare() -> int:
    """Compares everything with torchvision."""
    torch.manual_seed(0)
    report = Comparison()
    print(f"{'':44} {'distrain: smallest … mean … largest':34} torchvision")
    for part in (compare_boxes, compare_jitter, compare_policies, compare_mixing, compare_pixels):
        part(report)
    return int(report.failed)


def recipe(policy: str) -> AugmentConfig:
    """The whole recipe whose cost is measured."""
    return AugmentConfig(
        flip=True,
        crop_padding=0,
        cutout=0,
        random_resized_crop=RandomResizedCropConfig([0.25, 1.0]),
        auto_augment=AutoAugmentConfig(policy),
        random_erasing=RandomErasingConfig(0.25),
        mixing=MixingConfig(0.2, 1.0),
    )


class Pictures(Dataset[Any]):
    """Images in memory with torchvision's transforms, as its recipes have them."""

    def __init__(self, images: Tensor, labels: Tensor, side: int, policy: str) -> None:
        from torchvision import transforms
        from torchvision.transforms import autoaugment

        chosen = autoaugment.RandAugment() if policy == "randaugment" else autoaugment.TrivialAugmentWide()
        self._images, self._labels = images.permute(0, 2, 3, 1).numpy(), labels
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(side, (0.25, 1.0)),
                transforms.RandomHorizontalFlip(),
                chosen,
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize(MEAN, STD),
                transforms.RandomErasing(0.25),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


class Mixed:
    """torchvision's collate function with its mixup and cutmix."""

    def __init__(self) -> None:
        from torchvision.transforms import v2

        self._mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=10), v2.CutMix(alpha=1.0, num_classes=10)])

    def __call__(self, samples: list[Any]) -> Any:
        """Makes a batch of samples, and mixes it."""
        return self._mix(*default_collate(samples))


def rate(batches: Iterable[Any], count: int) -> float:
    """Images per second of one epoch."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - start)


def cost(count: int, batch_size: int, rounds: int) -> int:
    """Prints images per second of both in turn; the ratio of the medians should be at least 3."""
    torch.set_num_threads(2)
    print(f"{count} images, batches of {batch_size}, {rounds} rounds; images per second, medians")
    print(f"{'recipe':28} {'distrain':>10} {'torchvision, 2 workers':>24} {'ratio':>7}   ratios of the rounds")
    lowest = math.inf
    for side, stored, policy in ((32, 32, "randaugment"), (32, 32, "trivialaugment"), (64, 72, "trivialaugment")):
        images, labels = photographs(count, stored, stored), torch.arange(count) % 10
        ours = Loader(
            Images(images, labels),
            batch_size=batch_size,
            shard=(0, 1),
            mean=MEAN,
            std=STD,
            device=torch.device("cpu"),
            dtype=torch.float32,
            memory_format=torch.contiguous_format,
            shuffle=True,
            augment=recipe(policy),
            spec=DataSpec(3, side, side, tuple("0123456789")),
        )
        theirs = DataLoader(
            Pictures(images, labels, side, policy),
            batch_size,
            shuffle=True,
            num_workers=2,
            persistent_workers=True,
            collate_fn=Mixed(),
        )
        own, other = [], []
        # The first round starts the workers, and is not counted.
        for epoch in range(rounds + 1):
            own.append(rate(ours.epoch(epoch), count))
            other.append(rate(theirs, count))
        ratios = [a / b for a, b in zip(own[1:], other[1:], strict=True)]
        ratio = statistics.median(ratios)
        lowest = min(lowest, ratio)
        each = " ".join(f"{value:.2f}" for value in ratios)
        medians = statistics.median(own[1:]), statistics.median(other[1:])
        print(
            f"{f'{side}x{side}, {policy}':28} {medians[0]:10.0f} {medians[1]:24.0f} {ratio:7.2f}   {each}", flush=True
        )
    return int(lowest < 3)


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compare")
    costs = commands.add_parser("cost")
    costs.add_argument("--count", type=int, default=5120)
    costs.add_argument("--batch-size", type=int, default=128)
    costs.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.command == "compare":
        return compare()
    return cost(options.count, options.batch_size, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
