"""The loss of what a model returns in training, with that of its auxiliary heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distrain.data.batch import Targets
from distrain.models.outputs import auxiliary_logits, logits_of
from distrain.tasks.base import Task


def training_loss(task: Task, output: Any, targets: Targets, auxiliary_weight: float) -> tuple[Tensor, Tensor, int]:
    """What a training step needs of a forward pass.

    Args:
        task: Gives the loss.
        output: What the model returned.
        targets: Of the same samples.
        auxiliary_weight: Weight of the loss of each auxiliary head; see
            :func:`distrain.models.outputs.auxiliary_logits`.

    Returns:
        The logits; the sum of the samples' losses, those of auxiliary heads added; and the number of samples.
    """
    logits = logits_of(output)
    loss_sum, count = task.loss(logits, targets)
    if auxiliary_weight:
        for auxiliary in auxiliary_logits(output).values():
            loss_sum = loss_sum + auxiliary_weight * task.loss(auxiliary, targets)[0]
    return logits, loss_sum, count
