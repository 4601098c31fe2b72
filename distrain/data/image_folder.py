"""A tree of image files with one folder per class."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from distrain.config.registry import register
from distrain.data.base import DataSpec, Splits, check_shared_keys, refusing_unreadable
from distrain.data.image_files import ImageFilesConfig, ImageFilesSource, LabelledFiles, classes_too_small, load_splits
from distrain.data.image_tree import ImageTree
from distrain.errors import ConfigError


@dataclass
class ImageFolderConfig(ImageFilesConfig):
    """Keys of ``data=image_folder``."""


@register("data", "image_folder", ImageFolderConfig)
class ImageFolder(ImageFilesSource):
    """``root/{train,test[,val]}/<class>/**``, or ``root/<class>/**`` with test images selected by ``split_seed``.

    See :class:`distrain.data.image_tree.ImageTree`.
    """

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
        targets = torch.tensor(listing.labels, dtype=torch.int64)
        splits = load_splits(c, spec, LabelledFiles(self._root, listing.files, targets, listing.parts))
        notes = (listing.summary(len(spec.classes)), *classes_too_small(spec.classes, targets, listing.parts))
        return dataclasses.replace(splits, notes=notes)
