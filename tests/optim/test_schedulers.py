"""Schedules agree with the published ones, support a warm-up, and depend on the step alone."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
)

from distrain.checkpoint.progress import Progress
from distrain.config.groups import SchedulerConfig
from distrain.config.registry import choices
from distrain.errors import ConfigError
from distrain.optim.schedulers import (
    CosineConfig,
    CosineRestartsConfig,
    ExponentialConfig,
    OneCycleConfig,
    PlateauConfig,
    PolynomialConfig,
    StepConfig,
    TriangleConfig,
    build,
)
from distrain.training import plateau

CONSTANT = SchedulerConfig(name="constant", warmup_epochs=0.0)
STEP = StepConfig(name="step", warmup_epochs=0.0, milestones=[1.5, 3.0], gamma=0.1)
COSINE = CosineConfig(name="cosine", warmup_epochs=0.0, final_factor=0.2)
ONE_CYCLE = OneCycleConfig(
    name="one_cycle", warmup_epochs=0.0, warmup_fraction=0.3, initial_factor=0.04, final_factor=0.001
)
TRIANGLE = TriangleConfig(name="triangle", warmup_epochs=0.0, peak=0.23, initial_factor=0.2, final_factor=0.07)
RESTARTS = CosineRestartsConfig(
    name="cosine_restarts", warmup_epochs=0.0, cycle_epochs=1, cycle_factor=2, peak_factor=1, final_factor=0.2
)
EXPONENTIAL = ExponentialConfig(name="exponential", warmup_epochs=0.0, gamma=0.5, staircase=True)
POLYNOMIAL = PolynomialConfig(name="polynomial", warmup_epochs=0.0, power=2.0, final_factor=0.0)
PLATEAU = PlateauConfig(
    name="plateau", warmup_epochs=0.0, factor=0.5, patience=2, min_delta=0.1, cooldown=1, final_factor=0.1
)
ALL = [CONSTANT, STEP, COSINE, ONE_CYCLE, TRIANGLE, RESTARTS, EXPONENTIAL, POLYNOMIAL, PLATEAU]


def with_warmup(config: SchedulerConfig, epochs: float) -> SchedulerConfig:
    return type(config)(**{**vars(config), "warmup_epochs": epochs})


def rates_of(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_every_registered_scheduler_is_tested_here() -> None:
    assert set(choices("scheduler")) - {"custom"} == {config.name for config in ALL}  # test_custom_schedule.py has it


def test_constant_has_factor_one() -> None:
    assert {build(CONSTANT, 10, 40)(step) for step in range(40)} == {1.0}


def test_step_drops_at_milestones_given_in_epochs() -> None:
    schedule = build(STEP, 10, 40)
    expected = rates_of(MultiStepLR(optimizer(), [15, 30], 0.1), 40)
    assert [schedule(step) for step in range(40)] == pytest.approx(expected, rel=1e-12)


def test_triangle_rises_and_falls_linearly() -> None:
    schedule = build(TRIANGLE, 10, 40)
    expected = np.interp(np.arange(40), [0, 9, 40], [0.2, 1.0, 0.07])
    assert [schedule(step) for step in range(40)] == pytest.approx(expected.tolist(), rel=1e-12)


def test_cosine_agrees_with_torch() -> None:
    schedule = build(COSINE, 10, 40)
    expected = rates_of(CosineAnnealingLR(optimizer(), 40, eta_min=0.2), 40)
    assert [schedule(step) for step in range(40)] == pytest.approx(expected, rel=1e-12)


def test_cosine_restarts_agree_with_torch() -> None:
    schedule = build(RESTARTS, 10, 70)
    reference = CosineAnnealingWarmRestarts(optimizer(), 10, T_mult=2, eta_min=0.2)
    assert [schedule(step) for step in range(70)] == pytest.approx(rates_of(reference, 70), rel=1e-12)
    lower = CosineRestartsConfig(**{**vars(RESTARTS), "peak_factor": 0.5})
    assert [build(lower, 10, 70)(step) for step in (0, 10, 30)] == [1.0, 0.5, 0.25]


def test_exponential_and_polynomial_agree_with_torch() -> None:
    smooth = ExponentialConfig(**{**vars(EXPONENTIAL), "staircase": False})
    by_step = rates_of(ExponentialLR(optimizer(), 0.5 ** (1 / 10)), 40)
    by_epoch = rates_of(ExponentialLR(optimizer(), 0.5), 4)
    assert [build(smooth, 10, 40)(step) for step in range(40)] == pytest.approx(by_step, rel=1e-12)
    assert [build(EXPONENTIAL, 10, 40)(step) for step in range(0, 40, 10)] == pytest.approx(by_epoch, rel=1e-12)
    assert build(EXPONENTIAL, 10, 40)(9) == 1.0
    expected = rates_of(PolynomialLR(optimizer(), 40, power=2.0), 40)
    assert [build(POLYNOMIAL, 10, 40)(step) for step in range(40)] == pytest.approx(expected, rel=1e-9)


def test_plateau_agrees_with_torch() -> None:
    drawn = random.Random(0)
    scores = [drawn.uniform(0, 1) for _ in range(60)]
    reference = ReduceLROnPlateau(
        optimizer(), "max", factor=0.5, patience=2, threshold=0.1, threshold_mode="abs", cooldown=1, min_lr=0.1
    )
    progress = Progress()
    for score in scores:
        plateau.note(PLATEAU, score, lambda value, best, delta: best is None or value - best > delta, progress)
        reference.step(score)
        assert progress.lr_factor == pytest.approx(reference.optimizer.param_groups[0]["lr"])
    assert progress.lr_factor == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [40, 47, 200])
def test_one_cycle_agrees_with_torch(steps: int) -> None:
    schedule = build(ONE_CYCLE, 10, steps)
    reference = OneCycleLR(
        optimizer(), 1.0, total_steps=steps, pct_start=0.3, div_factor=25, final_div_factor=40, cycle_momentum=False
    )
    expected = [float(reference.get_last_lr()[0])]
    for _ in range(steps - 1):
        reference.optimizer.step()
        reference.step()
        expected.append(float(reference.get_last_lr()[0]))
    assert [schedule(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_warm_up_rises_linearly_to_the_start_of_the_schedule(config: SchedulerConfig) -> None:
    schedule, plain = build(with_warmup(config, 0.5), 10, 45), build(config, 10, 40)
    peak = plain(0)
    assert [schedule(step) for step in range(6)] == pytest.approx([peak * (step + 1) / 6 for step in range(6)])


@pytest.mark.parametrize("config", [COSINE, ONE_CYCLE], ids=lambda config: config.name)
def test_the_schedule_covers_the_steps_after_the_warm_up(config: SchedulerConfig) -> None:
    schedule, plain = build(with_warmup(config, 0.5), 10, 45), build(config, 10, 40)
    assert [schedule(step + 5) for step in range(40)] == [plain(step) for step in range(40)]


def test_milestones_count_from_the_start_of_the_run() -> None:
    schedule = build(with_warmup(STEP, 0.5), 10, 40)
    drops = [step for step, (a, b) in enumerate(pairwise(map(schedule, range(40))), start=1) if b < a]
    assert drops == [15, 30]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_schedules_have_no_state(config: SchedulerConfig) -> None:
    steps = list(range(40))
    expected = {step: build(with_warmup(config, 0.5), 10, 40)(step) for step in steps}
    random.Random(0).shuffle(steps)
    schedule = build(with_warmup(config, 0.5), 10, 40)
    assert {step: schedule(step) for step in steps} == expected


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_runs_of_a_few_steps_have_positive_rates(config: SchedulerConfig, total: int, warmup: float) -> None:
    schedule = build(with_warmup(config, warmup), 1, total)
    assert all(0 < schedule(step) <= 1 for step in range(total))


@pytest.mark.parametrize(("config", "final"), [(COSINE, 0.2), (ONE_CYCLE, 0.001)], ids=["cosine", "one_cycle"])
def test_the_rate_stays_constant_after_the_end_of_the_run(config: SchedulerConfig, final: float) -> None:
    schedule = build(config, 10, 40)
    assert schedule(40) == schedule(1000) == pytest.approx(final)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    build(with_warmup(CONSTANT, 4.0), 10, 40)
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_epochs=4\.1: .*41 steps.*the whole run 40"):
        build(with_warmup(CONSTANT, 4.1), 10, 40)


@pytest.mark.parametrize("milestones", [[2.0, 1.0], [1.0, 1.0]])
def test_milestones_out_of_order_are_refused(milestones: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.milestones=.*must ascend"):
        StepConfig(name="step", warmup_epochs=0.0, milestones=milestones, gamma=0.1)
