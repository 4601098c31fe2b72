"""scheduler=custom: functions and torch's schedulers are functions of the step, asked in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from distrain.errors import ConfigError
from distrain.optim.schedulers import CustomScheduleConfig, Schedule, build

HERE = __name__
STEPS, PER_EPOCH = 20, 5


def falling(step: int, total_steps: int, power: float = 1.0) -> float:
    return float((1 - step / total_steps) ** power)


def by_epoch(step: int, steps_per_epoch: int) -> float:
    return 1 / (1 + step // steps_per_epoch)


def negative(step: int) -> float:
    return 1 - step


def text(step: int) -> str:
    return "fast"


def failing(step: int) -> float:
    return 1 / step


class Stranger(lr_scheduler.ConstantLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(torch.optim.SGD([torch.zeros(1)], lr=0.5))


def make(path: str, interval: str = "step", warmup_epochs: float = 0.0, steps: int = STEPS, **kwargs: Any) -> Schedule:
    prefix = "torch.optim.lr_scheduler" if hasattr(lr_scheduler, path) else HERE
    full = path if "." in path else f"{prefix}.{path}"
    config = CustomScheduleConfig(
        name="custom", warmup_epochs=warmup_epochs, _target_=full, kwargs=kwargs, interval=interval
    )
    return build(config, PER_EPOCH, steps)


def test_a_function_gets_what_it_asks_for() -> None:
    assert [make("falling", power=2.0)(step) for step in (0, 10, 19, 25)] == pytest.approx([1, 0.25, 0.0025, 0.0025])
    assert [make("by_epoch")(step) for step in (0, 4, 5, 19)] == [1, 1, 0.5, 0.25]


def test_steps_are_counted_after_the_warm_up() -> None:
    schedule = make("falling", warmup_epochs=1)
    assert schedule(2) == pytest.approx(0.5)
    assert [schedule(5), schedule(14)] == pytest.approx([1, 1 - 9 / 15])


@pytest.mark.parametrize(
    ("path", "kwargs"),
    [
        ("StepLR", {"step_size": 3, "gamma": 0.5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 4}),
        ("PolynomialLR", {"total_iters": 15, "power": 2.0}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3, "cycle_momentum": False}),
        ("OneCycleLR", {"max_lr": 1.0, "cycle_momentum": False}),
    ],
)
def test_a_torch_scheduler_gives_its_own_rates(path: str, kwargs: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    own = {**kwargs, **({"total_steps": STEPS} if path == "OneCycleLR" else {})}
    scheduler = getattr(lr_scheduler, path)(optimizer, **own)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < STEPS:
            scheduler.step()
    # A resumed run asks for a late step first.
    schedule = make(path, **kwargs)
    assert [schedule(step) for step in reversed(range(STEPS))] == pytest.approx(rates[::-1], abs=1e-12)


def test_a_torch_scheduler_may_make_its_steps_by_epochs() -> None:
    schedule = make("StepLR", interval="epoch", step_size=2, gamma=0.1)
    assert [schedule(step) for step in (0, 9, 10, 19)] == pytest.approx([1, 1, 0.1, 0.1])


def test_a_schedule_that_ends_before_the_run_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"fails at step 201 \(ValueError: Tried to step 201 times"):
        make("OneCycleLR", steps=300, total_steps=200, max_lr=1.0, cycle_momentum=False)


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("negative", {}, "gives -9.0 at step 10; the factor of the learning rate must be finite and at least 0"),
        ("text", {}, "gives 'fast' at step 0; the factor of the learning rate, a number, is needed"),
        ("failing", {}, "fails at step 0 (ZeroDivisionError: division by zero) at "),
        ("falling", {"pow": 2}, "got an unexpected keyword argument 'pow'; its arguments: step, total_steps, power"),
        ("StepLR", {}, "missing a required argument: 'step_size'"),
        ("LambdaLR", {"lr_lambda": "x"}, "fails to build (TypeError: 'str' object is not callable)"),
        ("OneCycleLR", {"max_lr": 1.0}, "changes the momentum too"),
        ("ReduceLROnPlateau", {}, "follows a metric"),
        ("Stranger", {}, "schedules another optimizer than the one it is given"),
        ("torch.nn.Linear", {}, "is neither a function of the step nor a torch LRScheduler"),
        ("builtins.max", {}, "fails at step 0 (TypeError: 'int' object is not iterable)"),
        ("HERE", {}, "is neither a function of the step nor a torch LRScheduler"),
    ],
)
def test_a_schedule_that_can_not_be_used_is_refused_in_one_line(
    path: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make(path, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
