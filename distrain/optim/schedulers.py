"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state for them.

``plateau`` also depends on the run's validations: :mod:`distrain.training.plateau` multiplies its constant rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distrain.config.groups import SchedulerConfig
from distrain.config.registry import choice, register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.optim import custom_schedule

#: Maps the next step, counted from 0 over the whole run, to the factor that multiplies the base learning rate.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class ScheduleSpan:
    """The steps that a schedule covers after its warm-up.

    Attributes:
        first: First step.
        end: One more than the last step.
        steps_per_epoch: Steps per epoch.
    """

    first: int
    end: int
    steps_per_epoch: int

    def progress(self, step: int) -> float:
        """Position of a step between ``first`` (0) and ``end`` (1); 1 for steps after the end."""
        return min(1.0, (step - self.first) / max(1, self.end - self.first))


@register("scheduler", "constant", SchedulerConfig)
def constant(config: SchedulerConfig, span: ScheduleSpan) -> Schedule:
    """The base learning rate in every step."""
    return lambda step: 1.0


@dataclass
class StepConfig(SchedulerConfig):
    """Keys of ``scheduler=step``: the learning rate is multiplied by ``gamma`` at each milestone."""

    milestones: list[float] = setting("Epochs at which the learning rate drops, in ascending order.", above=0)
    gamma: float = setting("Factor that multiplies the learning rate at each milestone.", above=0)

    def __post_init__(self) -> None:
        """Refuses milestones that don't ascend.

        Raises:
            ConfigError: A milestone is not larger than the one before it.
        """
        if any(b <= a for a, b in pairwise(self.milestones)):
            raise ConfigError("scheduler.milestones", self.milestones, "must ascend")


@register("scheduler", "step", StepConfig)
def step(config: StepConfig, span: ScheduleSpan) -> Schedule:
    """Drops at milestones, which are counted from the start of the run, warm-up included."""
    drops = [round(epoch * span.steps_per_epoch) for epoch in config.milestones]
    return lambda step: config.gamma ** bisect_right(drops, step)


@dataclass
class CosineConfig(SchedulerConfig):
    """Keys of ``scheduler=cosine``: the learning rate falls along half a cosine."""

    final_factor: float = setting("Learning rate at the end of the run, as a share of the base rate.", at_least=0)


