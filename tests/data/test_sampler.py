"""The order of samples depends on seed and epoch only, and shards divide each batch exactly."""

from __future__ import annotations

import pytest
import torch

from distrain.data.sampler import batch_share, epoch_order, shard_bounds


def test_the_order_is_a_permutation_that_depends_on_seed_epoch_and_count() -> None:
    order = epoch_order(1, 2, 500)
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(500))
    torch.manual_seed(99)
    assert epoch_order(1, 2, 500).equal(order)
    assert not epoch_order(1, 3, 500).equal(order)
    assert not epoch_order(2, 2, 500).equal(order)


def test_the_order_does_not_change_between_versions() -> None:
    # A run that is resumed in the middle of an epoch continues in this order, so it must never change.
    assert epoch_order(0, 0, 8).tolist() == [3, 4, 2, 0, 5, 6, 1, 7]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_shards_are_contiguous_and_their_sizes_differ_by_at_most_one(count: int, shards: int) -> None:
    bounds = [shard_bounds(count, index, shards) for index in range(shards)]
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])]
    assert bounds[-1][1] == count
    sizes = [high - low for low, high in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_the_shards_of_a_batch_are_the_next_samples_of_the_epoch() -> None:
    order = epoch_order(1, 2, 47).tolist()
    shares = [batch_share(1, 47, 2, 10, 10, (index, 3)) for index in range(3)]
    assert [*shares[0], *shares[1], *shares[2]] == order[10:20]
    assert [len(share) for share in shares] == [4, 3, 3]
    # The last batch of an epoch has the remaining samples.
    assert batch_share(1, 47, 2, 40, 10, (0, 1)) == order[40:]
    assert batch_share(1, 47, 2, 47, 10, (0, 1)) == []
