"""Augmentations that users wrote or took from a library: of a batch, or of an image in worker processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config import user_code
from distrain.config.augment import TransformConfig
from distrain.config.registry import locate
from distrain.data.base import DataSpec, Images, Split
from distrain.data.batch import Targets
from distrain.data.items import Items
from distrain.data.reading import ItemReader
from distrain.data.sampler import Blocks
from distrain.data.workers import ItemWorkers
from distrain.errors import ConfigError, described

BatchTransform = Callable[[Tensor, Tensor], Tensor]

_BATCH, _IMAGE = "data.augment.batch_transform", "data.augment.image_transform"
#: Images of a trial; they are tried together, and in parts of 1 and 3.
_TRIED, _PART = 4, 1


def batch_transform(config: TransformConfig, spec: DataSpec) -> BatchTransform:
    """The configured transform of batches, after a trial.

    Args:
        config: Names it.
        spec: What it is given: images [n, C, H, W] of this size, and int64 [n], 64 random bits for each.

    Raises:
        ConfigError: There is no such transform, it fails, or an image's result depends on other images.
    """
    path = config._target_
    assert path is not None
    target = locate(f"{_BATCH}._target_", path)
    if isinstance(target, type):
        user_code.check_arguments(f"{_BATCH}.kwargs", config.kwargs, path, target, config.kwargs)
        transform = user_code.build(f"{_BATCH}._target_", path, lambda: target(**config.kwargs))
    else:
        user_code.check_arguments(f"{_BATCH}.kwargs", config.kwargs, path, target, config.kwargs, positional=2)

        def transform(images: Tensor, seeds: Tensor) -> Tensor:
            result: Tensor = target(images, seeds, **config.kwargs)
            return result

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_TRIED, spec.channels, spec.height, spec.width), generator=generator)
    images = images.to(torch.uint8 if spec.dtype == "uint8" else torch.float32)
    seeds = torch.randint(-(2**62), 2**62, (_TRIED,), generator=generator)
    try:
        together = transform(images.clone(), seeds)
        apart = [transform(images[part].clone(), seeds[part]) for part in (slice(_PART), slice(_PART, None))]
    except Exception as error:  # a user's transform may raise anything
        raise ConfigError(f"{_BATCH}._target_", path, f"fails {described(error)}") from error
    for result, given in ((together, images), (apart[0], images[:_PART])):
        if not isinstance(result, Tensor) or result.shape != given.shape or result.dtype != given.dtype:
            what = f"{list(result.shape)} of {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            problem = f"makes {what} of {list(given.shape)} of {given.dtype}; shape and type must stay"
            raise ConfigError(f"{_BATCH}._target_", path, problem)
    if not together.equal(torch.cat(apart)):
        problem = "makes other images of a batch than of its parts; its random numbers must come from each image's seed"
        raise ConfigError(f"{_BATCH}._target_", path, problem)
    return transform  # type: ignore[no-any-return]


def image_transform(config: TransformConfig) -> Callable[[Tensor], Tensor]:
    """The configured transform of an image [C, H, W]; its random numbers are those of torch, NumPy and Python.

    One of albumentations gets an array [H, W, C], and a seed.

    Raises:
        ConfigError: There is no such transform.
    """
    path = config._target_
    assert path is not None
    target = locate(f"{_IMAGE}._target_", path)
    user_code.check_arguments(f"{_IMAGE}.kwargs", config.kwargs, path, target, config.kwargs)
    transform = user_code.build(f"{_IMAGE}._target_", path, lambda: target(**config.kwargs))
    if not callable(transform):
        raise ConfigError(f"{_IMAGE}._target_", path, f"makes a {type(transform).__name__}, which can't be called")
    if any(base.__module__.startswith("albumentations") for base in type(transform).__mro__):
        return lambda image: _albumented(transform, image)
    return lambda image: _as_image(transform(image))


def _albumented(transform: Any, image: Tensor) -> Tensor:
    if hasattr(transform, "set_random_seed"):
        # It draws from a generator of its own.
        transform.set_random_seed(int(torch.randint(2**31, ())))
    return _as_image(transform(image=image.permute(1, 2, 0).numpy())["image"])


def _as_image(result: Any) -> Tensor:
    # Imported only here, since it imports Pillow, which a run without such a transform may not need.
    from distrain.data.sample_formats import image_of

    return image_of(result)


@dataclass
class TransformedReader(ItemReader):
    """Transforms the images that another reader reads; each process makes the transform for itself.

    Attributes:
        reader: The other reader.
        config: Names the transform.
    """

    reader: ItemReader
    config: TransformConfig
    _transform: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transform": None}

    @override
    def __len__(self) -> int:
        return len(self.reader)

    @override
    def __getitem__(self, row: int) -> tuple[Tensor, Targets | None]:
        if self._transform is None:
            self._transform = image_transform(self.config)
        image, target = self.reader[row]
        return self._transform(image), target

    @override
    def blocks(self) -> Blocks | None:
        return self.reader.blocks()

    @override
    def name(self, row: int) -> str:
        return self.reader.name(row)


@dataclass
class _FromMemory(ItemReader):
    """Reads images in memory, which worker processes share."""

    images: Tensor

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, row: int) -> tuple[Tensor, None]:
        return self.images[row].clone(), None

    @override
    def name(self, row: int) -> str:
        return f"train[{row}]"


def transformed(config: TransformConfig, split: Split, spec: DataSpec, workers: int | None) -> Items:
    """The samples of a split with transformed images, made by worker processes.

    Args:
        config: Names the transform.
        split: The samples.
        spec: What is known of them.
        workers: Number of processes; ``None``: as for :class:`distrain.data.workers.ItemWorkers`.

    Raises:
        ConfigError: The images lie in a memory map, which worker processes would copy.
    """
    if isinstance(split, Items):
        source = dataclasses.replace(split.source, reader=TransformedReader(split.source.reader, config))
        return dataclasses.replace(split, source=source, reader=split.workers.add(source))
    assert isinstance(split, Images)
    if split.rows is not None:
        problem = "needs the images in memory or encoded: raise data.memory_limit_mb, or set data.cache_format=encoded"
        raise ConfigError(f"{_IMAGE}._target_", config._target_, problem)
    channels, height, width = split.shape
    stored = dataclasses.replace(spec, channels=channels, height=height, width=width)
    reader = TransformedReader(_FromMemory(split.images), config)
    return Items.of(reader, stored, ItemWorkers(workers), split.targets)
