"""Users' own augmentations: of a batch, and of an image in worker processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distrain.config.augment import AutoAugmentConfig, ColorJitterConfig, MixingConfig, TransformConfig
from distrain.data.augmentation import transforms
from distrain.data.augmentation.check import check_augmentation
from distrain.data.base import DataSpec
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from tests.data.helpers import augment, random_images
from tests.runs import check, small
from tests.strategies.helpers import ALONE

SPEC = DataSpec(3, 8, 6, tuple("abcde"))


def darker(images: Tensor, seeds: Tensor, most: int = 4) -> Tensor:
    return images // (1 + (seeds & 0x7FFF) % most).view(-1, 1, 1, 1).to(images.dtype)


def fails(images: Tensor, seeds: Tensor) -> Tensor:
    raise RuntimeError("no such colour")


def of_the_batch(images: Tensor, seeds: Tensor) -> Tensor:
    return images.flip(0)


def smaller(images: Tensor, seeds: Tensor) -> Tensor:
    return images[..., ::2]


class Noise:
    """A transform of an image that draws from all three global generators."""

    def __init__(self, most: int = 9) -> None:
        self.most = most

    def __call__(self, image: Tensor) -> Tensor:
        offset = int(torch.randint(self.most, ())) + np.random.randint(self.most)  # noqa: NPY002
        return image // 2 + offset


def loader(**changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "batch_size": 10,
        "shard": (0, 1),
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "memory_format": torch.contiguous_format,
        "shuffle": True,
    }
    return Loader(changes.pop("images", random_images(25)), **{**settings, **changes})


def test_a_transform_of_batches_sees_the_seed_of_each_image() -> None:
    own = augment(batch_transform=TransformConfig(f"{__name__}.darker", {"most": 3}))
    whole = [batch.inputs for batch in loader(augment=own).epoch(1)]
    halves = [[batch.inputs for batch in loader(augment=own, shard=(rank, 2)).epoch(1)] for rank in range(2)]
    assert all(torch.cat(parts).equal(batch) for batch, *parts in zip(whole, *halves, strict=True))
    plain = torch.cat([batch.inputs for batch in loader().epoch(1)])
    assert not torch.cat(whole).equal(plain)


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("fails", {}, r"\._target_=.*fails: fails \(RuntimeError: no such colour\)"),
        ("of_the_batch", {}, "makes other images of a batch than of its parts"),
        (
            "smaller",
            {},
            r"makes \[4, 3, 8, 3\] of torch.uint8 of \[4, 3, 8, 6\] of torch.uint8; shape and type must stay",
        ),
        ("darker", {"least": 1}, r"kwargs=.*unexpected keyword argument 'least'"),
        ("missing", {}, "_target_"),
    ],
)
def test_a_transform_of_batches_is_tried_before_it_is_trusted(name: str, kwargs: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        check_augmentation(augment(batch_transform=TransformConfig(f"{__name__}.{name}", kwargs)), SPEC)
    assert "\n" not in str(refused.value)


def test_a_transform_of_images_runs_in_worker_processes() -> None:
    config = TransformConfig("tests.data.augmentation.test_transforms.Noise", {"most": 5})
    images = random_images(25)
    split = transforms.transformed(config, images, SPEC, workers=1)
    here = transforms.transformed(config, images, SPEC, workers=0)
    try:
        made = torch.cat([batch.inputs for batch in loader(images=split).epoch(0)])
        alone = torch.cat([batch.inputs for batch in loader(images=here, shard=(1, 2)).epoch(0)])
    finally:
        split.close()
    plain = torch.cat([batch.inputs for batch in loader(images=images).epoch(0)])
    assert (made * 255 - plain * 255 // 2).amin((1, 2, 3)).round().unique().numel() > 3
    assert alone[:5].equal(made[5:10])


def test_albumentations_get_an_array_and_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Albumented, "__module__", "albumentations.core.composition")
    transform = transforms.image_transform(TransformConfig(f"{__name__}.Albumented"))
    image = random_images(1).images[0]
    torch.manual_seed(3)
    first = transform(image)
    assert first.shape == image.shape
    assert not first.equal(transform(image))
    torch.manual_seed(3)
    assert first.equal(transform(image))


class Albumented:
    """Is called as those of albumentations are."""

    def set_random_seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image: Any) -> dict[str, Any]:
        assert image.shape == (8, 6, 3)
        return {"image": image // 2 + self.generator.integers(99).astype(np.uint8)}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("data.augment.random_resized_crop.scale=[1,0.5]",), r"scale=\[1.0, 0.5\]: must be two numbers, the smaller"),
        (("task=multilabel", "data.target=labels", "loss=asymmetric", "data.augment.mixing.mixup_alpha=1"),
         "data.augment.mixing: loss=asymmetric takes no targets of mixed images; choices: loss=binary_cross_entropy"),
        (("task=segmentation", "data.target=mask", "data.augment.mixing.mixup_alpha=1"),
         "mixup_alpha=1.0: a pixel has one class"),
        (("task=regression", "data.target=numbers", "loss=huber", "data.augment.mixing.cutmix_alpha=1"),
         "cutmix_alpha=1.0: numbers don't follow from the area of a box"),
        (("loss=focal", "data.augment.mixing.mixup_alpha=1"), "loss=focal takes no targets of mixed images"),
        (("task=segmentation", "data.target=mask", f"data.augment.image_transform._target_={__name__}.Noise"),
         "would leave the masks as they are"),
        (("data.channels=4", "data.augment.auto_augment.policy=randaugment"), "is for images of 1 or 3 channels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(options: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        check(small(*options), ALONE)
    assert "\n" not in str(refused.value)


def test_colours_of_floating_point_images_are_refused() -> None:
    spec = DataSpec(3, 8, 6, ("a",), dtype="float")
    for config in (
        augment(color_jitter=ColorJitterConfig(hue=0.1)),
        augment(auto_augment=AutoAugmentConfig("trivialaugment")),
    ):
        with pytest.raises(ConfigError, match="these data are floating point"):
            check_augmentation(config, spec)
    check_augmentation(augment(mixing=MixingConfig(1.0)), spec)
