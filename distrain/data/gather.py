"""Where a loader takes the samples of its batches from: memory, or readers of single samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from distrain.data.base import Images, Split
from distrain.data.batch import Targets, map_targets, pick_targets, slice_targets
from distrain.data.items import Items, draws_of_epoch
from distrain.data.sampler import EpochOrder
from distrain.runtime.device import is_mps

#: Images are kept on the device if they take less than this share of its free memory.
_MAX_DEVICE_SHARE = 0.25
#: Largest channels-last copy of the images in CPU memory.
_MAX_COPY_BYTES = 1 << 30


class Gathered(Protocol):
    """The samples of one split, for the batches of one device.

    Attributes:
        on_device: Whether the pixels are on the device already when they are yielded.
    """

    on_device: bool

    def batches(self, epoch: int, order: EpochOrder, ranges: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Targets]]:
        """Yields pixels [n, C, H, W] and targets of the samples in some ranges of an epoch's order.

        Args:
            epoch: Counted from 0.
            order: The epoch's order.
            ranges: First place of each batch in the order, and the place after its last.
        """
        ...


def gathered(
    split: Split, device: torch.device, layout: torch.memory_format, seed: int, *, augmented: bool, masks: bool = False
) -> Gathered:
    """How the samples of a split are gathered.

    Args:
        split: The split.
        device: Device of the batches.
        layout: Their memory format.
        seed: The run's seed.
        augmented: Whether the pixels are augmented after they were gathered.
        masks: Whether the targets are a class for each pixel.
    """
    if isinstance(split, Items):
        return _Read(split, device, seed)
    assert isinstance(split, Images)
    return InMemory(split, device, layout, augmented=augmented, masks=masks)


class InMemory:
    """Samples in memory, or in a memory map."""

    def __init__(
        self, images: Images, device: torch.device, layout: torch.memory_format, *, augmented: bool, masks: bool
    ) -> None:
        self._rows, self._device, self._masks = images.rows, device, masks
        self._pixels = images.images
        self.on_device = device.type == "cpu" or _fits_on_device(images, device)
        # Masks take as much memory as a channel of the images, and stay where these are.
        self._target_device = device if self.on_device or not masks else torch.device("cpu")
        self._targets = map_targets(lambda tensor: tensor.to(self._target_device), images.targets)
        self._is_nhwc = False
        if device.type == "cpu":
            # A channels-last copy of all images saves the conversion of every batch. With augmentation there is no such
            # copy: augmentation is faster on contiguous images, and saves more than the conversion costs.
            small = images.rows is None and self._pixels.nbytes <= _MAX_COPY_BYTES
            if layout == torch.channels_last and small and not augmented:
                self._pixels, self._is_nhwc = self._pixels.permute(0, 2, 3, 1).contiguous(), True
        elif self.on_device:
            self._pixels = self._pixels.to(device)

    def batches(self, epoch: int, order: EpochOrder, ranges: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Targets]]:
        """See :class:`Gathered`."""
        # Once per epoch for all samples, since slicing the results is almost free in each step; but masks of a whole
        # epoch are large.
        positions = order.positions
        target_order = positions.to(self._target_device)
        targets = None if self._masks else pick_targets(self._targets, target_order)
        rows = positions if self._rows is None else self._rows.index_select(0, positions)
        rows = rows.to(self._pixels.device)
        for low, high in ranges:
            if self._masks:
                share = pick_targets(self._targets, target_order[low:high])
            else:
                share = slice_targets(targets, low, high)
            yield self._gather(rows[low:high]), share

    def _gather(self, rows: Tensor) -> Tensor:
        """[n, C, H, W] on the device of ``self._pixels``; in pinned memory if a CUDA device must still copy them."""
        if self.on_device:
            pixels = self._pixels.index_select(0, rows)
            return pixels.permute(0, 3, 1, 2) if self._is_nhwc else pixels
        if self._device.type != "cuda":
            return self._pixels.index_select(0, rows)
        # torch's pinned allocator reuses a block only after the copies from it have finished.
        pinned = torch.empty((len(rows), *self._pixels.shape[1:]), dtype=self._pixels.dtype, pin_memory=True)
        return torch.index_select(self._pixels, 0, rows, out=pinned)


class _Read:
    """Samples that are read one at a time."""

    def __init__(self, items: Items, device: torch.device, seed: int) -> None:
        self._items, self._seed = items, seed
        self.on_device = device.type == "cpu"
        self._pinned = device.type == "cuda"

    def batches(self, epoch: int, order: EpochOrder, ranges: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Targets]]:
        parts = ((order.positions[low:high], order.counters[low:high]) for low, high in ranges)
        for pixels, targets in self._items.batches(parts, draws_of_epoch(self._seed, epoch)):
            yield pixels.pin_memory() if self._pinned else pixels, targets


def _fits_on_device(images: Images, device: torch.device) -> bool:
    """Whether to keep the images on this GPU."""
    if images.rows is not None:
        return False
    if is_mps(device):
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free, _ = torch.cuda.mem_get_info(device)
    return images.images.nbytes < _MAX_DEVICE_SHARE * free
