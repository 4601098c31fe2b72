"""Lookahead is its paper's algorithm around any optimizer, and lies in the optimizer's state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.cli import app
from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.world import World
from tests.runs import small

START = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def gradient(step: int) -> Tensor:
    return torch.sin(START + step)


def built(parameter: nn.Parameter, *overrides: str) -> torch.optim.Optimizer:
    config = small("optimizer.lookahead.every=3", "optimizer.lookahead.keep=0.6", *overrides).optimizer
    return build_optimizer(config, [("weight", parameter)], total_steps=8)


def trained(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: range) -> list[Tensor]:
    values = []
    for step in steps:
        parameter.grad = gradient(step)
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_fast_parameters_are_set_back_to_a_slow_copy(power: float) -> None:
    parameter = nn.Parameter(START.clone())
    optimizer = built(parameter, "optimizer=sgd", "optimizer.lr=0.1", f"optimizer.lookahead.power={power}")
    found = trained(optimizer, parameter, range(8))
    fast, slow, expected = START, START, []
    for step in range(8):
        fast = fast - 0.1 * gradient(step)
        if step + 1 in (3, 6):
            keep = 0.6 * ((step + 1) / 8) ** power
            fast = slow = keep * slow + (1 - keep) * fast
        expected.append(fast)
    # What is left of the run's last update is the slow copy.
    expected[-1] = slow
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("choice", ["sgd", "adam", "adamw", "muon"])
def test_it_goes_on_from_its_state_to_the_bit(choice: str) -> None:
    whole = nn.Parameter(START.clone())
    expected = trained(built(whole, f"optimizer={choice}"), whole, range(8))[-1]
    first, second = nn.Parameter(START.clone()), nn.Parameter(START.clone())
    before, after = built(first, f"optimizer={choice}"), built(second, f"optimizer={choice}")
    trained(before, first, range(4))
    with torch.no_grad():
        second.copy_(first)
    named_state.load_optimizer(after, {second: "weight"}, *named_state.optimizer_state(before, {first: "weight"}))
    assert trained(after, second, range(4, 8))[-1].equal(expected)


def test_local_sgd_has_a_slow_copy_of_its_own() -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, host="here")
    with pytest.raises(ConfigError, match=r"^optimizer\.lookahead\.every=5: strategy=local_sgd keeps a slow copy"):
        app.check(small("strategy=local_sgd", "optimizer.lookahead.every=5"), world)
    with pytest.raises(ConfigError, match=r"^optimizer\.groups: epochs can't be counted"):
        app.check(small("strategy=local_sgd", "optimizer.groups=[{match: '*.bias', epochs: 1}]"), world)


@pytest.mark.parametrize(
    ("overrides", "ranks", "line"),
    [
        (("trainer.precision=fp16",), 1, "needs every update"),
        (("trainer.on_nonfinite=skip",), 1, "needs every update"),
        (("strategy=parameter_server", "strategy.mode=async"), 2, "needs workers that keep step, not mode=async"),
    ],
)
def test_where_the_last_update_is_not_known_it_is_refused(overrides: tuple[str, ...], ranks: int, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.lookahead\.every=5: {line}"):
        app.check(small("optimizer.lookahead.every=5", *overrides), World(0, ranks, 0, ranks, "here"))
