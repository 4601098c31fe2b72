"""Which samples a step sees: one order for the whole job, and each shard's contiguous share of a batch."""

from __future__ import annotations

from torch import Tensor

from distrain.data import hashing

_ORDER = 1


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits a split.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        count: Samples in the split.

    Returns:
        int64 [count], a permutation that depends on the arguments alone.
    """
    return hashing.permutation(hashing.key(_ORDER, seed, epoch), count)


def shard_bounds(count: int, index: int, shards: int) -> tuple[int, int]:
    """The half-open range of ``count`` samples that shard ``index`` of ``shards`` takes.

    Ranges are contiguous, cover everything once, and differ by at most one sample (the first ones are longer); with
    fewer samples than shards the last ones are empty.
    """
    share, extra = divmod(count, shards)
    start = index * share + min(index, extra)
    return start, start + share + (index < extra)
