"""data=custom: a data set of the user's own, a class or function that makes a map-style data set of torch."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from typing_extensions import override

from distrain.config import user_code
from distrain.config.registry import locate, register
from distrain.config.setting import setting
from distrain.data.base import (
    TARGETS,
    DataSource,
    DataSpec,
    Splits,
    assemble,
    check_shared_keys,
    hold_out_test,
)
from distrain.data.batch import Targets
from distrain.data.items import Items, ItemsConfig
from distrain.data.reading import ItemReader, checked_target
from distrain.data.sample_formats import class_numbers, image_of, kind_of_target, parts_of, target_of
from distrain.data.target_kinds import MOST_CLASSES
from distrain.data.workers import ItemWorkers
from distrain.errors import ConfigError, config_error, described
from distrain.runtime.device import RandomState, seed_everything

log = logging.getLogger(__name__)


@dataclass
class CustomDataConfig(ItemsConfig):
    """Keys of ``data=custom``."""

    _target_: str = setting("Dotted path of a class of map-style data sets, or of a function that makes one.")
    kwargs: dict[str, Any] = setting("Arguments for it.")
    train: dict[str, Any] = setting("Further arguments for the training samples, such as {split: train}.")
    val: dict[str, Any] | None = setting("The same for validation; null: val_fraction of the training samples.")
    test: dict[str, Any] | None = setting("The same for testing; null: test_fraction of the training samples.")
    held_out: dict[str, Any] | None = setting(
        "In place of data.train for samples that are held out of the training samples, such as {augment: false}; "
        "null: as data.train."
    )
    test_fraction: float = setting("Share of the samples used for testing if data.test is null.", above=0, below=1)
    keys: list[str] | None = setting(
        "Names of image and target in samples that are dictionaries; null: found among usual names."
    )
    target: str | None = setting(
        "Kind of target: a class, labels (0 or 1 for each class), numbers, or a mask of classes; "
        "null: seen from the first sample.",
        choices=(None, *TARGETS),
    )
    classes: Any = setting(
        "Number of classes, or a list of their names; null: the data set's attribute classes, or its labels' number."
    )


@dataclass
class DatasetReader(ItemReader):
    """Reads a user's data set, which each process builds for itself when it needs it first.

    Attributes:
        path: Dotted path of the class or function.
        arguments: Its arguments.
        part: What messages call it.
        keys: See :class:`CustomDataConfig`.
        target: Kind of target; ``None`` while it is not known.
        classes: Names of the classes, for targets that are such names.
    """

    path: str
    arguments: dict[str, Any]
    part: str
    keys: Sequence[str] | None = None
    target: str | None = None
    classes: tuple[str, ...] = ()
    _dataset: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}

    @property
    def dataset(self) -> Any:
        """The data set.

        Raises:
            ConfigError: It can't be built, or is no map-style data set.
        """
        if self._dataset is None:
            self._dataset = _build(self.path, self.arguments)
        return self._dataset

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, row: int) -> tuple[Tensor, Targets]:
        image, target = parts_of(self.dataset[row], self.keys)
        return image_of(image), target_of(target, self.target, self.classes)

    @override
    def name(self, row: int) -> str:
        return f"{self.part}[{row}]"


@register("data", "custom", CustomDataConfig)
class CustomData(DataSource):
    """The data set that ``data._target_`` makes; see ``docs/data.md``."""

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"workers"}

    def __init__(self, config: CustomDataConfig) -> None:
        self._config = config

    def describe(self) -> DataSpec:
        """Builds the training data set and reads its first sample.

        Raises:
            ConfigError: The target can't be imported or built, its first sample can't be read or is of no known form,
                or the number of classes is not known.
        """
        return check_shared_keys(self._config, self._spec)

    def load(self) -> Splits:
        """Reads no more samples than are needed for channel statistics.

        Raises:
            ConfigError: A data set is empty.
        """
        c, spec = self._config, self.describe()
        workers = ItemWorkers(c.workers, c.prefetch)

        def items(part: str, arguments: Mapping[str, Any]) -> Items:
            reader = self._reader if part == "train" else self._make_reader(part, arguments)
            split = Items.of(dataclasses.replace(reader, target=spec.target, classes=spec.classes), spec, workers)
            # Of the others nobody asks.
            classes = self._known_classes(reader, spec.classes) if part == "train" else None
            return dataclasses.replace(split, classes=classes)

        train = items("train", c.train)
        held_out = train if c.held_out is None else items("held_out", c.held_out)
        if len(held_out) != len(train):
            problem = f"makes {len(held_out)} samples, and data.train {len(train)}; they must be the same samples"
            raise ConfigError("data.held_out", c.held_out, problem)
        val = None if c.val is None else items("val", c.val)
        if c.test is not None:
            test = items("test", c.test)
        else:
            keep, tested = hold_out_test(len(train), c.test_fraction, c.split_seed)
            train, held_out, test = train.subset(keep), held_out.subset(keep), held_out.subset(tested)
        splits = assemble(c, spec, train, test, val=val, held_out=held_out)
        counts = f"{len(splits.train):,} samples to train on, {len(splits.val):,} for validation, {len(splits.test):,}"
        return dataclasses.replace(splits, notes=(f"{counts} to test; {_in_words(spec)}",))

    @functools.cached_property
    def _reader(self) -> DatasetReader:
        return self._make_reader("train", self._config.train)

    def _make_reader(self, part: str, arguments: Mapping[str, Any]) -> DatasetReader:
        c = self._config
        if c.keys is not None and len(c.keys) != 2:
            raise ConfigError("data.keys", c.keys, "must be two names: of the image and of the target")
        own = {"root": c.root} if c.root is not None else {}
        reader = DatasetReader(c._target_, {**own, **c.kwargs, **arguments}, part, c.keys)
        if not len(reader):
            raise ConfigError(f"data.{part}", dict(arguments), f"{c._target_} has no samples")
        return reader

    @functools.cached_property
    def _spec(self) -> DataSpec:
        c, reader = self._config, self._reader
        try:
            image, target = parts_of(reader.dataset[0], c.keys)
            pixels = image_of(image)
            names = _class_names(c.classes, reader.dataset)
            kind = c.target or kind_of_target(target, names or (), pixels.shape)
            example = target_of(target, kind, names or ())
        except ConfigError:
            raise
        except Exception as error:  # a user's data set may raise anything
            raise ConfigError(
                "data._target_", c._target_, f"its first sample can't be used {described(error)}"
            ) from error
        channels, height, width = pixels.shape
        dtype = "uint8" if pixels.dtype == torch.uint8 else "float"
        spec = DataSpec(channels, height, width, self._names(kind, names, example), dtype, kind)
        try:
            checked_target(spec, example)
        except ValueError as error:
            raise ConfigError("data._target_", c._target_, f"its first sample can't be used ({error})") from error
        return spec

    def _names(self, kind: str, names: tuple[str, ...] | None, example: Tensor) -> tuple[str, ...]:
        """The names of the classes or numbers."""
        c, path = self._config, self._config._target_
        if kind in ("labels", "numbers"):
            size = len(example)
            if names is not None and len(names) != size and c.classes is not None:
                raise ConfigError("data.classes", c.classes, f"is not the number of {kind} of a sample, {size}")
            return names if names is not None and len(names) == size else tuple(map(str, range(size)))
        if names is not None:
            return names
        labels = self._known_classes(self._reader) if kind == "class" else None
        if labels is None:
            problem = f"{path} has no attribute classes"
            raise ConfigError("data.classes", None, f"{problem}; type their number, or a list of their names")
        return tuple(map(str, range(int(labels.max()) + 1)))

    def _known_classes(self, reader: DatasetReader, names: Sequence[str] = ()) -> Tensor | None:
        """The class of each sample as the data set's attribute says, if it says it.

        Args:
            reader: Reads the data set.
            names: Names of the classes, for targets that are such names.
        """
        for name in ("targets", "labels"):
            labels = class_numbers(getattr(reader.dataset, name, None), len(reader))
            if labels is not None and int(labels.max()) < MOST_CLASSES:
                _, target = parts_of(reader.dataset[0], reader.keys)
                # A data set may change the classes of its samples when it reads them.
                is_class = kind_of_target(target, names, ()) == "class"
                if is_class and int(target_of(target, "class", names)) == int(labels[0]):
                    return labels
        return None


def _build(path: str, arguments: Mapping[str, Any]) -> Any:
    """Calls what a dotted path names; random numbers that it draws are the same in every process."""
    target = locate("data._target_", path)
    if not callable(target):
        raise ConfigError("data._target_", path, "is neither a class of data sets nor a function that makes one")
    user_code.check_arguments("data.kwargs", arguments, path, target, arguments)
    before = RandomState.now()
    try:
        seed_everything(0)
        dataset = user_code.build("data._target_", path, lambda: target(**arguments))
    finally:
        before.restore()
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        problem = f"makes a {kind}, which has no samples by number; a map-style data set has __len__ and __getitem__"
        raise ConfigError("data._target_", path, problem)
    return dataset


def _class_names(classes: Any, dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes: configured, or the data set's own."""
    if classes is None:
        classes = getattr(dataset, "classes", None)
        if classes is None:
            classes = getattr(dataset, "num_classes", None)
        if not isinstance(classes, int | list | tuple) or isinstance(classes, bool):
            return None
    if isinstance(classes, int) and not isinstance(classes, bool):
        if not 1 <= classes <= MOST_CLASSES:
            raise ConfigError("data.classes", classes, f"must be between 1 and {MOST_CLASSES}")
        return tuple(map(str, range(classes)))
    if not isinstance(classes, list | tuple) or not classes:
        raise ConfigError("data.classes", classes, "must be the number of classes, or a list of their names")
    names = tuple(map(str, classes))
    if len(set(names)) < len(names):
        raise config_error("data.classes", f"the name {max(names, key=names.count)} stands there more than once")
    return names


def _in_words(spec: DataSpec) -> str:
    what = {"class": "classes", "labels": "labels", "numbers": "numbers", "mask": "classes of pixels"}[spec.target]
    return f"{spec.channels}x{spec.height}x{spec.width} images ({spec.dtype}), {len(spec.classes)} {what}"
