"""Data sets of the Hugging Face hub, or local ones in its formats."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.base import DataSpec, Splits, check_shared_keys
from distrain.data.hub_dataset import HubPlace, copied_images, open_splits
from distrain.data.image_cache import ImageFile
from distrain.data.image_files import ImageFilesConfig, ImageFilesSource, LabelledFiles, cache_folder, load_splits
from distrain.data.image_tree import PART_NAMES
from distrain.data.target_kinds import TargetError, to_targets
from distrain.errors import ConfigError

#: Names of columns that are taken for images and labels, if their types leave several.
_IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values")
_LABEL_NAMES = ("label", "labels", "class", "target", "category")


@dataclass
class HFConfig(ImageFilesConfig):
    """Keys of ``data=hf``."""

    path: str = setting("Folder (of save_to_disk, parquet files or images), or a name on the hub.", path=True)
    subset: str | None = setting("Which of several data sets at that place; null: the only one.")
    revision: str | None = setting("Branch, tag or commit on the hub; null: the newest.")
    download: bool = setting("Ask the hub; otherwise only what was downloaded before is used.")
    train: str | None = setting("Name of the split to train on; null: train or training, or the only one.")
    val: str | None = setting("Name of the split for validation; null: val, valid or validation, if there is one.")
    test: str | None = setting("Name of the split to test on; null: test or testing, if there is one.")
    image_column: str | None = setting("Name of the column of images; null: by its type.")
    label_column: str | None = setting("Name of the column of labels; null: by its type, else by its name.")


@dataclass(frozen=True)
class _Table:
    """The splits that are used, by their part, and the columns of interest."""

    splits: dict[str, Any]
    image: str
    label: str


@register("data", "hf", HFConfig)
class HF(ImageFilesSource):
    """Images and labels of a data set that the library ``datasets`` opens.

    Encoded images are copied out of it once; from then on they are read and cached like any others, by processes that
    don't need the library.
    """

    compatible_keys: ClassVar[frozenset[str]] = ImageFilesSource.compatible_keys | {"path", "download"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, None)
        # A saved run must not say what is to be downloaded.
        return {**changes, "download": False, **({} if root is None else {"path": root, "cache": None})}

    def __init__(self, config: HFConfig) -> None:
        self._config = config
        self._place = HubPlace(config.path, config.subset, config.revision, config.download)

    @functools.cached_property
    def _table(self) -> _Table:
        c = self._config
        splits = _chosen(open_splits(self._place), {"train": c.train, "val": c.val, "test": c.test})
        features = splits["train"].features
        image = _column("data.image_column", c.image_column, features, _image_columns(features), _IMAGE_NAMES)
        others = {name: feature for name, feature in features.items() if name != image}
        label = _column("data.label_column", c.label_column, others, _label_columns(others), _LABEL_NAMES)
        for part, split in splits.items():
            for name in (image, label):
                if split.features.get(name) != features[name]:
                    found = "lacks it" if name not in split.features else f"has {split.features[name]}"
                    problem = f"the column {name} is {features[name]} in train, and {part} {found}"
                    raise ConfigError("data.path", c.path, problem)
        return _Table(splits, image, label)

    @functools.cached_property
    def _targets(self) -> tuple[str, tuple[str, ...], Tensor]:
        """Kind of the targets, their classes, and the targets of all samples, split after split."""
        table = self._table
        feature = table.splits["train"].features[table.label]
        values = [value for split in table.splits.values() for value in split[table.label][:]]
        missing = [row for row, value in enumerate(values) if value is None]
        if missing:
            raise self._wrong_label(missing[0], "is empty")
        inner = getattr(feature, "feature", None)
        names = getattr(inner if inner is not None else feature, "names", None)
        try:
            if inner is not None:
                return "labels", *_several_labels(values, names)
            if isinstance(values[0], str):
                found = sorted(set(values))
                numbers = {name: number for number, name in enumerate(found)}
                return "class", tuple(found), torch.tensor([numbers[value] for value in values])
            array = np.array(values)
            if names is not None:
                classes = to_targets("class", array)
                return "class", tuple(names), classes
            if array.dtype.kind == "f":
                return "numbers", (table.label,), to_targets("numbers", array)
            targets = to_targets("class", array)
            return "class", tuple(map(str, range(int(targets.max()) + 1))), targets
        except TargetError as error:
            raise self._wrong_label(error.row or 0, error.problem) from error

    def _wrong_label(self, row: int, problem: str) -> ConfigError:
        for part, split in self._table.splits.items():
            if row < len(split):
                line = f"row {row} of the {part} split {problem}"
                hint = "; data.test names another split" if part == "test" else ""
                return ConfigError("data.label_column", self._table.label, line + hint)
            row -= len(split)
        raise AssertionError("a row of no split")

    def describe(self) -> DataSpec:
        """Opens the data set, and returns the configured size and its classes; the first time, this may download it.

        Raises:
            ConfigError: There is no such data set, split or column, or a label is missing.
        """
        c = self._config
        kind, classes, _ = self._targets
        if kind == "class" and len(classes) < 2:
            raise ConfigError("data.label_column", self._table.label, f"has one class only, {''.join(classes)}")
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, classes, target=kind))

    def load(self) -> Splits:
        """Copies the encoded images, if that is not done yet, and opens or makes the cache of them.

        Raises:
            ConfigError: An image can't be decoded and may not be skipped, or a cache can't be written.
        """
        c, spec, table = self._config, self.describe(), self._table
        folder = cache_folder(c, self._place.root())
        pieces = copied_images(self._place, table.splits, table.image, folder)
        copy = pieces.paths[0].relative_to(folder)
        status = pieces.paths[0].stat()
        # In the name of a cache of pixels the copy's own name, a hash, stands for its content.
        files = [ImageFile(str(copy), status.st_size, 0)]
        parts, start = {}, 0
        for part, split in table.splits.items():
            parts[part] = range(start, start + len(split))
            start += len(split)
        labelled = LabelledFiles(folder, files, self._targets[2], parts, pieces)
        splits = load_splits(dataclasses.replace(c, cache=str(folder)), spec, labelled)
        counts = ", ".join(f"{part} {len(rows):,}" for part, rows in parts.items())
        what = "classes" if spec.target == "class" else spec.target
        note = f"{start:,} images, {len(spec.classes)} {what} ({counts}); columns {table.image} and {table.label}"
        return dataclasses.replace(splits, notes=(note,))


def _chosen(splits: dict[str, Any], wanted: dict[str, str | None]) -> dict[str, Any]:
    """The splits of each part.

    Raises:
        ConfigError: There is no such split, none to train on, or one serves two parts.
    """
    chosen: dict[str, str] = {}
    for part, name in wanted.items():
        if name is not None:
            if name not in splits:
                raise ConfigError(f"data.{part}", name, "no such split", splits)
            chosen[part] = name
        elif found := [known for known in splits if known.lower() in PART_NAMES[part]]:
            chosen[part] = found[0]
        elif part == "train":
            if len(splits) > 1:
                raise ConfigError("data.train", None, "needs the split to train on", splits)
            chosen[part] = next(iter(splits))
    used: dict[str, str] = {}
    for part, name in chosen.items():
        if name in used:
            if wanted[part] is None:
                continue
            raise ConfigError(f"data.{part}", name, f"is the split for {used[name]} too")
        used[name] = part
    for name, part in used.items():
        if not len(splits[name]):
            raise ConfigError(f"data.{part}", name, "has no rows")
    return {part: splits[name] for name, part in used.items()}


def _image_columns(features: Any) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == "Image"]


def _label_columns(features: Any) -> list[str]:
    """Columns whose type says that they hold classes."""
    return [
        name
        for name, feature in features.items()
        if hasattr(feature, "names") or hasattr(getattr(feature, "feature", None), "names")
    ]


def _column(key: str, given: str | None, features: Any, typed: Sequence[str], usual: Sequence[str]) -> str:
    """The column that is meant.

    Raises:
        ConfigError: There is none, or there are several.
    """
    if given is not None:
        if given not in features:
            raise ConfigError(key, given, "no such column", features)
        return given
    if len(typed) == 1:
        return typed[0]
    named: list[str] = [name for name in features if name.lower() in usual and (not typed or name in typed)]
    if len(named) == 1:
        return named[0]
    raise ConfigError(key, None, "needs the name of the column", typed or features)


def _several_labels(values: list[Any], names: Sequence[str] | None) -> tuple[tuple[str, ...], Tensor]:
    """Names of the labels, and for each sample which of them apply, uint8 [N, C], from lists of label numbers."""
    if names is None:
        raise TargetError(0, "is a list of no known classes; lists of class labels are needed")
    table = np.zeros((len(values), len(names)), dtype=np.uint8)
    for row, value in enumerate(values):
        for number in value:
            if not 0 <= number < len(names):
                raise TargetError(row, f"holds {number}; labels are numbered from 0 to {len(names) - 1}")
            table[row, number] = 1
    return tuple(names), torch.from_numpy(table)
