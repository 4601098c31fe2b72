"""Lookahead follows its paper's algorithm with any optimizer, and is saved in the optimizer's state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.world import World
from tests.runs import check, small

START = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def gradient(step: int) -> Tensor:
    return torch.sin(START + step)


def make_optimizer(parameter: nn.Parameter, *overrides: str) -> torch.optim.Optimizer:
    config = small("optimizer.lookahead.every=3", "optimizer.lookahead.keep=0.6", *overrides).optimizer
    return build_optimizer(config, [("weight", parameter)], total_steps=8)


def values_after_each_step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: range) -> list[Tensor]:
    values = []
    for step in steps:
        parameter.grad = gradient(step)
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_parameters_are_reset_to_the_slow_copy_in_a_merge(power: float) -> None:
    parameter = nn.Parameter(START.clone())
    optimizer = make_optimizer(parameter, "optimizer=sgd", "optimizer.lr=0.1", f"optimizer.lookahead.power={power}")
    actual = values_after_each_step(optimizer, parameter, range(8))
    fast, slow, expected = START, START, []
    for step in range(8):
        fast = fast - 0.1 * gradient(step)
        if step + 1 in (3, 6):
            keep = 0.6 * ((step + 1) / 8) ** power
            fast = slow = keep * slow + (1 - keep) * fast
        expected.append(fast)
    # After the run's last update the parameters are the slow copy.
    expected[-1] = slow
    for value, expected_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, expected_value)


@pytest.mark.parametrize("choice", ["sgd", "adam", "adamw", "muon"])
def test_resuming_from_its_state_is_bit_for_bit_exact(choice: str) -> None:
    uninterrupted = nn.Parameter(START.clone())
    expected = values_after_each_step(make_optimizer(uninterrupted, f"optimizer={choice}"), uninterrupted, range(8))[-1]
    first, second = nn.Parameter(START.clone()), nn.Parameter(START.clone())
    before, after = make_optimizer(first, f"optimizer={choice}"), make_optimizer(second, f"optimizer={choice}")
    values_after_each_step(before, first, range(4))
    with torch.no_grad():
        second.copy_(first)
    named_state.load_optimizer(after, {second: "weight"}, *named_state.optimizer_state(before, {first: "weight"}))
    assert values_after_each_step(after, second, range(4, 8))[-1].equal(expected)


def test_local_sgd_refuses_lookahead_and_groups_with_epochs() -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, host="here")
    with pytest.raises(ConfigError, match=r"^optimizer\.lookahead\.every=5: strategy=local_sgd keeps a slow copy"):
        check(small("strategy=local_sgd", "optimizer.lookahead.every=5"), world)
    with pytest.raises(ConfigError, match=r"^optimizer\.groups: epochs can't be counted"):
        check(small("strategy=local_sgd", "optimizer.groups=[{match: '*.bias', epochs: 1}]"), world)


@pytest.mark.parametrize(
    ("overrides", "ranks", "line"),
    [
        (("trainer.precision=fp16",), 1, "needs every update"),
        (("trainer.on_nonfinite=skip",), 1, "needs every update"),
        (("strategy=parameter_server", "strategy.mode=async"), 2, "needs workers that keep step, not mode=async"),
    ],
)
def test_settings_that_may_skip_updates_are_refused(overrides: tuple[str, ...], ranks: int, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.lookahead\.every=5: {line}"):
        check(small("optimizer.lookahead.every=5", *overrides), World(0, ranks, 0, ranks, "here"))
