"""A plan: the ranked predictions as a table and as ``plan.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.files.writing import to_json
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.plan_file import FILE
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.workload import Workload

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Trial:
    """A prediction beside what a short run took.

    Attributes:
        prediction: What was predicted.
        seconds: Of a measured step.
    """

    prediction: Prediction
    seconds: float

    @property
    def error(self) -> float:
        """By how much the prediction is too long (above 0) or too short, relative to the measured step."""
        return self.prediction.seconds / self.seconds - 1


@dataclass(frozen=True)
class Plan:
    """Predictions of all configurations, the fastest first.

    Attributes:
        workload: The training.
        cluster: The machines.
        predictions: In ascending order of a step's time.
        remarks: What could not be measured, and why.
        trials: Configurations that were run for a few steps.
        calibrated_on: Keys of configurations that were run to make the plan, so that it is no prediction of them.
        not_calibrated: Strategies of which no configuration was run to make the plan, since their steps are long.
        training: The part of the training's configuration that the predictions depend on.
        planning_seconds: How long each phase of making the plan took.
    """

    workload: Workload
    cluster: Cluster
    predictions: Sequence[Prediction]
    remarks: Sequence[str]
    trials: Sequence[Trial] = ()
    calibrated_on: Sequence[Mapping[str, str]] = ()
    not_calibrated: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    planning_seconds: Mapping[str, float] = field(default_factory=dict)

    def fits(self, prediction: Prediction) -> bool:
        """Whether each rank has enough memory, as far as that is known."""
        memory = self.cluster.memory_bytes
        return memory is None or prediction.memory.total <= memory

    def best(self, *, same_as_single: bool) -> Prediction | None:
        """The fastest one that fits; if asked, only of those that train what one process trains."""
        fitting = (prediction for prediction in self.predictions if self.fits(prediction))
        return next((one for one in fitting if one.same_as_single or not same_as_single), None)

    def lines(self, rows: int = 12) -> list[str]:
        """The plan for the terminal.

        Args:
            rows: Number of configurations to show.
        """
        ranks, hosts = self.cluster.ranks, self.cluster.hosts
        where = f"{ranks} {'rank' if ranks == 1 else 'ranks'}" + (f" on {hosts} hosts" if hosts > 1 else "")
        lines = [f"predicted steps of {self.workload.batch_size} samples on {where}, the fastest first:"]
        lines.append("      ms  images/s      sent    memory  one process  most time  configuration")
        best = [self.best(same_as_single=True), self.best(same_as_single=False)]
        shown = list(self.predictions[:rows])
        shown += [one for one in best if one is not None and one not in shown]
        lines += [self._line(prediction) for prediction in shown]
        if len(self.predictions) > len(shown):
            lines.append(f"({len(self.predictions) - len(shown)} more are in {FILE})")
        lines += self.remarks
        exact, fastest = best
        if fastest is None:
            smallest = min(self.predictions, key=lambda prediction: prediction.memory.total)
            memory = self.cluster.memory_bytes or 0.0
            missing = smallest.memory.total - memory
            lines.append(
                f"nothing fits into {_size(memory)} a rank; {typed(smallest.keys)} lacks {_size(missing)}, the least"
            )
            return lines
        if exact is not None:
            lines.append(f"fastest that trains what one process trains: {typed(exact.keys)}")
        if exact is not fastest and (exact is None or fastest.seconds < 0.98 * exact.seconds):
            gain = "" if exact is None else f", {exact.seconds / fastest.seconds:.2f} times as fast"
            lines.append(f"fastest{gain}, but it trains something else: {typed(fastest.keys)}")
        return lines

    def chosen_for_trial(self, count: int) -> list[Prediction]:
        """The fastest configurations that fit, and plain ``ddp``.

        Args:
            count: Number of configurations besides ``ddp``.
        """
        fastest = [prediction for prediction in self.predictions if self.fits(prediction)][:count]
        usual = [one for one in self.predictions if one.keys == {"strategy": "ddp"} and one not in fastest]
        return [*fastest, *usual]

    def trial_lines(self) -> list[str]:
        """Predicted beside measured steps, for the terminal."""
        lines = ["predicted ms  measured ms   error  configuration"]
        lines += [
            f"{1000 * trial.prediction.seconds:12.1f}  {1000 * trial.seconds:11.1f}  {trial.error:+6.1%}  "
            f"{typed(trial.prediction.keys)}"
            for trial in self.trials
        ]
        return [*lines, *(remark for remark in self.remarks if remark.startswith("not tried"))]

    def _line(self, prediction: Prediction) -> str:
        same = "yes" if prediction.same_as_single else "no"
        memory = _size(prediction.memory.total) + ("" if self.fits(prediction) else "!")
        return (
            f"{1000 * prediction.seconds:8.1f}  {self.workload.batch_size / prediction.seconds:8,.0f}  "
            f"{_size(prediction.bytes_sent):>8}  {memory:>8}  {same:>11}  {prediction.bound:>9}  "
            f"{typed(prediction.keys)}"
        )

    def to_plain(self) -> dict[str, Any]:
        """What ``plan.json`` holds."""
        return {
            "batch_size": self.workload.batch_size,
            "calibrated_on": list(self.calibrated_on),
            "not_calibrated": list(self.not_calibrated),
            "planning_seconds": {name: round(seconds, 2) for name, seconds in self.planning_seconds.items()},
            "cluster": dataclasses.asdict(self.cluster),
            "predictions": [
                {**prediction.to_plain(self.workload.batch_size), "fits": self.fits(prediction)}
                for prediction in self.predictions
            ],
            "remarks": list(self.remarks),
            "trials": [
                {
                    "keys": trial.prediction.keys,
                    "predicted_ms": round(1000 * trial.prediction.seconds, 4),
                    "measured_ms": round(1000 * trial.seconds, 4),
                }
                for trial in self.trials
            ],
            "training": dict(self.training),
            "workload": self.workload.to_plain(),
        }

    def write(self, folder: Path) -> Path:
        """Writes ``plan.json`` and returns its path."""
        path = folder / FILE
        path.write_text(to_json(self.to_plain()))
        return path


def typed(keys: Mapping[str, str]) -> str:
    """A configuration's keys as on the command line."""
    return " ".join(f"{key}={value}" for key, value in keys.items())


def _size(number: float) -> str:
    factor, unit = next(((factor, unit) for factor, unit in _UNITS if number >= factor), (1.0, "B"))
    return f"{number / factor:.3g} {unit}"
