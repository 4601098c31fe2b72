"""A tree of JPEG and PNG files with one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.schema import DataConfig, setting
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, check_shared_keys, hold_out_test
from distrain.data.build_folder import is_build_folder
from distrain.data.decode import SUFFIXES
from distrain.data.image_cache import CacheSpec, ImageCache, ImageFile, open_or_build
from distrain.errors import ConfigError, config_error

log = logging.getLogger(__name__)
_CACHE = ".distrain-cache"
_TRAIN, _VAL, _TEST = "train", "val", "test"


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
        "Folder for decoded images; null: .distrain-cache in root, or the user's cache.", path=True
    )
    workers: int | None = setting("Decoding processes; null: one per CPU core.", at_least=1)


@dataclass(frozen=True)
class _Listing:
    """All image files, and the class of each; ``parts`` has the indices of train, val and test images."""

    files: list[ImageFile]
    labels: list[int]
    parts: dict[str, list[int]]


@register("data", "image_folder", ImageFolderConfig)
class ImageFolder(DataSource):
    """``root/{train,test[,val]}/<class>/*``, or ``root/<class>/*`` with test images selected by ``split_seed``.

    Classes are numbered in the order of their folders' names. Hidden files and other file types are ignored. Symbolic
    links to places outside of the root are not followed.
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

    def describe(self) -> DataSpec:
        """Returns the configured size and one class per folder, without opening any file.

        Raises:
            ConfigError: There is no such folder, there are fewer than two classes, or the test or validation images
                have a class that the training images lack.
        """
        c = self._config
        if not self._root.is_dir():
            raise ConfigError("data.root", c.root, "is not a folder")
        parts = self._parts()
        classes = _folders(self._root, parts[_TRAIN])
        if len(classes) < 2:
            raise ConfigError("data.root", c.root, f"needs a folder for each of two or more classes in {parts[_TRAIN]}")
        for folder in parts.values():
            if unknown := sorted(set(_folders(self._root, folder)) - set(classes)):
                raise ConfigError("data.root", c.root, f"{folder} has a class without training images: {unknown[0]}")
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, tuple(classes)))

    def load(self) -> Splits:
        """Opens the cache of decoded images; decodes the files first if it doesn't exist.

        Raises:
            ConfigError: A class has no images, an image can't be decoded and may not be skipped, or the cache can't be
                written.
        """
        c, spec = self._config, self.describe()
        listing = self._list(spec.classes)
        recipe = CacheSpec(self._root, listing.files, c.channels, c.height, c.width, c.on_error == "skip")
        cache = open_or_build(recipe, self._cache_folder(), c.workers)
        if cache.broken:
            log.warning("skipped %d of %d images that can't be decoded", len(cache.broken), len(listing.files))
        everything = self._images(cache, listing)
        rows = {part: _without(indices, cache.broken) for part, indices in listing.parts.items()}
        if _TEST not in rows:
            keep, test = hold_out_test(len(rows[_TRAIN]), c.test_fraction, c.split_seed)
            rows[_TRAIN], rows[_TEST] = rows[_TRAIN][keep], rows[_TRAIN][test]
        moments = cache.moments.index_select(0, rows[_TRAIN])
        val = everything.subset(rows[_VAL]) if _VAL in rows else None
        train, test_images = everything.subset(rows[_TRAIN]), everything.subset(rows[_TEST])
        return assemble(c, spec, train, test_images, val=val, moments=moments)

    def _images(self, cache: ImageCache, listing: _Listing) -> Images:
        labels = torch.tensor(listing.labels, dtype=torch.int64)
        streamed = cache.images.nbytes > self._config.memory_limit_mb * 2**20
        return Images(cache.images, labels, torch.arange(len(labels)) if streamed else None)

    def _parts(self) -> dict[str, str]:
        """The folder of train, val and test images, relative to the root; without val or test if there is none."""
        folders = {part: part for part in (_TRAIN, _VAL, _TEST) if (self._root / part).is_dir()}
        for part in folders:
            if not _is_inside(self._root, self._root / part):
                raise ConfigError("data.root", self._config.root, f"{part} is a symbolic link to outside of the folder")
        return folders if _TRAIN in folders else {_TRAIN: "."}

    def _list(self, classes: tuple[str, ...]) -> _Listing:
        listing = _Listing([], [], {})
        for part, folder in self._parts().items():
            start = len(listing.files)
            for label, name in enumerate(classes):
                files = list(_image_files(self._root, Path(folder, name)))
                listing.files.extend(files)
                listing.labels.extend([label] * len(files))
                if part == _TRAIN and not files:
                    raise ConfigError("data.root", self._config.root, f"{folder}/{name} has no JPEG or PNG files")
            listing.parts[part] = list(range(start, len(listing.files)))
        return listing

    def _cache_folder(self) -> Path:
        if self._config.cache is not None:
            return Path(self._config.cache)
        in_root = self._root / _CACHE
        if os.access(in_root if in_root.exists() else self._root, os.W_OK):
            return in_root
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrain"


def _folders(root: Path, part: str) -> list[str]:
    """Sorted names of the folders in ``root/part``; empty if that doesn't exist."""
    folder = root / part
    if not folder.is_dir():
        return []
    return [entry.name for entry in _entries(root, folder) if entry.is_dir()]


def _image_files(root: Path, folder: Path) -> Iterator[ImageFile]:
    """Yields the images of a class, sorted by name."""
    if not (root / folder).is_dir():
        return
    for entry in _entries(root, root / folder):
        if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            status = entry.stat()
            yield ImageFile(os.fspath(folder / entry.name), status.st_size, status.st_mtime_ns)


def _entries(root: Path, folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder, sorted by name, without hidden ones and links to outside of the root."""
    result, skipped_links = [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not _is_inside(root, Path(entry.path)):
                    skipped_links += 1
                else:
                    result.append(entry)
    except OSError as error:
        raise config_error("data.root", f"{folder} can't be read ({error.strerror})") from error
    if skipped_links:
        log.warning("ignoring %d symbolic links in %s to outside of %s", skipped_links, folder, root)
    return sorted(result, key=lambda entry: entry.name)


def _is_inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _without(indices: list[int], broken: tuple[int, ...]) -> Tensor:
    excluded = set(broken)
    return torch.tensor([index for index in indices if index not in excluded], dtype=torch.int64)
