"""Cuts: exact, where they are allowed, and refused with the reason where they are not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from distrain.errors import ConfigError
from distrain.models.base import BlockSequence
from distrain.strategies.pipeline import split


def linear(count: int) -> BlockSequence:
    return BlockSequence({f"block{n}": nn.Linear(4, 4) for n in range(count)})


def test_blocks_that_share_a_parameter_stay_together() -> None:
    model = linear(4)
    model[2].weight = model[0].weight
    assert split.allowed_cuts(model) == [3]
    with pytest.raises(ConfigError, match=r"strategy.stages=3: .*leaves 1 cuts"):
        split.check(model, 3, [])
    with pytest.raises(ConfigError, match=r"strategy.boundaries=block1: lies between blocks that share"):
        split.check(model, 2, ["block1"])


@pytest.mark.parametrize(
    ("model", "stages", "boundaries", "message"),
    [
        (nn.Linear(2, 2), 2, [], "model: Linear is no nn.Sequential"),
        (linear(2), 3, [], "strategy.stages=3: the model has only 2 blocks"),
        (linear(3), 2, ["nothing"], "strategy.boundaries=nothing: is no block"),
        (linear(3), 2, ["block0"], "strategy.boundaries=block0: is no block that a stage could begin with"),
        (linear(4), 3, ["block2", "block1"], "must come in the model's order"),
        (linear(4), 3, ["block1"], "3 stages have 2 boundaries, not 1"),
    ],
)
def test_what_cannot_be_split_is_refused(model: nn.Module, stages: int, boundaries: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split.check(model, stages, boundaries)
    assert message in str(caught.value)


def test_measuring_changes_nothing_and_describes_every_block() -> None:
    model = BlockSequence({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = split.measure(model, torch.randn(2, 3, 8, 8), nullcontext)
    assert [cost.name for cost in costs] == ["conv", "norm", "flat"]
    assert [cost.parameters for cost in costs] == [112, 8, 0]
    assert costs[0].output_bytes == 2 * 4 * 6 * 6 * 4
    assert all(cost.forward_ms > 0 and cost.backward_ms > 0 for cost in costs)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
