"""Times the steps of a configuration in a short run on these ranks, to compare a prediction with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from typing_extensions import override

from distrain.data.base import Splits
from distrain.errors import Stopped
from distrain.runtime.device import synchronize
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.runtime.runtime import Runtime
from distrain.tools.planning.robust_mean import undisturbed_mean
from distrain.training import auto_format
from distrain.training.assembly import build_model, build_trainer
from distrain.training.callbacks import Callback, RunView
from distrain.training.run_plan import RunPlan
from distrain.verification.rank_runs import quiet
from distrain.verification.short_runs import first_samples, shortened

#: Seconds of timed steps, and the fewest steps and most periods that are timed.
_SECONDS, _FEWEST, _MOST = 2.0, 5, 1000
#: Seconds of a part of a period, each of which counts from those periods in which it was not disturbed.
_PART_SECONDS = 0.1
#: Steps before the first timed one, in which memory is allocated and connections are opened.
_WARM_UP = 3


class _StepClock(Callback):
    """Notes when steps end, on a clock that stands still from the last step of an epoch to the epoch's end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._left_out = 0.0
        self.times: list[float] = []

    def _now(self) -> float:
        return time.perf_counter() - self._left_out

    @override
    def on_step_end(self, run: RunView) -> None:
        synchronize(self._device)
        self.times.append(self._now())

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        # What is done once an epoch is no part of a step, and a short run may have many short epochs.
        self._left_out += self._now() - self.times[-1]


def step_seconds(
    plan: RunPlan,
    splits: Splits,
    folder: Path,
    expected: float,
    period: int = 1,
    timed_seconds: float | None = None,
) -> float:
    """Trains a few steps; all ranks of the training call it together.

    Args:
        plan: The training.
        splits: The samples.
        folder: For the run; all hosts see it.
        expected: Seconds that a step is expected to take, which says how many are timed.
        period: Steps after which the same repeats, as the merges of ``local_sgd``.
        timed_seconds: Seconds of steps that are timed; ``None``: some.

    Returns:
        Seconds of a step, the same on all ranks: the mean of all ranks, in periods in which nothing disturbed them.

    Raises:
        Failed: A rank failed.
        Stopped: A rank was asked to stop.
    """
    free_finished_trainings()
    warm_up, periods = steps_of_trial(expected, period, timed_seconds)
    steps = warm_up + periods * period
    plan = plan.with_config(dataclasses.replace(shortened(plan.config, steps), run_dir=str(folder)))
    world = plan.world
    batch_size = plan.config.data.batch_size
    small = dataclasses.replace(
        splits,
        # A smaller last batch would be the fastest step.
        train=first_samples(splits.train, len(splits.train) // batch_size * batch_size or batch_size),
        # An evaluation between two steps would be timed with them.
        val=first_samples(splits.val, 0),
        test=first_samples(splits.test, 2 * batch_size),
    )
    with quiet(), Runtime(plan.config, world) as runtime:
        logging.getLogger("distrain").setLevel(logging.WARNING)
        make_model = functools.partial(build_model, plan, small)
        plan = plan.with_config(auto_format.resolve_auto(plan.config, runtime, small, plan.task, make_model))
        trainer = build_trainer(plan, runtime, small)
        clock = _StepClock(runtime.device)
        trainer.callbacks.append(clock)
        trainer.fit()
        ends = clock.times[warm_up - 1 :]
        # A server takes no steps.
        own = [mean_step(ends, period), 1.0] if len(ends) > period else [0.0, 0.0]
        # A request to stop that came after the last step, at which the trainer would have followed it.
        own.append(float(runtime.stop_requested is not None))
        totals = torch.tensor(own, dtype=torch.float64, device=runtime.device)
        if world.size > 1:
            runtime.communicator().all_reduce(totals)
        seconds, ranks, stopped = totals.tolist()
        if stopped:
            raise Stopped(runtime.stop_requested or "another rank", 0)
        return float(seconds / ranks)


def mean_step(ends: Sequence[float], period: int) -> float:
    """Mean seconds of the steps of a period in which nothing is disturbed.

    Args:
        ends: When steps ended, on any clock: first the one before the first timed step.
        period: Steps after which the same repeats, at most as many as are timed.
    """
    length = (ends[-1] - ends[0]) / (len(ends) - 1) * period
    parts = min(max(int(length / _PART_SECONDS), 1), period)
    borders = [part * period // parts for part in range(parts + 1)]
    return (
        sum(
            undisturbed_mean([ends[at + late] - ends[at + early] for at in range(0, len(ends) - late, period)])
            for early, late in itertools.pairwise(borders)
        )
        / period
    )


def steps_of_trial(expected: float, period: int, timed_seconds: float | None = None) -> tuple[int, int]:
    """How long a trial is, in whole periods and with few steps of several seconds.

    Args:
        expected: Seconds that a step is expected to take.
        period: Steps after which the same repeats.
        timed_seconds: As for :func:`step_seconds`.

    Returns:
        Steps before the first timed one, and timed periods.
    """
    # Wherever a period begins, it contains everything once.
    return _WARM_UP, min(max(int((timed_seconds or _SECONDS) / (expected * period)), -(-_FEWEST // period)), _MOST)
