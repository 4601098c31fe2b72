"""The order of samples depends on seed and epoch only, and shards divide each batch exactly."""

from __future__ import annotations

import pytest
import torch

from distrain.data.sampler import Blocks, Sampler, block_order, epoch_order, shard_bounds


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
    shares = [Sampler(47, 1).share(2, 10, 10, (index, 3)) for index in range(3)]
    assert [*shares[0], *shares[1], *shares[2]] == order[10:20]
    assert [len(share) for share in shares] == [4, 3, 3]
    # The last batch of an epoch has the remaining samples.
    assert Sampler(47, 1).share(2, 40, 10, (0, 1)) == order[40:]
    assert Sampler(47, 1).share(2, 47, 10, (0, 1)) == []


@pytest.mark.parametrize(("blocks", "window"), [(1, 1), (7, 1), (7, 2), (7, 3), (7, 7), (7, 100), (40, 16)])
def test_an_epoch_by_blocks_reads_a_window_of_blocks_at_a_time(blocks: int, window: int) -> None:
    numbers = epoch_order(5, 5, 20 * blocks) % blocks
    orders = [block_order(1, epoch, Blocks(numbers, window)) for epoch in range(3)]
    groups = -(-blocks // window)
    for order in orders:
        assert order.sort().values.tolist() == list(range(20 * blocks))
        visited = [set(part.tolist()) for part in numbers[order].split(20 * -(-blocks // groups))]
        if blocks % groups == 0:
            assert len(visited) == groups
            assert all(len(part) == blocks // groups for part in visited)
        # A block is read in one go, between others of its group.
        for block in range(blocks):
            places = (numbers[order] == block).nonzero().flatten()
            assert int(places[-1] - places[0]) < 20 * min(window, blocks)
    assert not orders[0].equal(orders[1])
    assert block_order(1, 2, Blocks(numbers, window)).equal(orders[2])
    if window >= blocks:
        assert orders[2].equal(epoch_order(1, 2, 20 * blocks))


def test_the_order_by_blocks_does_not_change_between_versions() -> None:
    numbers = torch.arange(12) // 3
    assert block_order(0, 0, Blocks(numbers, 2)).tolist() == [8, 2, 0, 6, 1, 7, 3, 4, 5, 9, 10, 11]
    # None of no samples.
    assert block_order(0, 1, Blocks(torch.empty(0, dtype=torch.int64), 2)).tolist() == []
    assert Sampler(12, 0, blocks=Blocks(numbers, 2)).share(0, 8, 10, (1, 2)) == [10, 11]
