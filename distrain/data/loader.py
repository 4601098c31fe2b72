"""Loader of batches of normalised images; it runs in every training step, so it must be fast."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.config.augment import AugmentConfig
from distrain.config.groups import DataConfig
from distrain.data.augmentation.pipeline import Augmentation, Plan, Span, batches_together
from distrain.data.augmentation.resize import resize_centre
from distrain.data.base import DataSpec, Split, Splits
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
        batch: The batch, with ``pixels`` as its inputs.
        span: This shard's part of the global batch.
        shifts: Random draws of flips and crops, on the device; ``None`` without augmentation.
        plan: Those of other augmentations.
    """

    pixels: Tensor
    batch: Batch
    span: Span
    shifts: Tensor | None
    plan: Plan


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
        spec: Size of the inputs, kind of the targets and number of classes; ``None``: the images' size, and classes.
        shown: Share of each side of an image that is shown, in its centre; see ``data.eval_crop``.

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
        spec: DataSpec | None = None,
        shown: float = 1.0,
    ) -> None:
        spec = DataSpec(*images.shape) if spec is None else spec
        height, width = spec.height, spec.width
        self._batch_size, self.shard = batch_size, shard
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        repeats = 1 if augment is None else augment.repeats
        self.sampler = Sampler(len(images), seed, shuffle, images.blocks, classes, repeats)
        # 16-bit inputs are normalised in float32, since rounding before normalising would lose precision.
        self._compute_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        augmentation = None if augment is None else Augmentation(augment, spec, images.shape[1:], shown, seed)
        self._augmentation = augmentation if augmentation is not None and augmentation.active else None
        self._size, self._shown = (height, width), shown
        self._masks, augmented = spec.target == "mask", self._augmentation is not None
        self._samples = gathered(images, device, memory_format, seed, augmented=augmented, masks=self._masks)
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
        order, augmentation = self.sampler.order(epoch), self._augmentation
        # Once per epoch for all samples, since slicing the results is almost free in each step.
        shifts = None if augmentation is None else self._draws(augmentation, epoch, order.counters)
        spans = []
        for start in range(consumed, count, size):
            length = min(size, count - start)
            low, high = shard_bounds(length, *self.shard)
            low, high = start + low, start + high
            spans.append(
                Span(start, length, low, high, low, high)
                if augmentation is None
                else augmentation.span(start, length, low, high)
            )
        samples = self._samples.batches(epoch, order, [(span.first, span.last) for span in spans])
        plans = self._plans(epoch, order.counters, spans)
        for span, plan, (pixels, targets) in zip(spans, plans, samples, strict=True):
            batch = Batch(pixels, targets, order.positions[span.low : span.high], span.size)
            drawn = None if shifts is None else shifts[:, span.first : span.last]
            yield _RawBatch(pixels, batch, span, drawn, plan)

    def _plans(self, epoch: int, counters: Tensor, spans: Sequence[Span]) -> Iterator[Plan]:
        """What is drawn for each batch."""
        if self._augmentation is None:
            yield from [Plan()] * len(spans)
            return
        together = batches_together(-(-self._batch_size // self.shard[1]))
        for start in range(0, len(spans), together):
            yield from self._augmentation.plans(epoch, counters, spans[start : start + together])

    def _draws(self, augmentation: Augmentation, epoch: int, order: Tensor) -> Tensor:
        """The draws of flips, crops and cutouts for an epoch, on the device."""
        # Made of integers of 64 bits that wrap around, of which Apple's GPUs promise nothing.
        if is_mps(self._device):
            return augmentation.shifts.draws(epoch, order).to(self._device)
        return augmentation.shifts.draws(epoch, order.to(self._device))

    def _finish(self, raw: _RawBatch) -> Batch:
        """Moves, augments and normalises the images of a batch."""
        pixels, shifts, augmentation = raw.pixels, raw.shifts, self._augmentation
        if not self._samples.on_device:
            pixels = pixels.to(self._device, non_blocking=self._device.type == "cuda")
            raw.batch.targets = map_targets(lambda tensor: tensor.to(self._device), raw.batch.targets)
        masks = raw.batch.targets if self._masks else None
        if augmentation is not None and shifts is not None:
            pixels, masks = augmentation.change_pixels(pixels, shifts, raw.plan, masks)
        else:
            pixels = resize_centre(pixels, self._shown, *self._size)
            if masks is not None:
                masks = resize_centre(masks.unsqueeze(1), self._shown, *self._size, "nearest").squeeze(1)
        if masks is not None:
            raw.batch.targets = masks
        # The layout is converted while the pixels are bytes, which moves a quarter of the memory.
        images = pixels.contiguous(memory_format=self._memory_format).to(self._compute_dtype)
        # Not one fused operation, whose rounding would depend on the position of a pixel in the batch.
        images.sub_(self._shift).mul_(self._scale)
        if augmentation is not None and shifts is not None:
            images = augmentation.change_normalised(images, shifts, raw.plan)
        raw.batch.inputs = images
        if augmentation is not None:
            augmentation.mix(raw.batch, raw.span, raw.plan)
        raw.batch.inputs = raw.batch.inputs.to(self._dtype)
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
