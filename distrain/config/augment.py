"""Keys below ``data.augment``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distrain.config.setting import setting


@dataclass
class RandomResizedCropConfig:
    """A random part of each image, resized to the size of the model's input."""

    scale: list[float] | None = setting(
        "Smallest and largest area of the part, as shares of the image, such as [0.08, 1]; null: no such crop.",
        above=0,
        at_most=1,
        default=None,
    )
    ratio: list[float] = setting(
        "Smallest and largest ratio of the part's width to its height.", above=0, default_factory=lambda: [0.75, 4 / 3]
    )
    interpolation: str = setting(
        "How pixels between others are made.", choices=("nearest", "bilinear", "bicubic"), default="bilinear"
    )


@dataclass
class ColorJitterConfig:
    """Random changes of colour, in a random order."""

    brightness: float = setting(
        "Brightness is multiplied by 1 - this to 1 + this; 0: unchanged.", at_least=0, default=0.0
    )
    contrast: float = setting("The same for contrast.", at_least=0, default=0.0)
    saturation: float = setting("The same for saturation.", at_least=0, default=0.0)
    hue: float = setting("Hue turns by at most this share of a whole turn.", at_least=0, at_most=0.5, default=0.0)
    probability: float = setting("Share of the images that are changed.", at_least=0, at_most=1, default=1.0)

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return any((self.brightness, self.contrast, self.saturation, self.hue)) and self.probability > 0


@dataclass
class AutoAugmentConfig:
    """One or several operations on each image, drawn from a list: shears, rotations, contrast and others."""

    policy: str = setting(
        "Which operations: randaugment (arXiv 1909.13719), trivialaugment (wide; 2103.10158), or a policy of "
        "AutoAugment (1805.09501).",
        choices=("none", "randaugment", "trivialaugment", "autoaugment_cifar10", "autoaugment_imagenet"),
        default="none",
    )
    num_ops: int = setting("Operations on an image, with randaugment.", at_least=1, at_most=16, default=2)
    magnitude: int = setting("Strength of the operations, with randaugment.", at_least=0, at_most=30, default=9)


@dataclass
class RandomErasingConfig:
    """A random box of an image is hidden (Zhong et al. 2020, arXiv 1708.04896)."""

    probability: float = setting(
        "Share of the images in which a box is hidden; 0: none.", at_least=0, at_most=1, default=0.0
    )
    scale: list[float] = setting(
        "Smallest and largest area of the box, as shares of the image.",
        above=0,
        at_most=1,
        default_factory=lambda: [0.02, 0.33],
    )
    ratio: list[float] = setting(
        "Smallest and largest ratio of the box's height to its width.", above=0, default_factory=lambda: [0.3, 3.3]
    )
    value: str = setting(
        "What the box shows: zero (the mean) or random (noise), both after normalisation.",
        choices=("zero", "random"),
        default="zero",
    )


@dataclass
class MixingConfig:
    """Pairs of images of the global batch are mixed, and their targets likewise."""

    mixup_alpha: float = setting(
        "Mixup (arXiv 1710.09412): shares of the two images are drawn from Beta(alpha, alpha); 0: none.",
        at_least=0,
        default=0.0,
    )
    cutmix_alpha: float = setting(
        "CutMix (arXiv 1905.04899): the area of the other image's box, drawn in the same way; 0: none.",
        at_least=0,
        default=0.0,
    )
    probability: float = setting(
        "Share of what is drawn for (see mode) that is mixed.", at_least=0, at_most=1, default=1.0
    )
    switch_probability: float = setting(
        "With both: probability of cutmix instead of mixup.", at_least=0, at_most=1, default=0.5
    )
    mode: str = setting(
        "What the shares and boxes are drawn for: each batch, or each pair of images.",
        choices=("batch", "pair"),
        default="batch",
    )

    @property
    def active(self) -> bool:
        """Whether images are mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass
class TransformConfig:
    """A transform of the user's."""

    _target_: str | None = setting("Dotted path of a function or class; null: none.", default=None)
    kwargs: dict[str, Any] = setting("Its arguments.", default_factory=dict)


@dataclass
class AugmentConfig:
    """Augmentation of training images; the random draws depend only on (seed, epoch, sample index)."""

    flip: bool | str = setting(
        "Mirror horizontally with probability 1/2; alternating: random first, then mirrored every other epoch.",
        choices=(False, True, "alternating"),
    )
    crop_padding: int = setting(
        "Pad each side by this many pixels, then crop to the original size at a random place; 0: none.", at_least=0
    )
    crop_border: str = setting(
        "Padding: zeros (black) or reflect (the image mirrored at its edge).",
        choices=("zeros", "reflect"),
        default="zeros",
    )
    cutout: int = setting("Side in pixels of a square at a random place that is set to the mean; 0: none.", at_least=0)
    random_resized_crop: RandomResizedCropConfig = setting(
        "A random part of each image, resized.", default_factory=RandomResizedCropConfig
    )
    color_jitter: ColorJitterConfig = setting("Random changes of colour.", default_factory=ColorJitterConfig)
    auto_augment: AutoAugmentConfig = setting("Random operations from a list.", default_factory=AutoAugmentConfig)
    random_erasing: RandomErasingConfig = setting(
        "A random box of an image is hidden.", default_factory=RandomErasingConfig
    )
    mixing: MixingConfig = setting("Mixup and CutMix.", default_factory=MixingConfig)
    repeats: int = setting(
        "How often an image is seen in an epoch, each time augmented anew; an epoch shows 1/repeats of the images.",
        at_least=1,
        default=1,
        affects=("sample_order",),
    )
    batch_transform: TransformConfig = setting(
        "Your own augmentation of a batch of images.", default_factory=TransformConfig
    )
    image_transform: TransformConfig = setting(
        "Your own augmentation of an image, in worker processes.", default_factory=TransformConfig
    )
