"""Optimizers compute the textbook updates, with fused kernels where torch has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.config.groups import OptimizerConfig
from distrain.errors import ConfigError
from distrain.optim.optimizers.adam import AdamConfig
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.sgd import SGDConfig

START = torch.tensor([1.0, -2.0, 3.0, 0.5])
GRADIENTS = [torch.tensor([0.5, -1.0, 2.0, 4.0]), torch.tensor([-1.0, 0.25, 1.0, 2.0])]


def sgd(**changes: Any) -> SGDConfig:
    values = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "fused": True, "momentum": 0.0, "nesterov": False}
    return SGDConfig(**{**values, **changes})


def adam(name: str, **changes: Any) -> AdamConfig:
    values = {"name": name, "lr": 0.1, "weight_decay": 0.0, "fused": True, "betas": [0.9, 0.999], "eps": 1e-8}
    return AdamConfig(**{**values, **changes})


def after_steps(config: OptimizerConfig, gradients: list[Tensor] = GRADIENTS) -> Tensor:
    parameter = nn.Parameter(START.clone())
    optimizer = build_optimizer(config, [parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_plain_sgd_is_gradient_descent() -> None:
    expected = START - 0.1 * GRADIENTS[0] - 0.1 * GRADIENTS[1]
    torch.testing.assert_close(after_steps(sgd()), expected)


def test_momentum_adds_up_decayed_gradients() -> None:
    first, second = GRADIENTS
    velocity = 0.9 * first + second
    torch.testing.assert_close(after_steps(sgd(momentum=0.9)), START - 0.1 * first - 0.1 * velocity)
    looking_ahead = START - 0.1 * (first + 0.9 * first) - 0.1 * (second + 0.9 * velocity)
    torch.testing.assert_close(after_steps(sgd(momentum=0.9, nesterov=True)), looking_ahead)


def test_sgd_adds_weight_decay_to_the_gradient() -> None:
    expected = START - 0.1 * (GRADIENTS[0] + 0.5 * START)
    torch.testing.assert_close(after_steps(sgd(weight_decay=0.5), GRADIENTS[:1]), expected)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_divides_the_first_moment_by_the_square_root_of_the_second(name: str) -> None:
    expected, first, second = START.double(), torch.zeros(4).double(), torch.zeros(4).double()
    for step, gradient in enumerate(GRADIENTS, start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        expected -= 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
    actual = after_steps(adam(name, betas=[0.8, 0.9], eps=1e-3))
    torch.testing.assert_close(actual, expected.float())


def test_only_adamw_decouples_weight_decay_from_the_gradient() -> None:
    zero_gradients = [torch.zeros(4)]
    torch.testing.assert_close(after_steps(adam("adamw", weight_decay=0.5), zero_gradients), START * (1 - 0.1 * 0.5))
    torch.testing.assert_close(after_steps(adam("adam", weight_decay=0.5), zero_gradients), START - 0.1 * START.sign())


@pytest.mark.parametrize("config", [sgd, lambda **c: adam("adam", **c), lambda **c: adam("adamw", **c)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_kernels_are_used_if_configured_and_give_the_same_result(config: Any, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    assert build_optimizer(config(fused=True), [parameter]).defaults["fused"] is True
    assert not build_optimizer(config(fused=False), [parameter]).defaults["fused"]
    torch.testing.assert_close(after_steps(config(fused=True)), after_steps(config(fused=False)))


@pytest.mark.parametrize("other", [torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)])
def test_one_parameter_without_a_fused_kernel_excludes_it_for_all(other: Tensor) -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(other)]
    assert not build_optimizer(sgd(fused=True), parameters).defaults["fused"]


def test_parameters_may_have_names() -> None:
    model = nn.Linear(2, 3)
    optimizer = build_optimizer(adam("adam"), model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov=true: needs optimizer\.momentum above 0"):
        sgd(nesterov=True)


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999]])
def test_adam_needs_two_betas(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas=.*must be two numbers"):
        adam("adam", betas=betas)
