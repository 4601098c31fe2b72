"""Muon orthogonalises the updates of matrices, and uses SGD for all other parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.muon import orthogonalise
from tests.runs import small


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_optimizer(named: list[tuple[str, nn.Parameter]], *overrides: str) -> torch.optim.Optimizer:
    return build_optimizer(small("optimizer=muon", "optimizer.lr=0.1", *overrides).optimizer, named)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (1, 5)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = random_tensor(*shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = s / s.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    actual = orthogonalise(1000 * matrix, 5)
    torch.testing.assert_close(actual, u @ values.diag() @ v, rtol=1e-6, atol=1e-6)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_an_update_of_zeros_stays_zero() -> None:
    assert orthogonalise(torch.zeros(3, 4), 5).equal(torch.zeros(3, 4))


@pytest.mark.parametrize("nesterov", [True, False])
def test_convolution_weights_are_updated_by_orthogonalised_momentum(nesterov: bool) -> None:
    start = random_tensor(8, 1, 2, 2)
    weight = nn.Parameter(start.clone())
    optimizer = make_optimizer(
        [("conv", weight)], "optimizer.momentum=0.5", f"optimizer.nesterov={nesterov}", "optimizer.weight_decay=0.2"
    )
    expected, momentum = start, torch.zeros_like(start)
    for seed in (1, 2):
        gradient = random_tensor(8, 1, 2, 2, seed=seed)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.5 * momentum + gradient
        direction = gradient + 0.5 * momentum if nesterov else momentum
        update = orthogonalise(direction.view(8, 4), 5).view(8, 1, 2, 2)
        # The matrix has twice as many rows as columns.
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 2**0.5 * update
    torch.testing.assert_close(weight.detach(), expected)


def test_vectors_and_weights_named_by_sgd_match_are_updated_by_sgd() -> None:
    starts = {"inner.bias": random_tensor(4, seed=1), "head.linear": random_tensor(4, 4, seed=2)}
    ours = {name: nn.Parameter(value.clone()) for name, value in starts.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in starts.items()}
    optimizer = make_optimizer(
        list(ours.items()), "optimizer.momentum=0.9", "optimizer.sgd_lr_factor=3", "optimizer.weight_decay=0.1"
    )
    reference = torch.optim.SGD(theirs.values(), lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1)
    for seed in (3, 4):
        for parameters in (ours, theirs):
            for name, parameter in parameters.items():
                parameter.grad = random_tensor(*starts[name].shape, seed=seed)
        optimizer.step()
        reference.step()
    for name in starts:
        torch.testing.assert_close(ours[name].detach(), theirs[name].detach())


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov=true: needs optimizer\.momentum above 0"):
        small("optimizer=muon", "optimizer.momentum=0")
