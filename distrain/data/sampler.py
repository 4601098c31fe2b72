"""Which samples a step sees: one order for the whole job, and each shard's contiguous share of a batch."""

from __future__ import annotations

from torch import Tensor

from distrain import rng

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
    return rng.permutation(rng.key(_ORDER, seed, epoch), count)


def batch_share(seed: int, samples: int, epoch: int, offset: int, count: int, shard: tuple[int, int]) -> list[int]:
    """Positions in the split of a shard's samples of one batch.

    Args:
        seed: The run's seed.
        samples: In the split.
        epoch: Counted from 0.
        offset: First sample of the batch, in the order of the epoch.
        count: Samples of the batch; the last one of an epoch may have fewer.
        shard: ``(index, count)``.
    """
    low, high = shard_bounds(max(min(count, samples - offset), 0), *shard)
    found: list[int] = epoch_order(seed, epoch, samples)[offset + low : offset + high].tolist()
    return found


def shard_bounds(count: int, index: int, shards: int) -> tuple[int, int]:
    """The half-open range of ``count`` samples that shard ``index`` of ``shards`` takes.

    Ranges are contiguous, cover everything once, and differ by at most one sample (the first ones are longer); with
    fewer samples than shards the last ones are empty.
    """
    share, extra = divmod(count, shards)
    start = index * share + min(index, extra)
    return start, start + share + (index < extra)
