"""An optimizer that can't continue from a saved state is known before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.config import registry
from distrain.config.groups import OptimizerConfig
from distrain.config.registry import Choice, choices
from distrain.optim.optimizers import saved_state
from distrain.optim.optimizers.build import build_optimizer
from tests.runs import small


def amsgrad(config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """A user's optimizer, whose name is always the same."""
    return torch.optim.Adam(groups, lr=config.lr, amsgrad=amsgrad_is_on)


def pairs(config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool | None) -> torch.optim.Optimizer:
    """One that updates no small parameter."""
    if any(parameter.numel() < 100 for group in groups for _, parameter in group["params"]):
        raise RuntimeError("too small")
    return torch.optim.Adam(groups, lr=config.lr)


amsgrad_is_on = False


@pytest.fixture(autouse=True)
def choices_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices("optimizer")  # which registers distrain's own
    for name, target in (("amsgrad_for_test", amsgrad), ("pairs_for_test", pairs)):
        monkeypatch.setitem(registry._CHOICES["optimizer"], name, Choice("optimizer", name, OptimizerConfig, target))


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 10, bias=False))


def saved(config: OptimizerConfig) -> tuple[dict[str, torch.Size], dict[str, Any]]:
    """The state after two updates."""
    trained = model()
    optimizer = build_optimizer(config, trained.named_parameters(), total_steps=9)
    for _ in range(2):
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.named_parameters()}
    tensors, scalars = named_state.optimizer_state(optimizer, names)
    return {name: tensor.shape for name, tensor in tensors.items()}, scalars


def named(name: str) -> OptimizerConfig:
    config = small("optimizer=adam").optimizer
    return OptimizerConfig(name, config.lr, config.weight_decay, config.fused)


#: Settings before and after a resume that may be changed.
CHANGES = [
    ("optimizer=adam", "optimizer.lookahead.every=2"),
    ("optimizer=sgd optimizer.momentum=0", "optimizer.momentum=0.9"),
    ("optimizer=sgd optimizer.momentum=0.9", "optimizer.momentum=0"),
    ("optimizer=sgd optimizer.momentum=0", "optimizer.momentum=0.9 optimizer.nesterov=true"),
    ("optimizer=muon", "optimizer.sgd_match=[0.*,2.*]"),
    ("optimizer=adamw", "optimizer.groups=[{match:'*.bias',lr_factor:2}]"),
    ("optimizer=adam optimizer.lookahead.every=2", "optimizer.lookahead.every=null"),
]


@pytest.mark.parametrize(("before", "change"), CHANGES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_settings_that_may_change_are_accepted(before: str, change: str, device: str) -> None:
    shapes, scalars = saved(small(*before.split()).optimizer)
    saved_state.check_saved_state(
        small(*before.split(), *change.split()).optimizer, model().to(device), shapes, scalars
    )


def test_state_that_the_optimizer_misses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = named("amsgrad_for_test")
    shapes, scalars = saved(config)
    saved_state.check_saved_state(config, model(), shapes, scalars)
    monkeypatch.setitem(globals(), "amsgrad_is_on", True)
    misses = r"^optimizer=amsgrad_for_test can't continue from the saved state .*KeyError: 'max_exp_avg_sq'"
    with pytest.raises(ValueError, match=misses):
        saved_state.check_saved_state(config, model(), shapes, scalars)


def test_state_without_a_part_is_refused() -> None:
    config = small("optimizer=adam").optimizer
    shapes, scalars = saved(config)
    del shapes["2.weight/exp_avg"]
    with pytest.raises(ValueError, match=r"^optimizer=adam can't continue from .*exp_avg"):
        saved_state.check_saved_state(config, model(), shapes, scalars)


def test_parameters_without_state_and_state_without_parameter_are_accepted() -> None:
    config = small("optimizer=adam").optimizer
    shapes, scalars = saved(config)
    shapes = {key.replace("2.", "gone."): shape for key, shape in shapes.items()}
    saved_state.check_saved_state(config, model(), shapes, scalars)


def test_an_optimizer_that_takes_no_small_parameters_is_not_tried() -> None:
    shapes, scalars = saved(small("optimizer=adam").optimizer)
    del shapes["2.weight/exp_avg"]
    saved_state.check_saved_state(named("pairs_for_test"), model(), shapes, scalars)
