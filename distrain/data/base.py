"""What a data set is to the rest of distrain, and what all data sets share: splits and channel statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from distrain import rng
from distrain.config.registry import choice
from distrain.config.schema import DataConfig
from distrain.data.batch import Targets, map_targets
from distrain.errors import ConfigError, config_error

_VALIDATION, _TEST = 2, 3
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class DataSpec:
    """What is known before anything is loaded: the images' shape, and the classes' names where there are classes."""

    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """One split.

    Attributes:
        images: uint8 [N, C, H, W] in memory; or, where ``rows`` is given, a memory map of more images than these.
        targets: What the task compares outputs with, [N, …] each: classes as int64 [N], or tensors by name.
        rows: int64 [N], where in ``images`` each sample lies; ``None``: sample i is ``images[i]``.
    """

    images: Tensor
    targets: Targets
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def pick(self, positions: Tensor) -> Tensor:
        """Copies the images at these positions of the split, int64 [n] -> uint8 [n, C, H, W]."""
        return self.images.index_select(0, positions if self.rows is None else self.rows.index_select(0, positions))

    def subset(self, positions: Tensor) -> Images:
        """The samples at these positions, in their order; images in memory are copied, a memory map is shared."""
        targets = map_targets(lambda tensor: tensor.index_select(0, positions), self.targets)
        if self.rows is None:
            return Images(self.pick(positions), targets)
        return Images(self.images, targets, self.rows.index_select(0, positions))


@dataclass(frozen=True)
class Splits:
    """A loaded data set.

    Attributes:
        spec: Shape and classes.
        train: Training images.
        val: Validation images; may be empty.
        test: Test images.
        mean: Mean of each channel, with pixel values in [0, 1].
        std: Standard deviation of each channel, likewise.
        resident: All images lie in memory; ``False``: they stream from a memory map.
    """

    spec: DataSpec
    train: Images
    val: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resident: bool


class DataSource(ABC):
    """A data set; its subclasses are the choices of the group ``data`` and take their own configuration.

    Attributes:
        compatible_keys: Keys below ``data`` that may differ between a run and the run that resumes it, because they
            change neither which images there are nor their order. A subclass adds its own.
    """

    compatible_keys: ClassVar[frozenset[str]] = frozenset(
        {"root", "batch_size", "eval_batch_size", "limit", "mean", "std", "augment", "memory_limit_mb", "prefetch"}
    )

    @classmethod
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        """Keys to change so that another process, perhaps another user's, reads a saved run's images.

        A subclass adds the keys by which reading would download files, or write where the run's configuration says.

        Args:
            config: The saved run's data configuration, of the schema that this class is registered with.
            root: Folder that holds the data now; ``None`` where it is still ``config.root``.
        """
        return {} if root is None else {"root": root}

    @abstractmethod
    def describe(self) -> DataSpec:
        """Says what the data set holds; cheap, called on every rank before any process group forms.

        Raises:
            ConfigError: A missing folder or file, or values that don't fit together.
        """

    @abstractmethod
    def load(self) -> Splits:
        """Loads everything; may take long.

        All ranks of a host call it at the same time, before any process group forms.

        Raises:
            ConfigError: Files that can't be read.
        """


def source_class(config: DataConfig) -> type[DataSource]:
    """The class of the configured data set."""
    return cast("type[DataSource]", choice("data", config.name).target)


def check_shared_keys(config: DataConfig, spec: DataSpec) -> DataSpec:
    """Returns ``spec`` if the keys that all data sets share fit it.

    Raises:
        ConfigError: A mean or std for another number of channels; a crop or cutout too large for the images.
    """
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != spec.channels:
            raise ConfigError(f"data.{name}", values, f"needs one value for each of the {spec.channels} channels")
    side = min(spec.height, spec.width)
    for name, value in (("crop_padding", config.augment.crop_padding), ("cutout", config.augment.cutout)):
        if value > side:
            raise ConfigError(f"data.augment.{name}", value, f"is larger than the {spec.height}x{spec.width} images")
    if config.augment.crop_border == "reflect" and config.augment.crop_padding >= side:
        problem = f"the {spec.height}x{spec.width} images have no so many pixels beside their edge to mirror"
        raise ConfigError("data.augment.crop_padding", config.augment.crop_padding, problem)
    return spec


def hold_out_test(count: int, fraction: float, split_seed: int) -> tuple[Tensor, Tensor]:
    """Positions that stay and positions that become the test split, for data sets that bring none."""
    return _hold_out(count, fraction, rng.key(_TEST, split_seed))


def assemble(
    config: DataConfig,
    spec: DataSpec,
    train: Images,
    test: Images,
    *,
    val: Images | None = None,
    moments: Tensor | None = None,
) -> Splits:
    """Splits off the validation images, applies ``data.limit``, and finds the channel statistics.

    Args:
        config: The common keys are used.
        spec: Shape and classes.
        train: All images that aren't for testing.
        test: Test images.
        val: Validation images where the data set brings its own; ``data.val_fraction`` is then not used.
        moments: As :func:`image_moments` gives them for ``train``, where they are known already.

    Raises:
        ConfigError: No training or no test images are left.
    """
    keep = torch.arange(len(train))
    if val is None:
        keep, held_out = _hold_out(len(train), config.val_fraction, rng.key(_VALIDATION, config.split_seed))
        val = train.subset(held_out)
    if config.limit is not None and config.limit < len(keep):
        chosen = rng.permutation(rng.key(_VALIDATION, config.split_seed, 1), len(keep))[: config.limit]
        keep = keep.index_select(0, chosen.sort().values)
    if len(keep) == 0:
        raise ConfigError("data.val_fraction", config.val_fraction, f"leaves none of {len(train)} images for training")
    if len(test) == 0:
        raise config_error("data", "there are no test images")
    everything = len(keep) == len(train)
    fit = train if everything else train.subset(keep)
    mean, std = config.mean, config.std
    if mean is None or std is None:
        measured = moments if everything or moments is None else moments.index_select(0, keep)
        found = channel_statistics(image_moments(fit) if measured is None else measured, spec.height * spec.width)
        mean, std = mean or found[0], std or found[1]
    resident = all(part.rows is None for part in (fit, val, test))
    return Splits(spec, fit, val, test, tuple(mean), tuple(std), resident)


def image_moments(images: Images) -> Tensor:
    """Sums and sums of squares of each image's pixels, exact: int64 [N, C, 2]."""
    count, channels, height, width = len(images), *images.images.shape[1:]
    chunk = max(1, _CHUNK_BYTES // (channels * height * width))
    parts = [torch.empty(0, channels, 2, dtype=torch.int64)]
    for start in range(0, count, chunk):
        pixels = images.pick(torch.arange(start, min(start + chunk, count))).flatten(2).int()
        parts.append(torch.stack((pixels.sum(2), pixels.square_().sum(2)), dim=2))
    return torch.cat(parts)


def channel_statistics(moments: Tensor, pixels: int) -> tuple[list[float], list[float]]:
    """Mean and (population) standard deviation of each channel, in [0, 1].

    Args:
        moments: int64 [N, C, 2] from :func:`image_moments`.
        pixels: Pixels of an image's channel.

    Returns:
        Means and standard deviations; 1 where a channel is constant, since it can only be centred.
    """
    count = len(moments) * pixels
    means, stds = [], []
    for first, second in moments.sum(0).tolist():
        means.append(first / count / 255)
        # Python's integers don't overflow, so the difference of two large squares is exact.
        variance = (count * second - first * first) / (count * count)
        stds.append(variance**0.5 / 255 or 1.0)
    return means, stds


def _hold_out(count: int, fraction: float, family: int) -> tuple[Tensor, Tensor]:
    """Two sorted sets of positions; a fraction above 0 holds out at least one of two or more samples."""
    held_out = min(max(round(count * fraction), 1 if fraction > 0 else 0), max(count - 1, 0))
    order = rng.permutation(family, count)
    return order[held_out:].sort().values, order[:held_out].sort().values
