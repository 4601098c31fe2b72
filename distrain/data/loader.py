"""Batches of normalised images: the hot path between a data set and a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.config.schema import AugmentConfig, DataConfig
from distrain.data.augment import Augmentation
from distrain.data.base import Images, Splits
from distrain.data.batch import Batch, map_targets, slice_targets
from distrain.data.prefetch import prefetched
from distrain.data.sampler import epoch_order, shard_bounds

_PREFETCH = 2
#: Images on the device may take this share of its free memory.
_DEVICE_SHARE = 0.25
#: A second, channels-last copy of images in CPU memory may take this much.
_COPY_BYTES = 1 << 30


@dataclass(slots=True)
class _Gathered:
    """A batch's pixels, not yet on the device where they stream, and what is to be done with them."""

    pixels: Tensor
    draws: Tensor | None
    batch: Batch


class Loader:
    """Iterates over one split; the samples of global batch k don't depend on the number of shards.

    Args:
        images: The split.
        batch_size: Samples of the global batch.
        shard: (index, count) of this rank's shard.
        mean: Channel means, with pixel values in [0, 1].
        std: Channel standard deviations.
        device: Where batches end up. On CUDA, images in memory that take less than a quarter of what is free there are
            kept on the device.
        dtype: Floating-point type of the batches' inputs; the 16-bit ones are normalised in float32 and then rounded.
        memory_format: ``torch.contiguous_format`` or ``torch.channels_last``.
        seed: The run's seed; fixes order and augmentation.
        shuffle: Another order each epoch; else the split's own.
        augment: Augmentation; ``None`` for none.
        prefetch: Batches made ready by a background thread; 0 makes each when it is asked for.

    Attributes:
        shard: As above; may be set between epochs.
    """

    def __init__(
        self,
        images: Images,
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
        augment: AugmentConfig | None = None,
        prefetch: int = 0,
    ) -> None:
        height, width = images.images.shape[2:]
        self._batch_size, self.shard, self._seed, self._shuffle = batch_size, shard, seed, shuffle
        self._device, self._dtype, self._memory_format, self._prefetch = device, dtype, memory_format, prefetch
        self._count, self._rows = len(images), images.rows
        self._targets = map_targets(lambda tensor: tensor.to(device), images.targets)
        # A step of its own in float64 and float32; rounding before normalising would lose bits.
        self._compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32

        augmentation = None if augment is None else Augmentation(augment, height, width, seed)
        self._augmentation = augmentation if augmentation is not None and augmentation.active else None
        self._pixels = images.images
        self._on_device = device.type == "cpu" or _fits(images, device)
        self._nhwc = False
        if device.type == "cpu":
            # Gathering from images that already lie channels-last saves a transposition of every batch. Augmentation
            # is faster on planes, and by more than that.
            small = images.rows is None and self._pixels.nbytes <= _COPY_BYTES
            if memory_format == torch.channels_last and small and self._augmentation is None:
                self._pixels, self._nhwc = self._pixels.permute(0, 2, 3, 1).contiguous(), True
        elif self._on_device:
            self._pixels = self._pixels.to(device)

        # Expanded to whole images, since broadcasting over channels is slow for channels-last on CPU.
        self._shift = self._constant([255 * value for value in mean], height, width)
        self._scale = self._constant([1 / (255 * value) for value in std], height, width)

    def _constant(self, values: Sequence[float], height: int, width: int) -> Tensor:
        column = torch.tensor(values, dtype=torch.float64).to(self._compute).view(1, -1, 1, 1)
        whole = column.repeat(1, 1, height, width)
        return whole.contiguous(memory_format=self._memory_format).to(self._device)

    def __len__(self) -> int:
        """Steps of an epoch, the ragged last batch included."""
        return (self._count + self._batch_size - 1) // self._batch_size

    def epoch(self, epoch: int, consumed: int = 0) -> Generator[Batch, None, None]:
        """Yields this shard's share of every global batch of an epoch.

        Args:
            epoch: Counted from 0.
            consumed: Samples of this epoch already seen, over all shards; any number, so that a run may go on with
                another batch size.
        """
        gathered = self._gather(epoch, consumed)
        if self._device.type == "cpu":
            batches = (self._finish(one) for one in gathered)
            yield from prefetched(batches, self._prefetch) if self._prefetch else batches
            return
        if self._prefetch and not self._on_device:
            gathered = prefetched(gathered, self._prefetch)
        # What runs on CUDA is issued by the consumer, and so is in order with its stream, whichever that is.
        with contextlib.closing(gathered):
            for one in gathered:
                yield self._finish(one)

    def _gather(self, epoch: int, consumed: int) -> Generator[_Gathered, None, None]:
        order = epoch_order(self._seed, epoch, self._count) if self._shuffle else torch.arange(self._count)
        # Once an epoch for all samples: slices of the results cost next to nothing in each step.
        there = order.to(self._device)
        targets = map_targets(lambda tensor: tensor.index_select(0, there), self._targets)
        draws = None if self._augmentation is None else self._augmentation.draws(epoch, there)
        rows = order if self._rows is None else self._rows.index_select(0, order)
        rows = rows.to(self._pixels.device)
        for start in range(consumed, self._count, self._batch_size):
            total = min(self._batch_size, self._count - start)
            low, high = shard_bounds(total, *self.shard)
            low, high = start + low, start + high
            pixels = self._take(rows[low:high])
            batch = Batch(pixels, slice_targets(targets, low, high), order[low:high], total)
            yield _Gathered(pixels, None if draws is None else draws[:, low:high], batch)

    def _take(self, rows: Tensor) -> Tensor:
        """Uint8 [n, C, H, W] on the device of ``self._pixels``, in pinned memory where it has to travel."""
        if self._on_device:
            pixels = self._pixels.index_select(0, rows)
            return pixels.permute(0, 3, 1, 2) if self._nhwc else pixels
        # torch's pinned allocator doesn't hand a block out again before the copies from it have ended.
        pinned = torch.empty((len(rows), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self._pixels, 0, rows, out=pinned)

    def _finish(self, gathered: _Gathered) -> Batch:
        pixels, draws = gathered.pixels, gathered.draws
        if not self._on_device:
            pixels = pixels.to(self._device, non_blocking=True)
        if self._augmentation is not None and draws is not None:
            pixels = self._augmentation.flip_and_crop(pixels, draws)
        # Transposed as bytes, then converted: a quarter of the memory to move.
        images = pixels.contiguous(memory_format=self._memory_format).to(self._compute)
        # Two operations, not one fused: each rounds alike wherever in a batch a pixel lies.
        images.sub_(self._shift).mul_(self._scale)
        if self._augmentation is not None and draws is not None:
            images = self._augmentation.cutout_(images, draws)
        gathered.batch.inputs = images.to(self._dtype)
        return gathered.batch


def _fits(images: Images, device: torch.device) -> bool:
    """Whether the images may be kept on this CUDA device."""
    if images.rows is not None:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return images.images.nbytes < _DEVICE_SHARE * free


def prefetch_depth(config: DataConfig, splits: Splits, device: torch.device) -> int:
    """``data.prefetch``, or by default 2 batches, and none where images in memory feed the CPU.

    Args:
        config: The data set's configuration.
        splits: What was loaded.
        device: Where batches go.
    """
    if config.prefetch is not None:
        return config.prefetch
    return 0 if splits.resident and device.type == "cpu" else _PREFETCH