@register("scheduler", "cosine", CosineConfig)
def cosine(config: CosineConfig, span: ScheduleSpan) -> Schedule:
    """Cosine annealing without restarts (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    return lambda step: _between(1.0, config.final_factor, span.progress(step))


@dataclass
class CosineRestartsConfig(SchedulerConfig):
    """Keys of ``scheduler=cosine_restarts``: the learning rate falls along half a cosine again and again."""

    cycle_epochs: float = setting("Epochs of the first cycle, after the warm-up.", above=0)
    cycle_factor: float = setting("Factor from each cycle's length to that of the next one.", at_least=1)
    peak_factor: float = setting("Factor from the learning rate at the start of each cycle to the next one's.", above=0)
    final_factor: float = setting("Learning rate at the end of a cycle, as a share of the base rate.", at_least=0)


@register("scheduler", "cosine_restarts", CosineRestartsConfig)
def cosine_restarts(config: CosineRestartsConfig, span: ScheduleSpan) -> Schedule:
    """Cosine annealing with warm restarts (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    first = max(1, round(config.cycle_epochs * span.steps_per_epoch))

    def schedule(step: int) -> float:
        position, length, peak = float(max(0, min(step, span.end) - span.first)), float(first), 1.0
        while position >= length:
            position, length, peak = position - length, length * config.cycle_factor, peak * config.peak_factor
        return _between(peak, config.final_factor, position / length)

    return schedule


@dataclass
class ExponentialConfig(SchedulerConfig):
    """Keys of ``scheduler=exponential``: the learning rate is multiplied by ``gamma`` in every epoch."""

    gamma: float = setting("Factor of the learning rate in an epoch after the warm-up.", above=0, at_most=1)
    staircase: bool = setting("Multiply at the end of each epoch; else by the same factor in every step.")


@register("scheduler", "exponential", ExponentialConfig)
def exponential(config: ExponentialConfig, span: ScheduleSpan) -> Schedule:
    """Exponential decay."""

    def schedule(step: int) -> float:
        epochs = max(0, min(step, span.end) - span.first) / span.steps_per_epoch
        return float(config.gamma ** (math.floor(epochs) if config.staircase else epochs))

    return schedule


@dataclass
class PolynomialConfig(SchedulerConfig):
    """Keys of ``scheduler=polynomial``: the learning rate falls as a power of the share of steps that is left."""

    power: float = setting("The power; 1: linear decay.", above=0)
    final_factor: float = setting("Learning rate at the end of the run, as a share of the base rate.", at_least=0)


@register("scheduler", "polynomial", PolynomialConfig)
def polynomial(config: PolynomialConfig, span: ScheduleSpan) -> Schedule:
    """Polynomial decay."""
    low = config.final_factor
    return lambda step: low + (1.0 - low) * (1.0 - span.progress(step)) ** config.power


@dataclass
class PlateauConfig(SchedulerConfig):
    """Keys of ``scheduler=plateau``: the learning rate falls when ``trainer.monitor`` stops getting better."""

    factor: float = setting("Factor of the learning rate when it falls.", above=0, below=1)
    patience: int = setting(
        "Epochs in a row without improvement that it lets pass; it falls after the next.", at_least=0
    )
    min_delta: float = setting("A smaller change of trainer.monitor is no improvement.", at_least=0)
    cooldown: int = setting("Epochs after a fall that are not counted.", at_least=0)
    final_factor: float = setting("Lowest learning rate, as a share of the base rate.", at_least=0)


@register("scheduler", "plateau", PlateauConfig)
def plateau(config: PlateauConfig, span: ScheduleSpan) -> Schedule:
    """The base rate; :mod:`distrain.training.plateau` multiplies it by what the validations left of it."""
    return lambda step: 1.0


@dataclass
class OneCycleConfig(SchedulerConfig):
    """Keys of ``scheduler=one_cycle``: the learning rate rises and falls once."""

    warmup_fraction: float = setting(
        "Share of the steps after warmup_epochs in which the rate rises.", above=0, below=1
    )
    initial_factor: float = setting("Initial learning rate, as a share of the base rate.", at_least=0)
    final_factor: float = setting("Learning rate of the last step, as a share of the base rate.", at_least=0)


@register("scheduler", "one_cycle", OneCycleConfig)
def one_cycle(config: OneCycleConfig, span: ScheduleSpan) -> Schedule:
    """The one-cycle policy (Smith & Topin 2017, arXiv:1708.07120) with cosine rise and fall.

    The last step of the rise has the base rate; the last step of the run has ``final_factor`` times it.
    """
    steps = span.end - span.first
    peak, last = config.warmup_fraction * steps - 1, steps - 1

    def schedule(step: int) -> float:
        position = min(step - span.first, last)
        if position <= peak:
            return _between(config.initial_factor, 1.0, position / peak if peak > 0 else 1.0)
        return _between(1.0, config.final_factor, (position - peak) / (last - peak))

    return schedule


@dataclass
class TriangleConfig(SchedulerConfig):
    """Keys of ``scheduler=triangle``: the learning rate rises linearly to the base rate, then falls linearly."""

    peak: float = setting("Share of the steps after warmup_epochs in which the rate rises.", at_least=0, below=1)
    initial_factor: float = setting("Initial learning rate, as a share of the base rate.", at_least=0)
    final_factor: float = setting("Learning rate at the end of the run, as a share of the base rate.", at_least=0)


@register("scheduler", "triangle", TriangleConfig)
def triangle(config: TriangleConfig, span: ScheduleSpan) -> Schedule:
    """Linear rise and fall, as in Jordan 2024 (arXiv 2404.00498).

    The factor would reach ``final_factor`` one step after the last step of the run.
    """
    top = int(config.peak * (span.end - span.first))
    fall = max(1, span.end - span.first - top)

    def schedule(step: int) -> float:
        position = min(step, span.end) - span.first
        if position < top:
            return config.initial_factor + (1.0 - config.initial_factor) * position / top
        return 1.0 + (config.final_factor - 1.0) * (position - top) / fall

    return schedule


@dataclass
class CustomScheduleConfig(SchedulerConfig):
    """Keys of ``scheduler=custom``."""

    _target_: str = setting(
        "Dotted path of a function of the step that gives the factor of the learning rate, or of a torch LRScheduler."
    )
    kwargs: dict[str, Any] = setting("Keyword arguments for the target.")
    interval: str = setting(
        "How often a torch LRScheduler makes a step; a function is asked in every step.", choices=("step", "epoch")
    )


@register("scheduler", "custom", CustomScheduleConfig)
def custom(config: CustomScheduleConfig, span: ScheduleSpan) -> Schedule:
    """A user's function, or one of torch's classes as a function of the step.

    The function gets those of ``step``, ``total_steps`` and ``steps_per_epoch`` that it has, counted after the warm-up,
    and ``kwargs``. Steps after the end of the run have the factor of its last step.
    """
    total = max(1, span.end - span.first)
    factor = custom_schedule.make(config._target_, config.kwargs, config.interval, total, span.steps_per_epoch)
    return lambda step: factor(min(step - span.first, total - 1))


def build(config: SchedulerConfig, steps_per_epoch: int, total_steps: int) -> Schedule:
    """Builds the configured schedule.

    Args:
        config: The configuration of any scheduler.
        steps_per_epoch: Training steps per epoch, including a smaller last batch.
        total_steps: Training steps of the whole run.

    Returns:
        A function from the next step, counted from 0, to the factor that multiplies the base learning rate. In a
        warm-up of ``w`` steps the factor rises linearly, from ``1 / (w + 1)`` of its value at step ``w``. Steps after
        the end of the run have the factor of its end.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup > total_steps:
        raise ConfigError(
            "scheduler.warmup_epochs",
            config.warmup_epochs,
            f"the warm-up takes {warmup} steps ({steps_per_epoch} per epoch), the whole run {total_steps}",
        )
    after: Schedule = choice("scheduler", config.name).target(
        config, ScheduleSpan(warmup, total_steps, steps_per_epoch)
    )
    if warmup == 0:
        return after
    reached = after(warmup)
    return lambda step: after(step) if step >= warmup else reached * (step + 1) / (warmup + 1)


def _between(start: float, end: float, progress: float) -> float:
    """Interpolates from ``start`` to ``end`` along half a cosine; ``progress`` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
