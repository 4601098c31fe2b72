"""Interface of data sets, and what all of them share: splits and channel statistics."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain import rng
from distrain.config.groups import DataConfig
from distrain.config.registry import check_target, choice
from distrain.data.batch import Targets, pick_targets
from distrain.data.folds import parse_fold, split_fold
from distrain.data.sampler import Blocks
from distrain.errors import ConfigError, config_error

#: Prefixes of random keys, so that different draws with the same seed are independent.
_VALIDATION, _TEST = 2, 3
#: Most samples whose channel statistics are measured where samples are read one at a time.
_MOST_MEASURED = 2000
#: Bytes of pixels that are summed at once.
_CHUNK_BYTES = 1 << 24
#: The sum of the squares of so many pixel values is exact in float32, whose sums are five times as fast as int64's.
_EXACT_SUM = 256
#: Kinds of targets; see :attr:`DataSpec.target`.
TARGETS = ("class", "labels", "numbers", "mask")
#: Value in a mask of pixels whose class is unknown; they count in no loss and no metric.
IGNORED = 255


@dataclass(frozen=True)
class DataSpec:
    """What is known of a data set before it is loaded.

    Attributes:
        channels: Channels of each image.
        height: Height of each image in pixels.
        width: Width of each image in pixels.
        classes: Names of the classes, in the order of their numbers; with ``numbers``, the names of the numbers.
        dtype: ``uint8``: pixel values from 0 to 255. ``float``: numbers of any range, which are not divided by 255.
        target: Kind of the targets. ``class``: one class a sample, int64 [N]. ``labels``: for each class whether it
            applies to the sample, uint8 [N, classes], 0 or 1. ``numbers``: float32 [N, classes]. ``mask``: the class of
            each pixel, uint8 [N, H, W]; :data:`IGNORED` where it is unknown.
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    dtype: str = "uint8"
    target: str = "class"


class Split(ABC):
    """The samples of one split: in memory (:class:`Images`) or read one at a time (:class:`distrain.data.items.Items`).

    Attributes:
        targets: What the task compares outputs with: a tensor [N, …], such as class numbers as int64 [N], or a
            dictionary of such tensors; ``None`` if only reading a sample tells its target.
    """

    targets: Targets

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """uint8, or a floating-point type."""

    @property
    def one(self) -> int:
        """What mean and standard deviation count as 1: the 255 of a pixel value, or 1 for floating-point numbers."""
        return 255 if self.dtype == torch.uint8 else 1

    @property
    def blocks(self) -> Blocks | None:
        """Which samples should be read one soon after the other; ``None`` if that makes no difference."""
        return None

    @abstractmethod
    def class_numbers(self) -> Tensor:
        """The class of each sample, int64 [N], where the targets are classes; this may read all samples."""

    def with_known_classes(self) -> Split:
        """The same samples, for which :meth:`class_numbers` is quick from now on."""
        return self

    @abstractmethod
    def subset(self, positions: Tensor) -> Split:
        """The samples at some positions, int64 [n], in that order."""

    @abstractmethod
    def read(self, positions: Tensor) -> Images:
        """The samples at some positions, int64 [n], in memory, in that order."""

    def pick(self, positions: Tensor) -> Tensor:
        """The images at some positions of the split, int64 [n], as [n, C, H, W]."""
        return self.read(positions).images

    def chunks(self, size: int, limit: int | None = None) -> Iterator[Images]:
        """The samples in memory and in order, ``size`` at a time.

        Args:
            size: Samples at a time; the last chunk may have fewer.
            limit: Ends after this many samples; ``None``: all.
        """
        for positions in torch.arange(len(self))[:limit].split(size):
            yield self.read(positions)

    def close(self) -> None:
        """Ends what reads the samples."""


@dataclass(frozen=True)
class Images(Split):
    """A split in memory.

    Attributes:
        images: uint8 or floating point [N, C, H, W] in memory; if ``rows`` is given, a memory map that also contains
            other images.
        targets: What the task compares outputs with: a tensor [N, …], such as class numbers as int64 [N], or a
            dictionary of such tensors.
        rows: int64 [N], index in ``images`` of each sample; ``None`` if sample i is ``images[i]``.
    """

    images: Tensor
    targets: Targets
    rows: Tensor | None = None

    @override
    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @override
    def pick(self, positions: Tensor) -> Tensor:
        return self.images.index_select(0, positions if self.rows is None else self.rows.index_select(0, positions))

    @override
    def subset(self, positions: Tensor) -> Images:
        """The samples at some positions, in that order; images in memory are copied, a memory map is shared."""
        if self.rows is None:
            return self.read(positions)
        return Images(self.images, pick_targets(self.targets, positions), self.rows.index_select(0, positions))

    @override
    def class_numbers(self) -> Tensor:
        return cast("Tensor", self.targets)

    @override
    def read(self, positions: Tensor) -> Images:
        return Images(self.pick(positions), pick_targets(self.targets, positions))


