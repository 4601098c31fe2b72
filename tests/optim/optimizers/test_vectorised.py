"""LAMB, LARS, Lion and schedule-free AdamW make the updates of their papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.optim.optimizers import modes, vectorised
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.live_memory import LiveMemory
from tests.runs import small

SHAPES = {"conv.weight": (4, 3, 3, 3), "norm.weight": (4,), "head.weight": (5, 4), "head.bias": (5,)}
RATES = [0.01, 0.02, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.005, 0.001]
#: The parameter after each update with a gradient and a rate; weight decay is 0.1.
Reference = Callable[[Tensor, Iterator[tuple[Tensor, float]]], Iterator[Tensor]]


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def lamb(w: Tensor, steps: Iterator[tuple[Tensor, float]]) -> Iterator[Tensor]:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (g, lr) in enumerate(steps, 1):
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
        update = m / (1 - 0.8**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + 0.1 * w
        w = w - lr * w.norm() / update.norm() * update
        yield w


def lars(w: Tensor, steps: Iterator[tuple[Tensor, float]]) -> Iterator[Tensor]:
    m = torch.zeros_like(w)
    for g, lr in steps:
        ratio = 0.02 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8)
        m = 0.9 * m + ratio * (g + 0.1 * w)
        w = w - lr * m
        yield w


def lion(w: Tensor, steps: Iterator[tuple[Tensor, float]]) -> Iterator[Tensor]:
    m = torch.zeros_like(w)
    for g, lr in steps:
        w = w - lr * ((0.9 * m + 0.1 * g).sign() + 0.1 * w)
        m = 0.99 * m + 0.01 * g
        yield w


def schedule_free(y: Tensor, steps: Iterator[tuple[Tensor, float]]) -> Iterator[Tensor]:
    """The average x, from the paper's three sequences."""
    x, z, v, largest, total = y, y, torch.zeros_like(y), 0.0, 0.0
    for t, (g, lr) in enumerate(steps, 1):
        v = 0.99 * v + 0.01 * g**2
        z = z - lr * (g / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + 0.1 * y)
        largest = max(largest, lr)
        total += largest**2
        x = x + largest**2 / total * (z - x)
        y = 0.1 * z + 0.9 * x
        yield x


CASES: dict[str, tuple[Reference, tuple[str, ...]]] = {
    "lamb": (lamb, ("optimizer.betas=[0.8,0.99]",)),
    "lars": (lars, ("optimizer.trust_coefficient=0.02",)),
    "lion": (lion, ()),
    "schedule_free_adamw": (schedule_free, ("optimizer.betas=[0.9,0.99]",)),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_updates_are_those_of_the_formulas(name: str) -> None:
    reference, keys = CASES[name]
    starts = drawn(0)
    # Parameters of one group may have been updated another number of times: this one is frozen in the first two.
    late = "head.bias"
    ours = {key: nn.Parameter(value.clone()) for key, value in starts.items()}
    config = small(f"optimizer={name}", "optimizer.weight_decay=0.1", *keys).optimizer
    optimizer = build_optimizer(config, list(ours.items()))
    gradients = [drawn(seed) for seed in range(1, 11)]
    for update, rate in enumerate(RATES):
        modes.for_training(optimizer)
        for key, parameter in ours.items():
            parameter.grad = None if key == late and update < 2 else gradients[update][key].clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for key, parameter in ours.items():
            assert parameter.grad is None or parameter.grad.equal(gradients[update][key])
    modes.for_evaluation(optimizer)
    for key, parameter in ours.items():
        first = 2 if key == late else 0
        steps = zip((gradient[key] for gradient in gradients[first:]), RATES[first:], strict=True)
        *_, expected = reference(starts[key], iter(steps))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_an_update_needs_memory_for_some_parameters_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorised, "_MOST_BYTES", 2 * 400)
    parameters = [nn.Parameter(torch.ones(size)) for size in (100, 100, 10, 90, 100, 500, *[100] * 20)]
    optimizer = build_optimizer(small(f"optimizer={name}").optimizer, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with LiveMemory(torch.device("cpu")) as live:
        optimizer.step()
    # At most four tensors at a time are made for each parameter, the largest of which has 2,000 bytes.
    assert live.peak <= 4 * 2000 + 1000


@pytest.mark.parametrize(("name", "plain"), [("lamb", "adam"), ("lars", "sgd")])
def test_without_weight_decay_updates_are_not_scaled_by_norms(name: str, plain: str) -> None:
    shared = "optimizer.momentum=0.9" if plain == "sgd" else "optimizer.eps=1e-6"
    results = []
    for each in (name, plain):
        parameter = nn.Parameter(drawn(0)["conv.weight"])
        config = small(f"optimizer={each}", "optimizer.weight_decay=0", "optimizer.lr=0.1", shared).optimizer
        optimizer = build_optimizer(config, [("conv.weight", parameter)])
        for seed in (1, 2):
            parameter.grad = drawn(seed)["conv.weight"]
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_parameters_of_zeros_are_updated(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(3, 3))
    optimizer = build_optimizer(small(f"optimizer={name}").optimizer, [("head.weight", parameter)])
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    assert bool((parameter < 0).all())


def test_a_change_of_modes_and_back_gives_the_same_bits() -> None:
    parameter = nn.Parameter(drawn(0)["conv.weight"].float())
    optimizer = build_optimizer(small("optimizer=schedule_free_adamw").optimizer, [("conv.weight", parameter)])
    modes.for_evaluation(optimizer)
    for seed in (1, 2):
        modes.for_training(optimizer)
        parameter.grad = drawn(seed)["conv.weight"].float()
        optimizer.step()
    trained = parameter.detach().clone()
    for _ in range(2):
        modes.for_evaluation(optimizer)
    assert not parameter.detach().equal(trained)
    modes.for_training(optimizer)
    assert parameter.detach().equal(trained)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("optimizer=lion", "optimizer.betas=[0.9]"), r"optimizer\.betas=\[0\.9\]: must be two numbers"),
        (("optimizer=schedule_free_adamw", "optimizer.betas=[0,0.9]"), "must begin with a number above 0"),
        (("optimizer=schedule_free_adamw", "optimizer.lookahead.every=2"), "averages by itself"),
        (("optimizer=schedule_free_adamw", "optimizer.groups=[{match: a, epochs: 1}]"), "can't freeze a group"),
    ],
)
def test_values_that_make_no_sense_are_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(*keys)
