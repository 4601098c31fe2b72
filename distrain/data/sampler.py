"""Selects the samples of a step: one order for all ranks, and a contiguous part of each batch per shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain import rng
from distrain.data.balance import balanced_order, repetitions

#: Identify the order of samples, and that of blocks, among the uses of random numbers.
_ORDER, _BLOCKS = 1, 7
#: Bit from which on a counter holds how often the sample has occurred before.
_REPETITION = 40


@dataclass(frozen=True)
class EpochOrder:
    """The samples of an epoch in the order in which they are visited.

    Attributes:
        positions: Position in the split of each, int64 [count].
        counters: A number for each on which its random draws depend, int64 [count]: its position, and how often it has
            occurred in the epoch before.
    """

    positions: Tensor
    counters: Tensor


@dataclass(frozen=True)
class Blocks:
    """Which samples lie together, in one tar for example, and how many such blocks are read at a time.

    Attributes:
        numbers: The block of each sample of the split, from 0, int64 [count].
        window: Blocks whose samples are mixed with each other.
    """

    numbers: Tensor
    window: int


@dataclass(frozen=True)
class Sampler:
    """The order of every epoch, as a function of (seed, epoch).

    Attributes:
        count: Number of samples in the split.
        seed: The run's seed.
        shuffle: Another random order in each epoch; otherwise the order of the split.
        blocks: Visit the samples block by block, see :func:`block_order`; ``None``: mix all of them.
        classes: Class of each sample, int64 [count], if classes are to be equally frequent in a shuffled order;
            blocks are not heeded then.
        repeats: How often a sample is seen in a row (Hoffer et al. 2020, arXiv 1901.09335). An epoch keeps its length,
            and so has only the first samples of its order.
    """

    count: int
    seed: int = 0
    shuffle: bool = True
    blocks: Blocks | None = None
    classes: Tensor | None = None
    repeats: int = 1

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, counted from 0."""
        positions = self._positions(epoch)
        if self.repeats == 1 and (not self.shuffle or self.classes is None):
            return EpochOrder(positions, positions)
        return EpochOrder(positions, positions + (repetitions(positions) << _REPETITION))

    def _positions(self, epoch: int) -> Tensor:
        order = self._each_once(epoch)
        return order if self.repeats == 1 else order.repeat_interleave(self.repeats)[: self.count]

    def _each_once(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.count)
        if self.classes is not None:
            return balanced_order(self.seed, epoch, self.classes)
        if self.blocks is None:
            return epoch_order(self.seed, epoch, self.count)
        return block_order(self.seed, epoch, self.blocks)

    def share(self, epoch: int, offset: int, count: int, shard: tuple[int, int]) -> list[int]:
        """Returns the positions in the split of a shard's samples of one batch.

        Args:
            epoch: Counted from 0.
            offset: Index of the batch's first sample in the order of the epoch.
            count: Samples per batch; an epoch's last batch may have fewer.
            shard: Index of the shard and number of shards.
        """
        low, high = shard_bounds(max(min(count, self.count - offset), 0), *shard)
        positions: list[int] = self._positions(epoch)[offset + low : offset + high].tolist()
        return positions


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


def block_order(seed: int, epoch: int, blocks: Blocks) -> Tensor:
    """Returns an order in which an epoch reads few blocks at a time: all samples of some blocks, then those of others.

    The blocks are divided into groups of at most ``window`` blocks, and of equal numbers as far as possible, at random
    and anew in each epoch. The groups follow each other, and the samples within a group are in random order. If samples
    were put into blocks at random, each batch is as good a sample of the data set as in :func:`epoch_order`. If blocks
    differ, for example because they are sorted by class, a batch shows the ``window`` blocks of its group only. With a
    window of all blocks the order is that of :func:`epoch_order`.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        blocks: The block of each sample, and the window.

    Returns:
        A permutation, int64 [count], that depends on the arguments only.
    """
    order = epoch_order(seed, epoch, len(blocks.numbers))
    count = int(blocks.numbers.max()) + 1 if len(order) else 0
    groups = -(-count // blocks.window)
    # The random place of each block, as the group into which that place falls.
    places = torch.empty(count, dtype=torch.int64)
    places[rng.permutation(rng.key(_BLOCKS, seed, epoch), count)] = torch.arange(count) * groups // max(count, 1)
    return order[torch.argsort(places[blocks.numbers[order]], stable=True)]


def part_sizes(count: int, parts: int) -> list[int]:
    """Sizes of the parts into which :func:`shard_bounds` and ``Tensor.tensor_split`` divide ``count`` samples."""
    size, larger = divmod(count, parts)
    return [size + (index < larger) for index in range(parts)]


def accumulated_pieces(largest: int | None, count: int, shards: int) -> int:
    """Passes that the largest share of a batch needs; replicas don't differ in it.

    Args:
        largest: Most samples of a pass; ``None``: no limit.
        count: Samples in the global batch.
        shards: How many ranks share it.
    """
    return 1 if largest is None else math.ceil(math.ceil(count / shards) / largest)


def shard_bounds(count: int, index: int, shards: int) -> tuple[int, int]:
    """Returns the half-open range of ``count`` samples that belongs to shard ``index`` of ``shards``.

    The ranges are contiguous and contain every sample once. Their sizes differ by at most one; the first shards have
    the larger ranges. With fewer samples than shards, the last ranges are empty.
    """
    size, larger = divmod(count, shards)
    start = index * size + min(index, larger)
    return start, start + size + (index < larger)
