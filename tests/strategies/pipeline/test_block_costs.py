"""Measured costs of a model's blocks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from distrain.models.base import BlockSequence
from distrain.strategies.pipeline.block_costs import measure_blocks


def test_measuring_blocks_leaves_the_model_as_it_is() -> None:
    model = BlockSequence({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = measure_blocks(model, torch.randn(2, 3, 8, 8), nullcontext)
    assert [cost.name for cost in costs] == ["conv", "norm", "flat"]
    assert [cost.parameters for cost in costs] == [112, 8, 0]
    assert costs[0].output_bytes == 2 * 4 * 6 * 6 * 4
    assert all(cost.forward_ms > 0 and cost.backward_ms > 0 for cost in costs)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
