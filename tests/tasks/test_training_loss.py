"""The loss of a training step with auxiliary heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distrain.data.base import DataSpec
from distrain.tasks import base as tasks
from distrain.tasks.training_loss import training_loss
from tests.runs import small


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_auxiliary_heads_count_by_their_weight(weight: float) -> None:
    task = tasks.build(small(), DataSpec(3, 8, 8, ("a", "b", "c")))
    generator = torch.Generator().manual_seed(0)
    logits, first, second = (torch.randn(5, 3, generator=generator) for _ in range(3))
    targets = torch.tensor([0, 1, 2, 0, 1])
    found, loss, count = training_loss(task, (logits, first, torch.zeros(5, 9), second), targets, weight)
    losses = [F.cross_entropy(each, targets, reduction="sum") for each in (logits, first, second)]
    assert found is logits
    assert count == 5
    torch.testing.assert_close(loss, losses[0] + weight * (losses[1] + losses[2]))
