"""A tree of image files with one folder per class."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.schema import DataConfig, setting
from distrain.data.base import (
    DataSource,
    DataSpec,
    Images,
    Splits,
    assemble,
    check_shared_keys,
    hold_out_test,
    refusing_unreadable,
)
from distrain.data.build_folder import is_build_folder
from distrain.data.image_cache import CacheSpec, ImageCache, open_or_build
from distrain.data.image_tree import ImageTree, Listing
from distrain.errors import ConfigError
from distrain.files.user_cache import user_cache_folder

log = logging.getLogger(__name__)
_CACHE = ".distrain-cache"


@dataclass
class ImageFolderConfig(DataConfig):
    """Keys of ``data=image_folder``."""

    height: int = setting("Height of each image after resizing, in pixels.", at_least=1)
    width: int = setting("Width of each image after resizing, in pixels.", at_least=1)
    channels: int = setting("3: RGB, 1: greyscale.", choices=(1, 3))
    test_fraction: float = setting("Share of the images used for testing if there is no test folder.", above=0, below=1)
    on_error: str = setting(
        "If an image can't be decoded: stop ends the run, skip leaves it out.", choices=("stop", "skip")
    )
    cache: str | None = setting(
        "Folder for decoded images; null: .distrain-cache in root, else in the user's cache or among temporary files.",
        path=True,
    )
    workers: int | None = setting("Decoding processes; null: one per CPU core.", at_least=1)


@register("data", "image_folder", ImageFolderConfig)
class ImageFolder(DataSource):
    """``root/{train,test[,val]}/<class>/**``, or ``root/<class>/**`` with test images selected by ``split_seed``.

    See :class:`distrain.data.image_tree.ImageTree`.
    """

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"cache", "workers"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, root)
        # A cache that was made from another root is of no use, and a saved run must not say where to write a new one.
        if root is not None or config.cache is None or not is_build_folder(Path(config.cache)):
            changes["cache"] = None
        return changes

    def __init__(self, config: ImageFolderConfig) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, "needs the folder that contains the images")
        self._root = Path(config.root)

    @functools.cached_property
    def _tree(self) -> ImageTree:
        # Looked at once, since what is ignored is said then.
        with refusing_unreadable(self._root):
            return ImageTree(self._root)

    def describe(self) -> DataSpec:
        """Returns the configured size and one class per folder, without opening any file.

        Raises:
            ConfigError: The folder can't be read, there are fewer than two classes, or the test or validation images
                have a class that the training images lack.
        """
        c = self._config
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, tuple(self._tree.classes)))

    def load(self) -> Splits:
        """Opens the cache of decoded images; decodes the files first if it doesn't exist.

        Raises:
            ConfigError: A class has no images, an image can't be decoded and may not be skipped, or the cache can't be
                written.
        """
        c, spec = self._config, self.describe()
        with refusing_unreadable(self._root):
            listing = self._tree.list_images()
        recipe = CacheSpec(self._root, listing.files, c.channels, c.height, c.width, c.on_error == "skip")
        cache = open_or_build(recipe, self._cache_folder(), c.workers)
        if cache.broken:
            log.warning("skipped %d of %d images that can't be decoded", len(cache.broken), len(listing.files))
        everything = self._images(cache, listing)
        notes = [listing.summary(len(spec.classes)), *_too_small(listing, spec)]
        rows = {part: _without(indices, cache.broken) for part, indices in listing.parts.items()}
        if "test" not in rows:
            keep, test = hold_out_test(len(rows["train"]), c.test_fraction, c.split_seed)
            rows["train"], rows["test"] = rows["train"][keep], rows["train"][test]
        moments = cache.moments.index_select(0, rows["train"])
        val = everything.subset(rows["val"]) if "val" in rows else None
        train, test_images = everything.subset(rows["train"]), everything.subset(rows["test"])
        splits = assemble(c, spec, train, test_images, val=val, moments=moments)
        return dataclasses.replace(splits, notes=tuple(notes))

    def _images(self, cache: ImageCache, listing: Listing) -> Images:
        labels = torch.tensor(listing.labels, dtype=torch.int64)
        streamed = cache.images.nbytes > self._config.memory_limit_mb * 2**20
        return Images(cache.images, labels, torch.arange(len(labels)) if streamed else None)

    def _cache_folder(self) -> Path:
        if self._config.cache is not None:
            return Path(self._config.cache)
        in_root = self._root / _CACHE
        if os.access(in_root if in_root.exists() else self._root, os.W_OK):
            return in_root
        try:
            return user_cache_folder()
        except OSError as error:
            raise ConfigError("data.cache", None, f"{error}; name another folder") from error


def _without(indices: list[int], broken: tuple[int, ...]) -> Tensor:
    excluded = set(broken)
    return torch.tensor([index for index in indices if index not in excluded], dtype=torch.int64)


def _too_small(listing: Listing, spec: DataSpec) -> list[str]:
    """Names the classes that have fewer images than there are parts to be taken out of them."""
    parts = 3 - ("test" in listing.parts) - ("val" in listing.parts)
    counts = Counter(listing.labels[index] for index in listing.parts["train"])
    small = [f"{spec.classes[label]} ({count})" for label, count in sorted(counts.items()) if count < parts]
    if parts == 1 or not small:
        return []
    return [
        f"classes with too few images to be in every part: {', '.join(small[:10])}{', …' if len(small) > 10 else ''}"
    ]
