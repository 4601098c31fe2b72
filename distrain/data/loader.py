"""Loader of batches of normalised images; it runs in every training step, so it must be fast."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.config.groups import AugmentConfig, DataConfig
from distrain.data.augment import Augmentation
from distrain.data.base import Split, Splits
from distrain.data.batch import Batch, map_targets
from distrain.data.gather import gathered
from distrain.data.items import Items
from distrain.data.prefetch import prefetched
from distrain.data.sampler import Sampler, shard_bounds
from distrain.runtime.device import is_mps

_DEFAULT_PREFETCH = 2


@dataclass(slots=True)
class _RawBatch:
    """A batch whose pixels are not normalised yet.

    Attributes:
        pixels: [n, C, H, W] of the stored type; in pinned memory if they must still be copied to the device.
        draws: Random draws of the augmentation; ``None`` without augmentation.
        batch: The batch, with ``pixels`` as its inputs.
    """

    pixels: Tensor
    draws: Tensor | None
    batch: Batch


class Loader:
    """Iterates over one split. The samples of each global batch do not depend on the number of shards.

    Args:
        images: The split.
        batch_size: Number of samples in a global batch.
        shard: Index and number of shards: which part of each global batch this loader yields.
        mean: Channel means, for pixel values in [0, 1]; for the numbers themselves if the images are floating point.
        std: Channel standard deviations, likewise.
        device: Device of the batches. All images are kept on a GPU if they take less than a quarter of its free memory.
        dtype: Floating-point type of the inputs; for 16-bit types, normalisation is in float32 and its result rounded.
        memory_format: ``torch.contiguous_format`` or ``torch.channels_last``.
        seed: The run's seed; determines order and augmentation.
        shuffle: Use another random order in each epoch; otherwise the order of the split.
        classes: Class of each sample, int64 [N], if classes are to be equally frequent; ``None``: each occurs once.
        augment: Augmentation; ``None`` for none.
        prefetch: Number of batches that a background thread prepares; 0: each is made when it is needed.

        masks: The targets are a class for each pixel, and are moved by the augmentation like their images.

    Attributes:
        shard: As above; may be changed between epochs.
        sampler: The order of every epoch.
    """

    def __init__(
        self,
        images: Split,
        *,
        batch_size: int,
        shard: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        seed: int = 0,
        shuffle: bool = False,
        classes: Tensor | None = None,
        augment: AugmentConfig | None = None,
        prefetch: int = 0,
        masks: bool = False,
    ) -> None:
        _, height, width = images.shape
        self._batch_size, self.shard = batch_size, shard
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        self.sampler = Sampler(len(images), seed, shuffle, images.blocks, classes)
        # 16-bit inputs are normalised in float32, since rounding before normalising would lose precision.
        self._compute_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        augmentation = None if augment is None else Augmentation(augment, height, width, seed)
        self._augmentation = augmentation if augmentation is not None and augmentation.active else None
        self._masks, augmented = masks, self._augmentation is not None
        self._samples = gathered(images, device, memory_format, seed, augmented=augmented, masks=masks)
        # Worker processes prepare samples ahead; reading them in this process changes its random generators meanwhile.
        reads_here = isinstance(images, Items) and (device.type == "cpu" or not images.workers.count)
        self._prefetch = 0 if reads_here else prefetch

        # Expanded to the size of an image, since broadcasting over pixels is slow for channels-last on CPU.
        self._shift = self._constant([images.one * value for value in mean], height, width)
        self._scale = self._constant([1 / (images.one * value) for value in std], height, width)

    def _constant(self, values: Sequence[float], height: int, width: int) -> Tensor:
        """One value per channel, expanded to [1, C, H, W]."""
        channels = torch.tensor(values, dtype=torch.float64).to(self._compute_dtype).view(1, -1, 1, 1)
        expanded = channels.repeat(1, 1, height, width)
        return expanded.contiguous(memory_format=self._memory_format).to(self._device)

    def __len__(self) -> int:
        """Number of batches in an epoch, including a smaller last one."""
        return -(-self.sampler.count // self._batch_size)

    def epoch(self, epoch: int, consumed: int = 0) -> Generator[Batch, None, None]:
        """Yields this shard's share of every global batch of an epoch.

        Args:
            epoch: Counted from 0.
            consumed: Samples of this epoch that were seen already, over all shards. It need not be a multiple of the
                batch size, which may change when a run is resumed.
        """
        raw_batches = self._raw_batches(epoch, consumed)
        if self._device.type == "cpu":
            batches = (self._finish(raw) for raw in raw_batches)
            yield from prefetched(batches, self._prefetch) if self._prefetch else batches
            return
        if self._prefetch and not self._samples.on_device:
            raw_batches = prefetched(raw_batches, self._prefetch)
        # Work for a GPU is queued by the consumer's thread, so it is in order with the rest of the consumer's stream.
        with contextlib.closing(raw_batches):
            for raw in raw_batches:
                yield self._finish(raw)

    def _raw_batches(self, epoch: int, consumed: int) -> Generator[_RawBatch, None, None]:
        count, size = self.sampler.count, self._batch_size
        order = self.sampler.order(epoch)
        # Once per epoch for all samples, since slicing the results is almost free in each step.
        draws = None if self._augmentation is None else self._draws(self._augmentation, epoch, order.counters)
        ranges = []
        for start in range(consumed, count, size):
            low, high = shard_bounds(min(size, count - start), *self.shard)
            ranges.append((start + low, start + high))
        samples = self._samples.batches(epoch, order, ranges)
        for start, (low, high), (pixels, targets) in zip(range(consumed, count, size), ranges, samples, strict=True):
            batch = Batch(pixels, targets, order.positions[low:high], min(size, count - start))
            yield _RawBatch(pixels, None if draws is None else draws[:, low:high], batch)

    def _draws(self, augmentation: Augmentation, epoch: int, order: Tensor) -> Tensor:
        """The augmentation's draws for an epoch, on the device."""
        # Made of integers of 64 bits that wrap around, of which Apple's GPUs promise nothing.
        if is_mps(self._device):
            return augmentation.draws(epoch, order).to(self._device)
        return augmentation.draws(epoch, order.to(self._device))

    def _finish(self, raw: _RawBatch) -> Batch:
        """Moves, augments and normalises the images of a batch."""
        pixels, draws = raw.pixels, raw.draws
        if not self._samples.on_device:
            pixels = pixels.to(self._device, non_blocking=self._device.type == "cuda")
            raw.batch.targets = map_targets(lambda tensor: tensor.to(self._device), raw.batch.targets)
        if self._augmentation is not None and draws is not None:
            pixels = self._augmentation.flip_and_crop(pixels, draws)
            if self._masks:
                raw.batch.targets = self._augmentation.move_masks(raw.batch.targets, draws)
        # The layout is converted while the pixels are bytes, which moves a quarter of the memory.
        images = pixels.contiguous(memory_format=self._memory_format).to(self._compute_dtype)
        # Not one fused operation, whose rounding would depend on the position of a pixel in the batch.
        images.sub_(self._shift).mul_(self._scale)
        if self._augmentation is not None and draws is not None:
            images = self._augmentation.cutout_(images, draws)
        raw.batch.inputs = images.to(self._dtype)
        return raw.batch


def prefetch_depth(config: DataConfig, splits: Splits, device: torch.device) -> int:
    """Number of batches to prefetch: ``data.prefetch``, or 0 if on CPU with the images in memory, else 2.

    Args:
        config: The data set's configuration.
        splits: The loaded data set.
        device: Device of the batches.
    """
    if config.prefetch is not None:
        return config.prefetch
    return 0 if splits.resident and device.type == "cpu" else _DEFAULT_PREFETCH
