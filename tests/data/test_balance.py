from __future__ import annotations

import pytest
import torch

from distrain.data.balance import balanced_order, class_weights, repetitions
from distrain.data.sampler import Sampler

#: 3, 40 and 57 samples of the classes 4, 0 and 2; no sample of the others.
CLASSES = torch.tensor([4] * 3 + [0] * 40 + [2] * 57)


@pytest.mark.parametrize("epoch", range(3))
def test_classes_are_equally_frequent_and_so_are_the_samples_of_a_class(epoch: int) -> None:
    order = balanced_order(1, epoch, CLASSES)
    assert len(order) == 100
    assert sorted(torch.bincount(CLASSES[order]).tolist()) == [0, 0, 33, 33, 34]
    times = torch.bincount(order, minlength=100)
    for label in (4, 0, 2):
        drawn = times[label == CLASSES]
        assert int(drawn.max() - drawn.min()) <= 1
    assert order.equal(balanced_order(1, epoch, CLASSES))
    assert not order.equal(balanced_order(1, epoch + 1, CLASSES))
    assert not order.equal(balanced_order(2, epoch, CLASSES))


def test_every_sample_of_a_large_class_is_seen_within_some_epochs() -> None:
    seen = torch.cat([balanced_order(1, epoch, CLASSES) for epoch in range(10)]).unique()
    assert len(seen) == 100


def test_each_repetition_of_a_sample_has_random_draws_of_its_own() -> None:
    assert repetitions(torch.tensor([7, 2, 7, 7, 2, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert repetitions(torch.empty(0, dtype=torch.int64)).tolist() == []
    order = Sampler(100, seed=1, classes=CLASSES).order(0)
    assert len(order.counters.unique()) == 100
    assert (order.counters % (1 << 40)).equal(order.positions)
    plain = Sampler(100, seed=1).order(0)
    assert plain.counters.equal(plain.positions)


def test_the_shares_of_ranks_are_those_of_the_balanced_order() -> None:
    sampler = Sampler(100, seed=1, classes=CLASSES)
    whole = sampler.order(2).positions.tolist()
    assert [place for index in range(3) for place in sampler.share(2, 90, 16, (index, 3))] == whole[90:]


def test_class_weights_have_the_mean_1_over_the_samples() -> None:
    weights = torch.tensor(class_weights(CLASSES, 6), dtype=torch.float64)
    assert weights.tolist() == pytest.approx([100 / 120, 0, 100 / 171, 0, 100 / 9, 0])
    assert float(weights[CLASSES].mean()) == pytest.approx(1, rel=1e-15)
