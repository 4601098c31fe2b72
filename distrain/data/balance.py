"""data.balance: classes of unequal size count equally, by how often they are drawn or by weights of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain import rng

#: Identifies balanced orders among the uses of random numbers.
_BALANCE = 9


def balanced_order(seed: int, epoch: int, classes: Tensor) -> Tensor:
    """The samples of an epoch in which all classes are equally frequent, as positions in their order.

    The epoch has as many samples as the split. A class gets its equal share of them; the one left over by the division
    goes to other classes in every epoch. Within a class each sample is drawn as often as each other one, or once more:
    a large class has other samples in every epoch, those of a small one are repeated.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        classes: int64 [count], class of each sample.

    Returns:
        int64 [count].
    """
    count = len(classes)
    present = classes.unique().tolist()
    share, larger = divmod(count, len(present))
    lucky = set(rng.permutation(rng.key(_BALANCE, seed, epoch), len(present))[:larger].tolist())
    drawn = []
    for place, label in enumerate(present):
        members = (classes == label).nonzero().squeeze(1)
        order = members[rng.permutation(rng.key(_BALANCE, seed, epoch, 1, label), len(members))]
        wanted = share + (place in lucky)
        drawn.append(order.repeat(-(-wanted // len(order)))[:wanted])
    samples = torch.cat(drawn)
    return samples[rng.permutation(rng.key(_BALANCE, seed, epoch, 2), count)]


def repetitions(positions: Tensor) -> Tensor:
    """How often each sample has occurred in an order before, int64 [count]."""
    order = positions.argsort(stable=True)
    ordered = positions[order]
    places = torch.arange(len(positions))
    is_first = torch.ones(len(positions), dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    started = torch.where(is_first, places, 0).cummax(0).values if len(places) else places
    counts = torch.empty_like(positions)
    counts[order] = places - started
    return counts


def class_weights(classes: Tensor, count: int) -> list[float]:
    """A weight for each class that is inversely proportional to its frequency; their mean over the samples is 1.

    Args:
        classes: int64 [N], class of each training sample.
        count: Number of classes; one without a sample has the weight 0.
    """
    sizes = torch.bincount(classes, minlength=count).tolist()
    present = sum(size > 0 for size in sizes)
    return [len(classes) / (present * size) if size else 0.0 for size in sizes]
