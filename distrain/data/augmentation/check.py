"""Refuses augmentations that don't fit the images or each other."""

from __future__ import annotations

from distrain.config.augment import AugmentConfig
from distrain.data.augmentation import transforms
from distrain.data.base import DataSpec
from distrain.errors import ConfigError

_KEY = "data.augment"


def check_augmentation(config: AugmentConfig, spec: DataSpec) -> None:
    """Checks the keys of a training; imports and tries transforms of the user's.

    Raises:
        ConfigError: One line with the key, its value and the problem.
    """
    ranges = {
        "random_resized_crop.scale": config.random_resized_crop.scale,
        "random_resized_crop.ratio": config.random_resized_crop.ratio,
        "random_erasing.scale": config.random_erasing.scale,
        "random_erasing.ratio": config.random_erasing.ratio,
    }
    for name, limits in ranges.items():
        if limits is not None and (len(limits) != 2 or limits[0] > limits[1]):
            raise ConfigError(f"{_KEY}.{name}", limits, "must be two numbers, the smaller one first")
    colours = {
        "color_jitter": config.color_jitter.active,
        "auto_augment.policy": config.auto_augment.policy != "none",
    }
    for name, is_used in colours.items():
        if is_used and spec.dtype != "uint8":
            problem = "is for pixel values from 0 to 255, and these data are floating point"
            raise ConfigError(f"{_KEY}.{name}", _shown(config, name), problem)
        if is_used and spec.channels not in (1, 3):
            problem = f"is for images of 1 or 3 channels, and these have {spec.channels}"
            raise ConfigError(f"{_KEY}.{name}", _shown(config, name), problem)
    for name in ("batch_transform", "image_transform"):
        path = getattr(config, name)._target_
        if path is not None and spec.target == "mask":
            problem = "would leave the masks as they are; a data set of your own (data=custom) can change both"
            raise ConfigError(f"{_KEY}.{name}._target_", path, problem)
    if config.batch_transform._target_ is not None:
        transforms.batch_transform(config.batch_transform, spec)
    if config.image_transform._target_ is not None:
        transforms.image_transform(config.image_transform)


def _shown(config: AugmentConfig, name: str) -> object:
    return config.auto_augment.policy if name == "auto_augment.policy" else "on"
