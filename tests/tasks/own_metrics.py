"""Metrics as a user writes them, one of which is not the same on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Distances(Metric):
    """Largest, smallest and mean distance of the true class's probability from 1; their sum."""

    higher_is_better = None
    total: Tensor
    count: Tensor
    largest: Tensor
    smallest: Tensor
    kept: list[Tensor]

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")
        self.add_state("smallest", torch.tensor(9.0), dist_reduce_fx="min")
        self.add_state("kept", [], dist_reduce_fx=None)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        distances = self.scale * (1 - outputs.gather(1, targets[:, None]).squeeze(1))
        self.total += distances.sum()
        self.count += len(distances)
        self.largest = self.largest.maximum(distances.max())
        self.smallest = self.smallest.minimum(distances.min())
        self.kept.append(distances.max())

    def compute(self) -> Tensor:
        assert float(torch.stack(list(self.kept)).max()) == float(self.largest)
        return self.total / self.count + self.largest + self.smallest


class MeanOfMeans(Metric):
    """The mean of the ranks' means, which is not the mean of the samples."""

    higher_is_better = True
    mean: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        seen = self.seen + len(outputs)
        self.mean = (self.mean * self.seen + outputs.amax(1).sum()) / seen
        self.seen = seen

    def compute(self) -> Tensor:
        return self.mean


class Stateless(Metric):
    """Keeps nothing."""

    def update(self, *_: Any) -> None:
        pass

    def compute(self) -> Tensor:
        return torch.tensor(0.0)
