"""Tar shards of images and labels, in WebDataset's layout, read where they lie."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data import shard_index
from distrain.data.base import DataSpec, Splits, check_shared_keys, refusing_unreadable
from distrain.data.image_cache import ImageFile
from distrain.data.image_files import (
    DecodedImagesConfig,
    ImageFilesSource,
    LabelledFiles,
    cache_folder,
    load_splits,
)
from distrain.data.shard_index import ShardIndex
from distrain.data.shard_names import find_shards
from distrain.data.tar_shards import Endings
from distrain.errors import ConfigError

log = logging.getLogger(__name__)
#: Most classes; a number above this is no class number.
_MOST_CLASSES = 100_000
#: Shards that hold on average fewer than this share of the classes are taken to be sorted by class.
_SORTED_SHARE = 0.5


@dataclass
class WebDatasetConfig(DecodedImagesConfig):
    """Keys of ``data=webdataset``."""

    train: str | None = setting(
        "Pattern of the tars to train on, such as train-{000..127}.tar or train/*.tar; null: by their names."
    )
    val: str | None = setting("Pattern of the tars for validation; null: by their names.")
    test: str | None = setting("Pattern of the tars to test on; null: by their names.")
    image_ext: str | None = setting("Ending of images in a tar; null: jpg, jpeg, png, webp, bmp, tif or tiff.")
    label_ext: str | None = setting("Ending of labels in a tar; null: cls, else json, else txt.")
    label_key: str = setting("Key of the class number or name in labels that are JSON.")
    classes: list[str] | None = setting(
        "Names of the classes in the order of their numbers; null: the numbers, or the names that occur, sorted."
    )
    shuffle_shards: int | None = setting(
        "Shards whose samples are mixed at a time, so that a disk reads few files at once; null: all.",
        at_least=1,
        affects=("sample_order",),
    )


@register("data", "webdataset", WebDatasetConfig)
class WebDataset(ImageFilesSource):
    """Tars of samples such as ``0001.jpg`` and ``0001.cls``; images are decoded in worker processes when needed."""

    def __init__(self, config: WebDatasetConfig) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, "needs the folder that contains the tars")
        self._root = Path(config.root)
        for key in ("image_ext", "label_ext"):
            value: str | None = getattr(config, key)
            if value is not None and (value.startswith(".") or value != value.lower()):
                problem = "is written in small letters and without a dot at its beginning"
                raise ConfigError(f"data.{key}", value, problem, meant=[value.lower().lstrip(".")])

    @functools.cached_property
    def _shards(self) -> dict[str, list[ImageFile]]:
        c = self._config
        with refusing_unreadable(self._root):
            return find_shards(self._root, {"train": c.train, "val": c.val, "test": c.test})

    @functools.cached_property
    def _index(self) -> ShardIndex:
        c = self._config
        shards = [shard for part in self._shards.values() for shard in part]
        endings = Endings(c.image_ext, c.label_ext, c.label_key)
        return shard_index.open_or_build(self._root, shards, endings, cache_folder(c, self._root))

    @functools.cached_property
    def _parts(self) -> dict[str, range]:
        """Positions in the index of each part's samples."""
        counts = np.bincount(self._index.pieces.file, minlength=sum(map(len, self._shards.values())))
        parts, shard, start = {}, 0, 0
        for part, shards in self._shards.items():
            count = int(counts[shard : shard + len(shards)].sum())
            parts[part] = range(start, start + count)
            shard, start = shard + len(shards), start + count
        return parts

    def describe(self) -> DataSpec:
        """Returns the configured size and the classes of the labels; the first time, this reads all shards' headers.

        Raises:
            ConfigError: There are no shards, one of them can't be used, or the labels are not those of classes.
        """
        c = self._config
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, self._classes()))

    def _classes(self) -> tuple[str, ...]:
        index, given = self._index, self._config.classes
        values = index.values
        train = {values[code] for code in np.unique(index.labels[np.asarray(self._parts["train"])])}
        if all(isinstance(value, int) for value in values):
            highest = max(int(value) for value in values)
            count = highest + 1 if given is None else len(given)
            if highest >= min(count, _MOST_CLASSES):
                limit = f"the {len(given)} names of data.classes" if given else f"{_MOST_CLASSES:,} classes"
                raise ConfigError("data.root", self._root, f"a label is {highest}, and there are {limit}, from 0")
            names = tuple(map(str, range(count))) if given is None else tuple(given)
        else:
            names = tuple(map(str, values)) if given is None else tuple(given)
            known = set(names)
            if unknown := [str(value) for value in values if value not in known]:
                raise ConfigError("data.classes", given, f"lacks the label {unknown[0]}", names[:20])
            if given is None and len(values) == len(index.labels) > 2:
                problem = f"each of the {len(values):,} labels is another text, {values[0]} for example"
                raise ConfigError("data.label_ext", self._config.label_ext, f"{problem}; are they class names?")
        if len(set(names)) < len(names):
            raise ConfigError("data.classes", given, f"{Counter(names).most_common(1)[0][0]} appears twice")
        if len(names) < 2:
            raise ConfigError("data.root", self._root, f"all samples are of one class, {names[0]}")
        if untrained := [value for value in values if value not in train]:
            problem = f"no sample to train on has the label {untrained[0]}, which is in other shards"
            raise ConfigError("data.root", self._root, problem)
        return names

    def load(self) -> Splits:
        """Opens the shards. Unless ``mean`` and ``std`` are given, all images are decoded once to measure them.

        Raises:
            ConfigError: An image can't be decoded and may not be skipped, or the cache can't be written.
        """
        spec, index = self.describe(), self._index
        places = {name: number for number, name in enumerate(spec.classes)}
        numbers = [value if isinstance(value, int) else places[value] for value in index.values]
        targets = torch.tensor(numbers, dtype=torch.int64)[torch.from_numpy(index.labels)]
        shards = [shard for part in self._shards.values() for shard in part]
        labelled = LabelledFiles(self._root, shards, targets, self._parts, index.pieces, self._config.shuffle_shards)
        splits = load_splits(self._config, spec, labelled)
        return dataclasses.replace(splits, notes=(self._summary(spec), *self._sorted_by_class(spec, targets)))

    def _summary(self, spec: DataSpec) -> str:
        parts = ", ".join(f"{name} {len(samples):,}" for name, samples in self._parts.items())
        count, shards = len(self._index.labels), sum(map(len, self._shards.values()))
        line = f"{shards:,} shards, {count:,} images in {len(spec.classes)} classes ({parts})"
        left_out = self._index.left_out
        if not left_out:
            return line
        kinds = ", ".join(f"{f'.{ending}' if ending else 'hidden'} {n:,}" for ending, n in left_out.most_common(4))
        return f"{line}; left out: {sum(left_out.values()):,} ({kinds})"

    def _sorted_by_class(self, spec: DataSpec, targets: Tensor) -> Sequence[str]:
        """A line if shards hold few of the classes each, so that a window of shards would not mix them."""
        window = self._config.shuffle_shards
        count = len(self._shards["train"])
        if window is None or window >= count:
            return ()
        train = torch.as_tensor(np.asarray(self._parts["train"]))
        shard = torch.from_numpy(self._index.pieces.file).to(torch.int64)[train]
        pairs = torch.unique(shard * len(spec.classes) + targets[train])
        possible = torch.bincount(shard, minlength=count).clamp(max=len(spec.classes)).sum()
        if len(pairs) >= _SORTED_SHARE * int(possible):
            return ()
        problem = f"shards hold {len(pairs) / count:.1f} of {len(spec.classes)} classes each: sorted by class?"
        return (f"{problem} data.shuffle_shards=null mixes all of them in each epoch, instead of {window} at a time",)
