"""What data sets of image files share, however they find the files: their keys, the cache of pixels, the splits."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.schema import DataConfig, setting
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, hold_out_test
from distrain.data.batch import Targets
from distrain.data.build_folder import is_build_folder
from distrain.data.image_cache import CacheSpec, ImageFile, open_or_build
from distrain.errors import ConfigError
from distrain.files.user_cache import user_cache_folder

log = logging.getLogger(__name__)
_CACHE = ".distrain-cache"


@dataclass
class ImageFilesConfig(DataConfig):
    """Keys of every data set of image files."""

    height: int = setting("Height of each image after resizing, in pixels.", at_least=1)
    width: int = setting("Width of each image after resizing, in pixels.", at_least=1)
    channels: int = setting("3: RGB, 1: greyscale.", choices=(1, 3))
    test_fraction: float = setting(
        "Share of the images used for testing if none are set apart for it.", above=0, below=1
    )
    on_error: str = setting(
        "If an image can't be decoded: stop ends the run, skip leaves it out.", choices=("stop", "skip")
    )
    cache: str | None = setting(
        "Folder for decoded images; null: .distrain-cache beside them, else in the user's cache or among temporary "
        "files.",
        path=True,
    )
    workers: int | None = setting("Decoding processes; null: one per CPU core.", at_least=1)


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, and what is to be learned of each.

    Attributes:
        root: Folder of the files.
        files: The image files.
        targets: Targets of the files, in the same order; see :attr:`distrain.data.base.DataSpec.target`.
        parts: Indices of the files of each part: ``train``, and ``val`` and ``test`` if these are set apart.
    """

    root: Path
    files: Sequence[ImageFile]
    targets: Targets
    parts: Mapping[str, Sequence[int]]


class ImageFilesSource(DataSource):
    """A data set of image files, whose configuration is an :class:`ImageFilesConfig`."""

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"cache", "workers"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, root)
        # A cache that was made from another root is of no use, and a saved run must not say where to write a new one.
        if root is not None or config.cache is None or not is_build_folder(Path(config.cache)):
            changes["cache"] = None
        return changes


def load_splits(config: ImageFilesConfig, spec: DataSpec, labelled: LabelledFiles) -> Splits:
    """Opens the cache of decoded images, and decodes the files first if it doesn't exist; then makes the splits.

    Raises:
        ConfigError: An image can't be decoded and may not be skipped, the cache can't be written, or no images are left
            for a part.
    """
    skips = config.on_error == "skip"
    recipe = CacheSpec(labelled.root, labelled.files, config.channels, config.height, config.width, skips)
    cache = open_or_build(recipe, _cache_folder(config, labelled.root), config.workers)
    if cache.broken:
        log.warning("skipped %d of %d images that can't be decoded", len(cache.broken), len(labelled.files))
    assert cache.images is not None
    streamed = cache.images.nbytes > config.memory_limit_mb * 2**20
    everything = Images(cache.images, labelled.targets, torch.arange(len(labelled.files)) if streamed else None)
    rows = {part: _without(indices, cache.broken) for part, indices in labelled.parts.items()}
    if "test" not in rows:
        keep, test = hold_out_test(len(rows["train"]), config.test_fraction, config.split_seed)
        rows["train"], rows["test"] = rows["train"][keep], rows["train"][test]
    moments = cache.moments.index_select(0, rows["train"])
    val = everything.subset(rows["val"]) if "val" in rows else None
    train, test_images = everything.subset(rows["train"]), everything.subset(rows["test"])
    return assemble(config, spec, train, test_images, val=val, moments=moments)


def _cache_folder(config: ImageFilesConfig, root: Path) -> Path:
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
