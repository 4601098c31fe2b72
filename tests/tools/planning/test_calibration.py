"""Short runs set what the model of cost doesn't know of a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from distrain.errors import ConfigError
from distrain.tools.planning import candidates
from distrain.tools.planning.calibration import ShortRuns, calibrated
from distrain.tools.planning.robust_mean import undisturbed, undisturbed_mean
from distrain.tools.planning.steps.common import setting_of
from distrain.tools.planning.workload import Workload
from tests.tools.planning.workloads import cluster, workload

MACHINES = cluster(2, latency=1e-3, bytes_per_second=1e15)


@dataclass
class PlantedRuns:
    """Takes steps as a training would that has more to do than ``workload`` says."""

    true: Workload
    refused: str = ""
    disturbed: str = ""
    names: list[str] = field(default_factory=list)

    def agreed(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        return dict(mine)

    def seconds(self, keys: Mapping[str, str], expected: float, name: str) -> float:
        self.names.append(name)
        if keys["strategy"] == self.refused:
            raise ConfigError("strategy", self.refused, "can't run")
        return seconds_of(self.true, keys) * (1.3 if name == self.disturbed else 1)


def seconds_of(training: Workload, keys: Mapping[str, str]) -> float:
    found = candidates.predictions(setting_of(training, MACHINES), [keys["strategy"]], ())
    return next(one.seconds for one in found if one.keys == keys)


def planted(refused: str = "", disturbed: str = "") -> tuple[Workload, PlantedRuns, list[dict[str, str]]]:
    """The training after short runs of one that takes longer, these runs, and the configurations that were run."""
    training = workload(batch_size=8, blocks=4)
    longer = training.with_step(4, 0.05)
    true = Workload(**{**longer.__dict__, "action_seconds": 0.003, "server_seconds": 0.002, "latency_factor": 2.0})
    runs = PlantedRuns(true, refused, disturbed)
    strategies = ["ddp", "pipeline", "local_sgd", "parameter_server"]
    found = calibrated(training, MACHINES, strategies, cast(ShortRuns, runs))
    assert not found.skipped
    return found.workload, runs, found.done


@pytest.mark.parametrize("disturbed", ["", "with_local_sgd_0", "with_local_sgd_1", "with_ddp_0"])
def test_what_surrounds_steps_and_passes_and_messages_is_found(disturbed: str) -> None:
    found, runs, done = planted(disturbed=disturbed)
    assert [keys["strategy"] for keys in done] == ["local_sgd", "ddp", "pipeline", "parameter_server"]
    assert found.latency_factor == pytest.approx(2, rel=0.01)
    assert found.action_seconds == pytest.approx(0.003, rel=0.01)
    assert found.server_seconds == pytest.approx(0.002, rel=0.01)
    others = [
        {"strategy": "fsdp", "strategy.shard": "optimizer"},
        {"strategy": "local_sgd", "strategy.sync_every": "64"},
        {
            "strategy": "pipeline",
            "strategy.stages": "2",
            "strategy.schedule": "gpipe",
            "strategy.microbatches": "2",
        },
    ]
    for keys in others:
        assert seconds_of(found, keys) == pytest.approx(seconds_of(runs.true, keys), rel=0.01)


def test_a_strategy_that_cannot_run_is_left_as_it_is() -> None:
    found, runs, done = planted(refused="pipeline")
    assert [keys["strategy"] for keys in done] == ["local_sgd", "ddp", "parameter_server"]
    names = ["local_sgd_0", "ddp_0", "pipeline_0", "parameter_server_0", "parameter_server_1", "ddp_1", "local_sgd_1"]
    assert runs.names == [f"with_{name}" for name in names]
    assert found.action_seconds == 0


def test_a_latency_that_changes_nothing_is_left_as_it_is() -> None:
    training = workload(batch_size=8, blocks=4)
    runs = PlantedRuns(training.with_step(4, 0.05))
    found = calibrated(training, cluster(2, bytes_per_second=1e15), ["ddp"], cast(ShortRuns, runs))
    assert [keys["strategy"] for keys in found.done] == ["local_sgd", "ddp"]
    assert found.workload.latency_factor == 1


def test_a_prediction_that_is_always_too_long_is_brought_as_close_as_possible() -> None:
    training = workload(batch_size=8, blocks=4).with_step(4, 0.05)
    runs = PlantedRuns(dataclasses.replace(training, latency_factor=0.01))
    assert calibrated(training, MACHINES, ["ddp"], cast(ShortRuns, runs)).workload.latency_factor == 0.25


def test_long_steps_are_not_run() -> None:
    runs = PlantedRuns(workload(batch_size=800))
    found = calibrated(runs.true, MACHINES, ["ddp"], cast(ShortRuns, runs))
    assert (found.workload, found.done, runs.names) == (runs.true, [], [])
    assert found.skipped == ["local_sgd", "ddp"]


def test_disturbances_do_not_change_the_mean_but_turns_on_a_processor_do() -> None:
    assert undisturbed_mean([1.0] * 10 + [100.0] * 50) == 1
    assert undisturbed_mean([1.0, 3.0] * 30) == 2
    assert undisturbed([1.3, 1.0]) == 1
    assert undisturbed([1.0, 1.08]) == 1.04