@dataclass(frozen=True)
class Splits:
    """A loaded data set.

    Attributes:
        spec: Shape and classes.
        train: Training images.
        val: Validation images; may be empty.
        test: Test images.
        mean: Mean of each channel, for pixel values in [0, 1]; floating-point images are taken as they are.
        std: Standard deviation of each channel, likewise.
        resident: Whether all images are in memory; otherwise they are read from a memory map, or one at a time.
        notes: What users should know of the data before training, a line each.
        fingerprint: A hash that tells other samples from these, for data sets that have one; saved with the run.
        class_weights: Factor of the loss of each class, if ``data.balance=loss``; saved with the run.
    """

    spec: DataSpec
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resident: bool
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None
    class_weights: tuple[float, ...] | None = None

    def close(self) -> None:
        """Ends what reads the samples: worker processes."""
        for split in (self.train, self.val, self.test):
            split.close()


class DataSource(ABC):
    """A data set. Each subclass is a choice of the group ``data``; its constructor takes its own configuration.

    Attributes:
        compatible_keys: Keys below ``data`` that may change when a run is resumed, since they change neither the images
            nor their order. Subclasses add their own.
    """

    compatible_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "root",
            "batch_size",
            "eval_batch_size",
            "limit",
            "mean",
            "std",
            "augment",
            "eval_crop",
            "memory_limit_mb",
            "prefetch",
        }
    )

    @classmethod
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        """Changes to a saved run's configuration with which another process, perhaps of another user, reads its images.

        A subclass adds the keys that would make reading download files or write to paths of the saved configuration.

        Args:
            config: The saved run's data configuration, an instance of the schema that this class is registered with.
            root: Folder that contains the data now; ``None`` if it is still ``config.root``.

        Returns:
            New values by key.
        """
        return {} if root is None else {"root": root}

    @classmethod
    def changes_for_classes(cls, config: Any, spec: DataSpec) -> dict[str, Any]:
        """Changes to a saved run's configuration with which other files are read by the classes of the run.

        Where classes are found in the files, others may lack some, and would number the rest differently.

        Args:
            config: The saved run's data configuration.
            spec: What the run was trained on.

        Returns:
            New values by key.
        """
        return {}

    @abstractmethod
    def describe(self) -> DataSpec:
        """Describes the data set; cheap, and called on every rank before any process group exists.

        Raises:
            ConfigError: A folder or file is missing, or keys contradict each other.
        """

    @abstractmethod
    def load(self) -> Splits:
        """Loads the data set, which may take long.

        All ranks of a host call it at the same time, before any process group exists.

        Raises:
            ConfigError: A file can't be read.
        """


def source_class(config: DataConfig) -> type[DataSource]:
    """The class of the configured data set."""
    return cast("type[DataSource]", choice("data", config.name).target)


def data_source(config: DataConfig, allowed: Iterable[str] | None = None) -> DataSource:
    """The configured data set, not loaded yet.

    Args:
        config: Its configuration.
        allowed: Dotted prefixes of what the configuration may name, if it comes from an untrusted run folder; ``None``
            allows everything.

    Raises:
        ConfigError: It names something else.
    """
    target = getattr(config, "_target_", None)
    if allowed is not None and target is not None:
        check_target("data._target_", target, allowed)
    return cast("DataSource", choice("data", config.name).target(config))


@contextlib.contextmanager
def refusing_unreadable(root: Path) -> Iterator[None]:
    """Runs a block that reads ``data.root``; an error of the file system names the key.

    Raises:
        ConfigError: The block raised an ``OSError``: no permission, say, or a network file system that is gone.
    """
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename not in (None, str(root)) else ""
        raise ConfigError("data.root", root, f"{place}can't be read ({error.strerror or error})") from error


def check_shared_keys(config: DataConfig, spec: DataSpec) -> DataSpec:
    """Checks the keys that all data sets share against the images, and returns ``spec``.

    Raises:
        ConfigError: ``mean`` or ``std`` has another number of channels, or a crop or cutout is larger than the images.
    """
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != spec.channels:
            raise ConfigError(f"data.{name}", values, f"needs one value for each of the {spec.channels} channels")
    if config.balance != "none" and spec.target != "class":
        raise ConfigError("data.balance", config.balance, f"needs one class a sample; these data have {spec.target}")
    if config.fold is not None:
        parse_fold(config.fold)
    side = min(spec.height, spec.width)
    for name, value in (("crop_padding", config.augment.crop_padding), ("cutout", config.augment.cutout)):
        if value > side:
            raise ConfigError(f"data.augment.{name}", value, f"is larger than the {spec.height}x{spec.width} images")
    if config.augment.crop_border == "reflect" and config.augment.crop_padding >= side:
        problem = f"is too large to mirror the edges of the {spec.height}x{spec.width} images"
        raise ConfigError("data.augment.crop_padding", config.augment.crop_padding, problem)
    return spec


def hold_out_test(count: int, fraction: float, split_seed: int) -> tuple[Tensor, Tensor]:
    """Divides positions into training and test samples, for data sets without a test split of their own."""
    return _hold_out(count, fraction, rng.key(_TEST, split_seed))


