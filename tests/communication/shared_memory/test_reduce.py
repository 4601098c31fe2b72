"""Ranks that reduce together get the bits that each would get alone, however far the others are."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from distrain.communication.shared_memory.reduce import PublishedSegment, reduce_alone, reduce_together, segment_size

COUNT = 700_001
RANKS = 3


def sources() -> list[Tensor]:
    return [torch.randn(COUNT, generator=torch.Generator().manual_seed(rank)) for rank in range(RANKS)]


def segments(filled: float) -> list[PublishedSegment]:
    return [
        PublishedSegment(memoryview(bytearray(8)).cast("q"), 0, torch.full((segment_size(COUNT, RANKS),), filled))
        for _ in range(RANKS)
    ]


@pytest.mark.parametrize("rank", range(RANKS))
def test_rank_without_help_computes_everything(rank: int) -> None:
    given = sources()
    expected = functools.reduce(torch.add, given)
    nobody_ready = segments(float("nan"))
    into = given[rank].clone()
    if rank < 2:
        given[rank] = into
    reduce_together(given, into, torch.add, rank, nobody_ready)
    assert torch.equal(into, expected)
    # It publishes its own segment for the others.
    start = rank * segment_size(COUNT, RANKS)
    own = expected[start : start + segment_size(COUNT, RANKS)]
    assert torch.equal(nobody_ready[rank].values[: len(own)], own)
    assert nobody_ready[rank].words[0] == -(-len(own) * 4 // (1 << 18))
    assert [segment.words[0] for segment in nobody_ready].count(0) == RANKS - 1


def test_pieces_that_others_have_ready_are_copied() -> None:
    given, into = sources(), torch.empty(COUNT)
    some_ready = segments(7.0)
    # All of rank 1's segment, and the first piece of rank 2's.
    some_ready[1].words[0], some_ready[2].words[0] = 1000, 1
    reduce_together(given, into, torch.add, 0, some_ready)
    size, piece = segment_size(COUNT, RANKS), (1 << 18) // 4
    assert bool((into[size : 2 * size + piece] == 7).all())
    expected = functools.reduce(torch.add, given)
    assert torch.equal(into[:size], expected[:size])
    assert torch.equal(into[2 * size + piece :], expected[2 * size + piece :])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_there_may_be_fewer_elements_than_ranks(count: int) -> None:
    given = [torch.full((count,), float(10**rank)) for rank in range(RANKS)]
    into, alone = torch.empty(count), torch.empty(count)
    reduce_together(given, into, torch.add, 2, segments(float("nan")))
    reduce_alone(given, alone, torch.add)
    assert into.tolist() == alone.tolist() == [111.0] * count
