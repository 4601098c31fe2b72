"""Sequences are cut exactly, and only where a cut is allowed."""

from __future__ import annotations

import itertools

import pytest
import torch

from distrain.gradients.linear_partition import linear_partition


def largest(weights: list[float], starts: tuple[int, ...]) -> float:
    return max(sum(weights[a:b]) for a, b in zip(starts, [*starts[1:], len(weights)], strict=True))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_partition_is_the_best_of_all(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.rand(9, generator=generator).tolist()
        starts = linear_partition(weights, [0.0] * 9, parts, range(1, 9))
        every = ((0, *cuts) for cuts in itertools.combinations(range(1, 9), parts - 1))
        assert largest(weights, tuple(starts)) == pytest.approx(min(largest(weights, other) for other in every))


def test_the_cost_of_a_cut_counts() -> None:
    assert linear_partition([1, 1, 1, 1], [0, 9, 0, 0], 2, [1, 2, 3]) == [0, 1]


def test_only_allowed_cuts_are_made() -> None:
    assert linear_partition([1, 1, 1, 1], [0] * 4, 2, [3]) == [0, 3]
    with pytest.raises(ValueError, match="3 parts need 2 cuts"):
        linear_partition([1, 1, 1], [0] * 3, 3, [1])
