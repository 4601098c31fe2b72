"""What tests of tasks share: a task for some data, and its metrics of a split that ranks evaluate in ragged pieces."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.tasks import base
from distrain.tasks.base import MetricState, Task
from tests.runs import compose

#: Sizes of the batches of each of three ranks; the last rank has no sample.
_PIECES = ((1, 7, 13), (5, 4), ())


@functools.cache
def _composed(*overrides: str) -> Config:
    return compose("data=synthetic", *overrides)


def task_for(target: str, *overrides: str, classes: int = 4, height: int = 5, width: int = 6) -> Task:
    """The task of a configuration, for data with this kind of targets."""
    names = tuple("abcdefgh"[:classes])
    return base.build(_composed(*overrides), DataSpec(3, height, width, names, target=target))


def count() -> int:
    """Samples of the split."""
    return sum(map(sum, _PIECES))


def summed_state(task: Task, outputs: Tensor, targets: Tensor) -> MetricState:
    """What three ranks count together, each by batches of its own sizes."""
    total = task.metric_state(torch.device("cpu"))
    start = 0
    for sizes in _PIECES:
        mine = task.metric_state(torch.device("cpu"))
        for size in sizes:
            task.update_state(mine, outputs[start : start + size], targets[start : start + size])
            start += size
        for name, sums in mine.items():
            total[name] += sums
    assert start == len(outputs)
    return total


def trained_means(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """The means that training logs, from sums over pieces."""
    sums = sum(task.measure(o, t).double() for o, t in zip(outputs.split(4), targets.split(4), strict=True))
    assert isinstance(sums, Tensor)
    return dict(zip(task.metrics, (sums / len(outputs)).tolist(), strict=True))
