"""Learning rate schedules: pure functions of the step, which a resumed run needs no state for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from distrain.config.registry import choice, register
from distrain.config.schema import SchedulerConfig, setting
from distrain.errors import ConfigError

#: Maps the step about to be taken, counted from 0 over the whole run, to a factor of the optimizer's rate.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class ScheduleSpan:
    """The steps that a schedule covers after its warm-up: ``first`` to ``end``, exclusive."""

    first: int
    end: int
    steps_per_epoch: int

    def progress(self, step: int) -> float:
        """How far ``step`` is from ``first`` (0) to ``end`` (1)."""
        return min(1.0, (step - self.first) / max(1, self.end - self.first))


@register("scheduler", "constant", SchedulerConfig)
def constant(config: SchedulerConfig, span: ScheduleSpan) -> Schedule:
    """The base rate throughout."""
    return lambda step: 1.0


@dataclass
class StepConfig(SchedulerConfig):
    """The rate is multiplied by ``gamma`` at each milestone."""

    milestones: list[float] = setting("Epochs at which the rate drops, in ascending order.", above=0)
    gamma: float = setting("Factor of each drop.", above=0)

    def __post_init__(self) -> None:
        """Refuses milestones out of order.

        Raises:
            ConfigError: A milestone is not above the one before.
        """
        if any(b <= a for a, b in pairwise(self.milestones)):
            raise ConfigError("scheduler.milestones", self.milestones, "must ascend")


@register("scheduler", "step", StepConfig)
def step(config: StepConfig, span: ScheduleSpan) -> Schedule:
    """Drops at milestones, which count from the start of the run, warm-up included."""
    drops = [round(epoch * span.steps_per_epoch) for epoch in config.milestones]
    return lambda step: config.gamma ** bisect_right(drops, step)


@dataclass
class CosineConfig(SchedulerConfig):
    """The rate falls along half a cosine."""

    final_factor: float = setting("Share of the base rate that is left at the end of the run.", at_least=0)


@register("scheduler", "cosine", CosineConfig)
def cosine(config: CosineConfig, span: ScheduleSpan) -> Schedule:
    """Cosine annealing without restarts (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    return lambda step: _between(1.0, config.final_factor, span.progress(step))


@dataclass
class OneCycleConfig(SchedulerConfig):
    """The rate rises and falls once."""

    warmup_fraction: float = setting("Share of the steps (after warmup_epochs, if any) that rise.", above=0, below=1)
    initial_factor: float = setting("Share of the base rate to begin with.", at_least=0)
    final_factor: float = setting("Share of the base rate in the last step.", at_least=0)


@register("scheduler", "one_cycle", OneCycleConfig)
def one_cycle(config: OneCycleConfig, span: ScheduleSpan) -> Schedule:
    """The one-cycle policy (Smith & Topin 2017, arXiv:1708.07120), annealed by cosines both ways.

    The last step of the rise has the base rate, the last step of all ``final_factor`` of it.
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
    """The rate rises in a straight line to the base rate and falls in another."""

    peak: float = setting("Share of the steps (after warmup_epochs, if any) that rise.", at_least=0, below=1)
    initial_factor: float = setting("Share of the base rate to begin with.", at_least=0)
    final_factor: float = setting("Share of the base rate that is left at the end of the run.", at_least=0)


@register("scheduler", "triangle", TriangleConfig)
def triangle(config: TriangleConfig, span: ScheduleSpan) -> Schedule:
    """A rise and a fall, both linear, as in Jordan 2024 (arXiv 2404.00498); the last step is one before the end."""
    top = int(config.peak * (span.end - span.first))
    fall = max(1, span.end - span.first - top)

    def schedule(step: int) -> float:
        position = min(step, span.end) - span.first
        if position < top:
            return config.initial_factor + (1.0 - config.initial_factor) * position / top
        return 1.0 + (config.final_factor - 1.0) * (position - top) / fall

    return schedule


def build(config: SchedulerConfig, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The configured schedule.

    Args:
        config: Any scheduler's configuration.
        steps_per_epoch: Training steps an epoch, ragged last batch included.
        total_steps: Training steps of the whole run.

    Returns:
        A function of the step about to be taken, counted from 0, that gives the factor to multiply the optimizer's
        rate with. In a warm-up of ``w`` steps it rises linearly, from ``1 / (w + 1)`` of the rate that step ``w`` has.
        Steps past the end of the run have the rate of its end.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup > total_steps:
        raise ConfigError(
            "scheduler.warmup_epochs",
            config.warmup_epochs,
            f"the warm-up takes {warmup} steps ({steps_per_epoch} an epoch), the run {total_steps}",
        )
    after: Schedule = choice("scheduler", config.name).target(
        config, ScheduleSpan(warmup, total_steps, steps_per_epoch)
    )
    if warmup == 0:
        return after
    reached = after(warmup)
    return lambda step: after(step) if step >= warmup else reached * (step + 1) / (warmup + 1)


def _between(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
