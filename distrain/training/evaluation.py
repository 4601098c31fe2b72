"""Exact evaluation: every sample once, counts as integers, however many ranks share the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.reporting.metrics import Totals

if TYPE_CHECKING:
    from distrain.data.loader import Loader
    from distrain.strategies.base import Strategy


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a split.

    Attributes:
        loss: Mean over the samples.
        correct: Samples classified right.
        count: Samples.
        confusion: int64 ``[classes, classes]`` on the CPU: true class by row, predicted class by column.
        watched: Predicted class of each watched sample, int64 on the CPU.
    """

    loss: float
    correct: int
    count: int
    confusion: Tensor
    watched: Tensor

    @property
    def accuracy(self) -> float:
        """Share of samples classified right."""
        return self.correct / self.count


def evaluate(
    strategy: Strategy, loader: Loader, communicator: Communicator, classes: int, watch: Sequence[int] = ()
) -> Evaluation:
    """Runs a split through the model; all ranks call it together.

    Args:
        strategy: Holds the model.
        loader: This rank's shard of the split.
        communicator: All ranks.
        classes: Number of classes.
        watch: Positions in the split whose predictions are wanted.
    """
    device = strategy.runtime.device
    totals = Totals(device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    wanted = torch.tensor(list(watch), dtype=torch.int64)
    watched = torch.zeros(len(wanted), dtype=torch.int64, device=device)
    for batch in loader.epoch(0):
        result = strategy.eval_step(batch)
        strategy.runtime.activity.progress += 1
        totals.add(result.loss_sum, result.correct, result.count)
        if result.predictions is not None and result.count:
            cells = batch.labels * classes + result.predictions
            confusion += torch.bincount(cells, minlength=classes * classes)
            slot, row = (wanted[:, None] == batch.indices[None, :]).nonzero(as_tuple=True)
            watched[slot.to(device)] = result.predictions[row.to(device)]
    # Each sample was seen by one rank, so sums over the ranks are the whole split's.
    loss, correct, count = communicator.all_reduce(totals.take()).tolist()
    communicator.all_reduce(confusion)
    communicator.all_reduce(watched)
    return Evaluation(loss / count, int(correct), int(count), confusion.view(classes, classes).cpu(), watched.cpu())
