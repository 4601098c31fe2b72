"""What data sets of encoded images share, however they find them: their keys, the cache, the splits."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import DataConfig
from distrain.config.setting import setting
from distrain.data.base import DataSource, DataSpec, Images, Split, Splits, assemble, hold_out_test
from distrain.data.batch import Targets
from distrain.data.build_folder import is_build_folder
from distrain.data.byte_ranges import ByteRanges
from distrain.data.encoded import EncodedReader
from distrain.data.image_cache import ENCODED, MOMENTS, CacheSpec, ImageCache, ImageFile, open_or_build
from distrain.data.items import Items
from distrain.data.workers import ItemWorkers
from distrain.errors import ConfigError
from distrain.files.user_cache import user_cache_folder

log = logging.getLogger(__name__)
_CACHE = ".distrain-cache"
#: Most classes that a line names.
_NAMED = 10


@dataclass
class DecodedImagesConfig(DataConfig):
    """Keys of every data set whose images are encoded, as JPEG or PNG for example."""

    height: int = setting("Height of each image after resizing, in pixels.", at_least=1)
    width: int = setting("Width of each image after resizing, in pixels.", at_least=1)
    channels: int = setting("3: RGB, 1: greyscale.", choices=(1, 3))
    cache_scale: float = setting(
        "Images are kept this many times as high and wide as height and width; augment.random_resized_crop cuts its "
        "parts out of them, and evaluation resizes them.",
        at_least=1,
        at_most=16,
        default=1.0,
    )
    test_fraction: float = setting(
        "Share of the images used for testing if none are set apart for it.", above=0, below=1
    )
    on_error: str = setting(
        "If an image can't be decoded: stop ends the run, skip leaves it out.", choices=("stop", "skip")
    )
    cache: str | None = setting(
        "Folder for the cache; null: .distrain-cache beside them, else in the user's cache or among temporary files.",
        path=True,
    )
    workers: int | None = setting(
        "Decoding processes; null: one per CPU core. Images that stay encoded are decoded by this many processes of "
        "each rank (null: its share of the cores, at most 8), or by the rank itself (0).",
        at_least=0,
    )


@dataclass
class ImageFilesConfig(DecodedImagesConfig):
    """Keys of every data set of image files."""

    cache_format: str = setting(
        "What the cache holds: pixels, which are ready to use; or encoded images, which take less space and are "
        "decoded by worker processes in every epoch. Both train the same.",
        choices=("pixels", "encoded"),
        default="pixels",
    )


def stored_spec(config: DecodedImagesConfig, spec: DataSpec) -> DataSpec:
    """What is known of images as they are kept, which may be larger than the model's input, ``spec``."""
    height, width = (round(side * config.cache_scale) for side in (config.height, config.width))
    return dataclasses.replace(spec, height=height, width=width)


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, and what is to be learned of each.

    Attributes:
        root: Folder of the files.
        files: The image files.
        targets: Targets of the images, in the same order; see :attr:`distrain.data.base.DataSpec.target`.
        parts: Indices of the images of each part: ``train``, and ``val`` and ``test`` if these are set apart.
        pieces: Where in the files the images lie; ``None`` if each file is an image.
        window: Number of files to read from at a time, if they hold many images each; ``None``: any.
    """

    root: Path
    files: Sequence[ImageFile]
    targets: Targets
    parts: Mapping[str, Sequence[int]]
    pieces: ByteRanges | None = None
    window: int | None = None


class ImageFilesSource(DataSource):
    """A data set of image files, whose configuration is an :class:`ImageFilesConfig`."""

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"cache", "cache_format", "workers"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, root)
        # A cache that was made from another root is of no use, and a saved run must not say where to write a new one.
        if root is not None or config.cache is None or not is_build_folder(Path(config.cache)):
            changes["cache"] = None
        return changes


def load_splits(config: DecodedImagesConfig, spec: DataSpec, labelled: LabelledFiles) -> Splits:
    """Opens the cache of the images, and makes it first if it doesn't exist; then makes the splits.

    Raises:
        ConfigError: An image can't be decoded and may not be skipped, the cache can't be written, or no images are left
            for a part.
    """
    stored = stored_spec(config, spec)
    cache = _open_cache(config, stored, labelled)
    if cache.broken:
        log.warning("skipped %d of %d images that can't be decoded", len(cache.broken), len(cache))
    everything: Split
    if cache.images is None:
        assert cache.encoded is not None
        reader = EncodedReader(cache.encoded, stored, labelled.window)
        everything = Items.of(reader, stored, ItemWorkers(config.workers, config.prefetch), labelled.targets)
    else:
        streamed = cache.images.nbytes > config.memory_limit_mb * 2**20
        everything = Images(cache.images, labelled.targets, torch.arange(len(cache)) if streamed else None)
    rows = {part: _without(indices, cache.broken) for part, indices in labelled.parts.items()}
    if "test" not in rows:
        keep, test = hold_out_test(len(rows["train"]), config.test_fraction, config.split_seed)
        rows["train"], rows["test"] = rows["train"][keep], rows["train"][test]
    moments = None if cache.moments is None else cache.moments.index_select(0, rows["train"])
    val = everything.subset(rows["val"]) if "val" in rows else None
    train, test_images = everything.subset(rows["train"]), everything.subset(rows["test"])
    return assemble(config, spec, train, test_images, val=val, moments=moments)


def _open_cache(config: DecodedImagesConfig, stored: DataSpec, labelled: LabelledFiles) -> ImageCache:
    keeps = config.cache_format if isinstance(config, ImageFilesConfig) else ENCODED
    skips = config.on_error == "skip"
    if labelled.pieces is not None and keeps == ENCODED:
        if not skips and config.mean is not None and config.std is not None:
            # Nothing needs to be known of the images before they are read.
            return ImageCache(None, labelled.pieces, None, ())
        keeps = MOMENTS
    recipe = CacheSpec(
        labelled.root,
        labelled.files,
        config.channels,
        stored.height,
        stored.width,
        skips,
        keeps,
        labelled.pieces,
    )
    return open_or_build(recipe, cache_folder(config, labelled.root), config.workers)


def cache_folder(config: DecodedImagesConfig, root: Path) -> Path:
    """The folder that holds the caches of a data set.

    Args:
        config: May name it.
        root: Folder of the data set.

    Raises:
        ConfigError: There is no folder to write to.
    """
    if config.cache is not None:
        return Path(config.cache)
    in_root = root / _CACHE
    if os.access(in_root if in_root.exists() else root, os.W_OK):
        return in_root
    try:
        return user_cache_folder()
    except OSError as error:
        raise ConfigError("data.cache", None, f"{error}; name another folder") from error


def _without(indices: Sequence[int], broken: tuple[int, ...]) -> Tensor:
    excluded = set(broken)
    return torch.tensor([index for index in indices if index not in excluded], dtype=torch.int64)


def classes_too_small(classes: Sequence[str], labels: Tensor, parts: Mapping[str, Sequence[int]]) -> list[str]:
    """A line that names the classes with fewer images than there are parts to be taken out of them, if there are any.

    Args:
        classes: Names of the classes.
        labels: Class of each image.
        parts: Indices of the images of each part.
    """
    needed = 3 - ("test" in parts) - ("val" in parts)
    counts = torch.bincount(labels[torch.tensor(parts["train"], dtype=torch.int64)], minlength=len(classes)).tolist()
    small = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if 0 < count < needed]
    if needed == 1 or not small:
        return []
    more = ", …" if len(small) > _NAMED else ""
    return [f"classes with too few images to be in every part: {', '.join(small[:_NAMED])}{more}"]
