"""What a plan predicts of a run: which prediction it is, and when a run is called slower than its plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distrain.errors import ConfigError
from distrain.tools.planning import candidates, expected
from distrain.tools.planning.plan import Plan
from distrain.tools.planning.plan_file import planned_part
from distrain.tools.planning.steps.common import setting_of
from tests.runs import small
from tests.tools.planning.workloads import cluster, workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of two ranks that share two processors, whose batches take 2 ms a sample to load."""
    training = dataclasses.replace(workload(batch_size=10), outside={1: 2e-3, 10: 20e-3})
    machines = dataclasses.replace(cluster(1, 2), slowdown=(1.0, 1.5))
    found = candidates.predictions(setting_of(training, machines), ["ddp", "fsdp", "pipeline", "local_sgd"], [])
    made = Plan(training, machines, list(found), [], training=planned_part(small()))
    path = tmp_path_factory.mktemp("plan")
    made.write(path)
    return path


@pytest.mark.parametrize(
    ("keys", "outside"),
    [
        (("strategy=ddp",), 1.5 * 5 * 2),
        (("strategy=fsdp", "strategy.shard=gradients"), 1.5 * 5 * 2),
        (("strategy=local_sgd", "strategy.sync_every=4"), 1.5 * 5 * 2),
        # Each rank of a pipeline loads the whole batch.
        (("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=2"), 1.5 * 10 * 2),
    ],
)
def test_the_prediction_of_the_run_is_found_and_divided_as_a_measured_step(
    folder: Path, keys: tuple[str, ...], outside: float, tmp_path: Path
) -> None:
    copy = shutil.copy(folder / "plan.json", tmp_path)
    config = small(f"plan={copy}", *keys)
    content = expected.check(config)
    # It is read once: a plan that is replaced during a run is not the one that was checked.
    Path(copy).unlink()
    found = expected.of_run(config, 2, Path("nowhere"), content)
    plan = json.loads((folder / "plan.json").read_text())
    named = dict(key.split("=") for key in keys)
    prediction = next(one for one in plan["predictions"] if named.items() <= one["keys"].items())
    assert found["step_ms"] == prediction["step_ms"]
    share = found["time_share"]
    assert share["outside"] * found["step_ms"] == pytest.approx(outside)
    assert share["communication"] * found["step_ms"] == pytest.approx(prediction["parts_ms"]["waiting"])
    assert sum(share.values()) == pytest.approx(1)
    assert (found["period"], found["trial_ms"]) == (4 if "strategy=local_sgd" in keys else 1, None)


@pytest.mark.parametrize("typed", [(), ("strategy.mesh.data=2",)])
def test_a_mesh_is_found_whether_its_replicas_are_typed_or_follow(typed: tuple[str, ...], tmp_path: Path) -> None:
    training, machines = workload(batch_size=10), cluster(1, 4)
    found = list(candidates.predictions(setting_of(training, machines), ["mesh"], []))
    Plan(training, machines, found, [], training=planned_part(small())).write(tmp_path)
    config = small("strategy=mesh", "strategy.mesh.pipeline=2", "strategy.microbatches=2", *typed)
    predicted = expected.of_run(config, 4, tmp_path, None)
    assert predicted["bytes_sent_per_step_per_rank"] > 0
    assert expected.of_run(small("strategy=mesh", "strategy.mesh.pipeline=4", *typed), 4, tmp_path, None) == {}


@pytest.mark.parametrize(
    ("keys", "ranks", "why"),
    [
        (("strategy=ddp", "strategy.bucket_mb=3"), 2, "it has no prediction of strategy=ddp with these keys"),
        (("strategy=single",), 1, "it is of 2 ranks"),
        (("strategy=ddp", "trainer.precision=bf16"), 2, "another training, whose trainer.precision was fp32 and is"),
    ],
)
def test_a_plan_of_something_else_predicts_nothing(
    folder: Path, keys: tuple[str, ...], ranks: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(f"plan={folder}", *keys)
    assert expected.of_run(config, ranks, Path("nowhere"), expected.check(config)) == {}
    assert why in caplog.text


def test_a_run_without_a_plan_needs_none_and_a_damaged_one_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert expected.of_run(small("strategy=ddp"), 2, tmp_path, None) == {}
    assert caplog.text == ""
    content = json.loads((folder / "plan.json").read_text())
    content["predictions"] = [{"keys": {"strategy": "ddp", "strategy.bucket_mb": "["}}]
    for damaged in ('{"training": 3}', json.dumps(content)):
        (tmp_path / "plan.json").write_text(damaged)
        caplog.clear()
        assert expected.of_run(small("strategy=ddp"), 2, tmp_path, None) == {}
        assert "is not used: it is no plan" in caplog.text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "there is no such file, nor a folder with plan.json"),
        ("{", "plan.json is not JSON"),
        ("{}", "is not the plan.json of a plan"),
    ],
)
def test_a_key_that_names_no_plan_is_refused(tmp_path: Path, content: str | None, line: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"^plan={tmp_path}: {line}"):
        expected.check(small(f"plan={tmp_path}"))


def summary(mean: float, p50: float, p95: float, **changes: Any) -> dict[str, Any]:
    shares = {"compute": 0.5, "communication": 0.25, "outside": 0.25}
    predicted = {"step_ms": 20.0, "time_share": shares, "trial_ms": None, "period": 1}
    measured = {"compute": 0.4, "communication": 0.5, "data": 0.06, "other": 0.04}
    plain = {"steps": 100, "step_ms": {"mean": mean, "p50": p50, "p95": p95}, "time_share": measured}
    return {**plain, "predicted": {**predicted, **changes.pop("predicted", {})}, **changes}


SLOW = {"compute": 0.2, "communication": 0.1, "data": 0.5, "other": 0.2}


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (summary(24.0, 24.0, 25.0), ""),
        (
            summary(30.0, 30.0, 31.0),
            "30 ms instead of 20 ms, most of the difference in communication: 15 ms instead of 5",
        ),
        (summary(30.0, 30.0, 31.0, time_share=SLOW), "in waiting for data: 21 ms instead of 5 ms"),
        # A few long steps; a few steps; steps of very different length; a short run that took as long.
        (summary(30.0, 20.0, 21.0), ""),
        (summary(30.0, 30.0, 31.0, steps=105, resumed_at_step=100), ""),
        (summary(30.0, 30.0, 130.0), ""),
        (summary(30.0, 30.0, 31.0, predicted={"trial_ms": 29.0}), ""),
        # One step in 64 has a merge.
        (summary(30.0, 20.0, 21.0, predicted={"period": 64}), "slower than planned: a step took 30 ms"),
        ({**summary(30.0, 30.0, 31.0), "predicted": None}, ""),
    ],
)
def test_a_run_that_is_much_slower_than_its_plan_says_in_which_part(measured: dict[str, Any], line: str) -> None:
    said = expected.slower_than_planned(measured)
    assert line in said
    assert bool(line) == bool(said)
