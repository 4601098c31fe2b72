"""Selects the samples of a step: one order for all ranks, and a contiguous part of each batch per shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrain import rng

#: Identifies the order of samples among the uses of random numbers.
_ORDER = 1


@dataclass(frozen=True)
class EpochOrder:
    """The samples of an epoch in the order in which they are visited.

    Attributes:
        positions: Position in the split of each, int64 [count].
        counters: A number for each on which its random draws depend, int64 [count]: its position.
    """

    positions: Tensor
    counters: Tensor


@dataclass(frozen=True)
class Sampler:
    """The order of every epoch, as a function of (seed, epoch).

    Attributes:
        count: Number of samples in the split.
        seed: The run's seed.
        shuffle: Another random order in each epoch; otherwise the order of the split.
    """

    count: int
    seed: int = 0
    shuffle: bool = True

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, counted from 0."""
        positions = epoch_order(self.seed, epoch, self.count) if self.shuffle else torch.arange(self.count)
        return EpochOrder(positions, positions)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Returns the order in which an epoch visits the samples of a split.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        count: Number of samples in the split.

    Returns:
        A permutation, int64 [count], that depends on the arguments only.
    """
    return rng.permutation(rng.key(_ORDER, seed, epoch), count)


def batch_share(seed: int, samples: int, epoch: int, offset: int, count: int, shard: tuple[int, int]) -> list[int]:
    """Returns the positions in the split of a shard's samples of one batch.

    Args:
        seed: The run's seed.
        samples: Number of samples in the split.
        epoch: Counted from 0.
        offset: Index of the batch's first sample in the order of the epoch.
        count: Samples per batch; an epoch's last batch may have fewer.
        shard: Index of the shard and number of shards.
    """
    low, high = shard_bounds(max(min(count, samples - offset), 0), *shard)
    positions: list[int] = epoch_order(seed, epoch, samples)[offset + low : offset + high].tolist()
    return positions


def part_sizes(count: int, parts: int) -> list[int]:
    """Sizes of the parts into which :func:`shard_bounds` and ``Tensor.tensor_split`` divide ``count`` samples."""
    size, larger = divmod(count, parts)
    return [size + (index < larger) for index in range(parts)]


def shard_bounds(count: int, index: int, shards: int) -> tuple[int, int]:
    """Returns the half-open range of ``count`` samples that belongs to shard ``index`` of ``shards``.

    The ranges are contiguous and contain every sample once. Their sizes differ by at most one; the first shards have
    the larger ranges. With fewer samples than shards, the last ranges are empty.
    """
    size, larger = divmod(count, shards)
    start = index * size + min(index, larger)
    return start, start + size + (index < larger)