def assemble(
    config: DataConfig,
    spec: DataSpec,
    train: Split,
    test: Split | None,
    *,
    val: Split | None = None,
    held_out: Split | None = None,
    moments: Tensor | None = None,
) -> Splits:
    """Makes the splits: holds out validation images, applies ``data.limit`` and computes the channel statistics.

    Args:
        config: The data set's configuration; only the keys that all data sets share are used.
        spec: Shape and classes.
        train: All images that are not for testing.
        test: Test images; ``None``: the validation images.
        val: Validation images, if the data set has its own; ``data.val_fraction`` is then ignored.
        held_out: The images of ``train`` as they are for validation; by default they are the same.
        moments: Result of :func:`image_moments` for ``train``, if it is known already.

    Raises:
        ConfigError: There are no training or no test images, or there is no such fold.
    """
    if spec.target == "class" and (config.fold is not None or config.balance != "none"):
        train = train.with_known_classes()
    keep = torch.arange(len(train))
    held_out = train if held_out is None else held_out
    if config.fold is not None:
        if val is not None:
            problem = "the data have validation samples of their own, and a fold is taken out of the training samples"
            raise ConfigError("data.fold", config.fold, problem)
        groups = train.class_numbers() if spec.target == "class" else torch.zeros(len(train), dtype=torch.int64)
        keep, validated = split_fold(config.fold, groups, config.split_seed)
        val = held_out.subset(validated)
    elif val is None:
        keep, validated = _hold_out(len(train), config.val_fraction, rng.key(_VALIDATION, config.split_seed))
        val = held_out.subset(validated)
    if config.limit is not None and config.limit < len(keep):
        chosen = rng.permutation(rng.key(_VALIDATION, config.split_seed, 1), len(keep))[: config.limit]
        keep = keep.index_select(0, chosen.sort().values)
    if len(keep) == 0:
        raise ConfigError("data.val_fraction", config.val_fraction, f"leaves none of {len(train)} images for training")
    test = val if test is None else test
    if len(test) == 0:
        raise config_error("data", "there are no test images")
    keeps_all = len(keep) == len(train)
    kept = train if keeps_all else train.subset(keep)
    mean, std = config.mean, config.std
    if spec.dtype == "float":
        mean, std = mean or [0.0] * spec.channels, std or [1.0] * spec.channels
    if mean is None or std is None:
        kept_moments = moments if keeps_all or moments is None else moments.index_select(0, keep)
        if kept_moments is None:
            kept_moments = image_moments(kept if isinstance(kept, Images) else _spread(kept))
        measured_mean, measured_std = channel_statistics(kept_moments, kept.shape[1] * kept.shape[2])
        mean, std = mean or measured_mean, std or measured_std
    resident = all(isinstance(part, Images) and part.rows is None for part in (kept, val, test))
    return Splits(spec, kept, val, test, tuple(mean), tuple(std), resident)


def _spread(split: Split) -> Split:
    """Some samples, evenly spread over the split, for statistics where reading all of them would take long."""
    step = -(-len(split) // _MOST_MEASURED)
    return split.subset(torch.arange(0, len(split), step))


def image_moments(images: Split) -> Tensor:
    """Exact sums and sums of squares of each image's pixel values in 0..255, as int64 [N, C, 2]."""
    channels, height, width = images.shape
    parts = [torch.empty(0, channels, 2, dtype=torch.int64)]
    for chunk in images.chunks(max(1, _CHUNK_BYTES // (channels * height * width))):
        pixels = nn.functional.pad(chunk.images.flatten(2), (0, -height * width % _EXACT_SUM))
        runs = pixels.unflatten(2, (-1, _EXACT_SUM)).float()
        sums = runs.sum(3), runs.square_().sum(3)
        parts.append(torch.stack([one.long().sum(2) for one in sums], dim=2))
    return torch.cat(parts)


def channel_statistics(moments: Tensor, pixels: int) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel, for pixel values in [0, 1].

    Args:
        moments: int64 [N, C, 2] from :func:`image_moments`.
        pixels: Number of pixels in a channel of an image.

    Returns:
        Means and standard deviations. The latter is 1 for a constant channel, so that dividing by it is possible.
    """
    count = len(moments) * pixels
    means, stds = [], []
    for first, second in moments.sum(0).tolist():
        means.append(first / count / 255)
        # Exact, since Python's integers do not overflow.
        variance = (count * second - first * first) / (count * count)
        stds.append(variance**0.5 / 255 or 1.0)
    return means, stds


def _hold_out(count: int, fraction: float, family: int) -> tuple[Tensor, Tensor]:
    """Remaining and held-out positions, sorted; a fraction above 0 holds out at least one of two or more samples."""
    held_out = min(max(round(count * fraction), 1 if fraction > 0 else 0), max(count - 1, 0))
    order = rng.permutation(family, count)
    return order[held_out:].sort().values, order[:held_out].sort().values
