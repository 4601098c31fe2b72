"""A tree of JPEG and PNG files, one folder a class."""

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
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, checked, hold_out_test
from distrain.data.build_folder import is_build_folder
from distrain.data.decode import SUFFIXES
from distrain.data.image_cache import CacheSpec, ImageCache, ImageFile, open_or_build
from distrain.errors import ConfigError, missing

_log = logging.getLogger(__name__)
_CACHE = ".distrain-cache"
_TRAIN, _VAL, _TEST = "train", "val", "test"


@dataclass
class ImageFolderConfig(DataConfig):
    """How files become images."""

    height: int = setting("Rows each image is brought to.", at_least=1)
    width: int = setting("Columns each image is brought to.", at_least=1)
    channels: int = setting("3: RGB, 1: grey.", choices=(1, 3))
    test_fraction: float = setting("Share of the images for testing where there is no test folder.", above=0, below=1)
    on_error: str = setting("What a broken image does: end the run, or be left out.", choices=("stop", "skip"))
    cache: str | None = setting("Folder for decoded images; null: .distrain-cache in root, else in the user's cache.")
    workers: int | None = setting("Processes that decode; null: one a core.", at_least=1)


@dataclass(frozen=True)
class _Listing:
    files: list[ImageFile]
    labels: list[int]
    parts: dict[str, list[int]]  # which of the files are train, val and test


@register("data", "image_folder", ImageFolderConfig)
class ImageFolder(DataSource):
    """``root/{train,test[,val]}/<class>/*``, or ``root/<class>/*`` with test images chosen by ``split_seed``.

    Class folders are taken in the order of their names. Hidden files and other types are ignored, and symbolic links
    that leave the root are not followed.
    """

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"cache", "workers"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, root)
        # A cache that was made from another root is of no use, and a saved run must not say where to write a new one.
        if root is not None or config.cache is None or not is_build_folder(Path(config.cache).expanduser()):
            changes["cache"] = None
        return changes

    def __init__(self, config: ImageFolderConfig) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, "needs the folder that holds the images")
        self._root = Path(config.root).expanduser()

    def describe(self) -> DataSpec:
        """The configured size, and a class for each folder; no file is opened.

        Raises:
            ConfigError: No such folder, fewer than two classes, or a test class that training doesn't have.
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
                raise ConfigError("data.root", c.root, f"{folder} has a class that training lacks: {unknown[0]}")
        return checked(c, DataSpec(c.channels, c.height, c.width, tuple(classes)))

    def load(self) -> Splits:
        """Decodes the files into a cache, or opens the one that is there.

        Raises:
            ConfigError: A class without images, a broken image that may not be skipped, a cache that can't be written.
        """
        c, spec = self._config, self.describe()
        listing = self._list(spec.classes)
        recipe = CacheSpec(self._root, listing.files, c.channels, c.height, c.width, c.on_error == "skip")
        cache = open_or_build(recipe, self._cache_folder(), c.workers)
        if cache.broken:
            _log.warning("left out %d of %d images that can't be decoded", len(cache.broken), len(listing.files))
        everything = self._images(cache, listing)
        rows = {part: _without(positions, cache.broken) for part, positions in listing.parts.items()}
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
        """The folders of train, val and test below the root, as far as there are any."""
        found = {part: part for part in (_TRAIN, _VAL, _TEST) if (self._root / part).is_dir()}
        for part in found:
            if not _inside(self._root, self._root / part):
                raise ConfigError("data.root", self._config.root, f"{part} is a symbolic link that leaves the folder")
        return found if _TRAIN in found else {_TRAIN: "."}

    def _list(self, classes: tuple[str, ...]) -> _Listing:
        listing = _Listing([], [], {})
        for part, folder in self._parts().items():
            start = len(listing.files)
            for label, name in enumerate(classes):
                before = len(listing.files)
                listing.files.extend(_image_files(self._root, Path(folder, name)))
                listing.labels.extend([label] * (len(listing.files) - before))
                if part == _TRAIN and len(listing.files) == before:
                    raise ConfigError("data.root", self._config.root, f"{folder}/{name} has no JPEG or PNG files")
            listing.parts[part] = list(range(start, len(listing.files)))
        return listing

    def _cache_folder(self) -> Path:
        if self._config.cache is not None:
            return Path(self._config.cache).expanduser()
        inside = self._root / _CACHE
        if os.access(inside if inside.exists() else self._root, os.W_OK):
            return inside
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrain"


def _folders(root: Path, part: str) -> list[str]:
    folder = root / part
    if not folder.is_dir():
        return []
    return [entry.name for entry in _entries(root, folder) if entry.is_dir()]


def _image_files(root: Path, folder: Path) -> Iterator[ImageFile]:
    """The images of a class, in the order of their names."""
    if not (root / folder).is_dir():
        return
    for entry in _entries(root, root / folder):
        if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            status = entry.stat()
            yield ImageFile(os.fspath(folder / entry.name), status.st_size, status.st_mtime_ns)


def _entries(root: Path, folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted; nothing hidden, and no link that leaves the root."""
    found, left = [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not _inside(root, Path(entry.path)):
                    left += 1
                else:
                    found.append(entry)
    except OSError as error:
        raise missing("data.root", f"{folder} can't be read ({error.strerror})") from error
    if left:
        _log.warning("not following %d symbolic links in %s that leave %s", left, folder, root)
    return sorted(found, key=lambda entry: entry.name)


def _inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _without(positions: list[int], broken: tuple[int, ...]) -> Tensor:
    gone = set(broken)
    return torch.tensor([position for position in positions if position not in gone], dtype=torch.int64)
