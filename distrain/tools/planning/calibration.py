"""Corrects what was measured piece by piece by short runs, where steps are so short that what is around them matters.

One configuration of a strategy is run, and what the model of cost does not know is set so that it predicts the measured
step. All other configurations remain predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.errors import ConfigError
from distrain.runtime.first_rank import of_rank_0
from distrain.runtime.world import World
from distrain.tools.planning import candidates
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.plan_keys import period_of
from distrain.tools.planning.robust_mean import undisturbed
from distrain.tools.planning.steps.common import setting_of
from distrain.tools.planning.trial_run import step_seconds, steps_of_trial
from distrain.tools.planning.workload import Workload
from distrain.training.run_plan import RunPlan

#: Seconds of a step above which what is around it doesn't matter.
_LONG_STEP = 0.3
#: The same for a pipeline, in whose step there are many passes, each of which a rank may be late for.
_LONG_PIPELINE = 0.6
#: Seconds that a short run may take.
_LONGEST_RUN = 12.0
#: The result is so many halvings more precise than the measured step.
_BISECTIONS = 14
#: A value that changes every step, if any does.
_LARGE = 1e6
#: Times that all unknown values are set one after the other, since each of them also changes the others' predictions.
_ROUNDS = 3


@dataclass(frozen=True)
class _Unknown:
    """Something that the model of cost doesn't know of a strategy.

    Attributes:
        strategy: Its name.
        usual: Which of the strategy's configurations is run: the one with the smallest result.
        set: The training with a value for what is not known: seconds, or a factor.
        longest: Seconds of a step up to which it matters.
        least: The smallest value that it may have.
    """

    strategy: str
    usual: Callable[[Mapping[str, str]], float]
    set: Callable[[Workload, float], Workload]
    longest: float = _LONG_STEP
    least: float = 0.0


def _of_step(workload: Workload, seconds: float) -> Workload:
    return workload.with_step(max(workload.outside), seconds)


def _of_collectives(workload: Workload, factor: float) -> Workload:
    return dataclasses.replace(workload, latency_factor=factor)


def _of_action(workload: Workload, seconds: float) -> Workload:
    return dataclasses.replace(workload, action_seconds=seconds)


def _of_server(workload: Workload, seconds: float) -> Workload:
    return dataclasses.replace(workload, server_seconds=seconds)


def _usual_pipeline(keys: Mapping[str, str]) -> float:
    other = 0 if keys["strategy.schedule"] == "1f1b" else 100
    return other + abs(int(keys["strategy.microbatches"]) - 4)


#: In this order, since what surrounds a step is part of every other strategy.
_UNKNOWNS = (
    _Unknown("single", lambda keys: 0.0, _of_step),
    _Unknown("local_sgd", lambda keys: abs(int(keys["strategy.sync_every"]) - 16), _of_step),
    # Ranks in a step start their collectives at different times, and their processors have other work. A measurement
    # without a step was disturbed if it is longer.
    _Unknown("ddp", len, _of_collectives, least=0.25),
    _Unknown("pipeline", _usual_pipeline, _of_action, _LONG_PIPELINE),
    _Unknown("parameter_server", lambda keys: int(keys["strategy.servers"]), _of_server),
)


@dataclass(frozen=True)
class ShortRuns:
    """Runs configurations for a few steps.

    Attributes:
        world: This rank's place.
        splits: The samples.
        config_of: The training with the keys of a configuration.
        folder: For the runs; all hosts see it.
        timed_seconds: Seconds of steps that are timed in each; ``None``: some.
    """

    world: World
    splits: Splits
    config_of: Callable[[Mapping[str, str]], Config]
    folder: Path
    timed_seconds: float | None = None

    def seconds(self, keys: Mapping[str, str], expected: float, name: str) -> float:
        """Seconds of a step; all ranks call it together.

        Args:
            keys: Of the configuration.
            expected: Seconds that a step is expected to take, the same on all ranks.
            name: Of the run's folder.

        Raises:
            ConfigError: The training can't run with these keys.
            Failed: A rank failed.
        """
        run = RunPlan.resolve(self.config_of(keys), self.world)
        run.check(warn=False)
        return step_seconds(run, self.splits, self.folder / name, expected, period_of(keys), self.timed_seconds)

    def agreed(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """What rank 0 gives; all ranks call it together."""
        return of_rank_0(self.config_of({}), self.world, mine)


@dataclass(frozen=True)
class Calibrated:
    """What short runs have shown.

    Attributes:
        workload: The training.
        done: Keys of the configurations that were run.
        skipped: Strategies of which none was run, since their steps are long.
    """

    workload: Workload
    done: list[dict[str, str]]
    skipped: list[str]


def calibrated(workload: Workload, cluster: Cluster, strategies: Sequence[str], runs: ShortRuns) -> Calibrated:
    """The training with what short runs show; all ranks call it together.

    Args:
        workload: As measured.
        cluster: These ranks.
        strategies: Names of the strategies to look at.
        runs: To run configurations.
    """
    # Rank 0 decides for all, since ranks have measured their blocks by themselves.
    chosen = {unknown.strategy: _chosen(unknown, workload, cluster, strategies) for unknown in _UNKNOWNS}
    chosen = runs.agreed(chosen)
    measured = _measured(chosen, runs)
    values: dict[str, float] = {}
    for _ in range(_ROUNDS if len(measured) > 1 else 1):
        for unknown in _UNKNOWNS:
            if times := measured.get(unknown.strategy):
                keys = chosen[unknown.strategy]["keys"]
                # That of the round before is no part of what is already known.
                values.pop(unknown.strategy, None)
                value = _value(workload, cluster, values, unknown, keys, undisturbed(times))
                if value is not None:
                    values[unknown.strategy] = value
    workload = _with_values(workload, values)
    skipped = [name for name, one in chosen.items() if one["too_long"]]
    return Calibrated(workload, [chosen[name]["keys"] for name in measured], skipped)


def _measured(chosen: Mapping[str, dict[str, Any]], runs: ShortRuns) -> dict[str, list[float]]:
    """Seconds of a step of the chosen configurations, by strategy.

    Each is measured twice, in this order and in the reverse one: a machine is seldom disturbed both times.
    """
    names = [unknown.strategy for unknown in _UNKNOWNS if chosen[unknown.strategy]["seconds"]]
    found: dict[str, list[float]] = {}
    refused: set[str] = set()
    for name in [*names, *names[::-1]]:
        one = chosen[name]
        if name in refused:
            continue
        try:
            seconds = runs.seconds(one["keys"], one["seconds"], f"with_{name}_{len(found.get(name, ()))}")
            found.setdefault(name, []).append(seconds)
        except ConfigError:
            # The plan says why there is no such configuration.
            refused.add(name)
    return found


def _chosen(unknown: _Unknown, workload: Workload, cluster: Cluster, strategies: Sequence[str]) -> dict[str, Any]:
    """The configuration of a strategy to run, and the seconds of its step, as far as there is one with short steps."""
    # Even if no plan is made for it: one that seldom communicates shows what surrounds a step.
    if unknown.strategy not in strategies and unknown.set is not _of_step:
        return {"keys": {}, "seconds": 0.0, "too_long": False}
    setting = setting_of(workload, cluster)
    possible = sorted(candidates.of_strategy(unknown.strategy, setting), key=lambda one: unknown.usual(one.keys))
    for candidate in possible:
        seconds = candidate.predict(setting).seconds
        period = period_of(candidate.keys)
        warm_up, periods = steps_of_trial(seconds, period)
        if seconds < unknown.longest and seconds * (warm_up + periods * period) < _LONGEST_RUN:
            return {"keys": candidate.keys, "seconds": seconds, "too_long": False}
    return {"keys": {}, "seconds": 0.0, "too_long": bool(possible)}


def _with_values(workload: Workload, values: Mapping[str, float]) -> Workload:
    """The training as measured piece by piece, with values for what is not known of some strategies."""
    for unknown in _UNKNOWNS:
        if unknown.strategy in values:
            workload = unknown.set(workload, values[unknown.strategy])
    return workload


def _value(
    workload: Workload,
    cluster: Cluster,
    others: Mapping[str, float],
    unknown: _Unknown,
    keys: Mapping[str, str],
    measured: float,
) -> float | None:
    """The value for which a configuration takes as long as measured, by bisection, or the least one if it is closer.

    Args:
        workload: The training as measured piece by piece.
        cluster: These ranks.
        others: Values of what else is not known, by strategy.
        unknown: What is looked for.
        keys: Of the configuration that was run.
        measured: Seconds of its step.

    Returns:
        The value; ``None`` if none brings the prediction closer.
    """
    found = candidates.of_strategy(unknown.strategy, setting_of(workload, cluster))
    candidate = next(one for one in found if one.keys == keys)

    def seconds(value: float | None) -> float:
        changed = _with_values(workload, others if value is None else {**others, unknown.strategy: value})
        return candidate.predict(setting_of(changed, cluster)).seconds

    low, high = unknown.least, unknown.least + measured
    if measured <= seconds(low):
        return low if seconds(low) < seconds(None) else None
    if measured > seconds(_LARGE):
        return None
    while seconds(high) < measured:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) < measured else (low, middle)
    return low
