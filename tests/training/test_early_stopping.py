"""``trainer.monitor`` and ``trainer.patience``: all ranks stop after the same step, and a resumed run counts on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import distrain
from distrain.checkpoint.progress import Progress
from distrain.cli import app
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.errors import ConfigError, Stopped
from distrain.runtime.world import World
from distrain.strategies.base import StepResult
from distrain.tasks.base import Evaluation
from distrain.training.monitor import Monitor
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks, soaked
from tests.runs import small
from tests.tasks.helpers import task_for

#: Epochs of 5 steps. The loss falls, so if more of it is better the first epoch is the best one.
OPTIONS = (
    "metrics=[top2,auroc]",
    "trainer.monitor=val/loss",
    "trainer.mode=max",
    "trainer.patience=2",
    "trainer.epochs=9",
    "optimizer.lr=0.003",
    "scheduler=constant",
    "checkpoint.keep=1",
)
STRATEGIES = {
    "one": (1, ()),
    "ddp": (3, ("strategy=ddp",)),
    "pipeline": (2, ("strategy=pipeline",)),
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=3")),
    "parameter_server": (3, ("strategy=parameter_server",)),
    "async": (3, ("strategy=parameter_server", "strategy.mode=async")),
}


def train(config: Config, stop_at: int | None = None) -> dict[str, Any]:
    """Trains, or stops in the middle at a step, and returns where this rank ended."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(Stopped), app.prepared(config) as trainer:
        take = trainer.strategy.train_step

        def counted(batch: Batch) -> StepResult:
            if trainer.progress.step + 1 == stop_at:
                trainer.runtime.stop_requested = "SIGTERM"
            return take(batch)

        trainer.strategy.train_step = counted  # type: ignore[method-assign]
        summary = trainer.fit()
    return {"progress": dataclasses.asdict(trainer.progress), "summary": summary}


@pytest.mark.parametrize("name", soaked(STRATEGIES, ("pipeline", "parameter_server")))
def test_all_ranks_stop_after_the_same_step_and_the_best_is_tested_too(name: str, tmp_path: Path) -> None:
    ranks, options = STRATEGIES[name]
    found = run_ranks(train, ranks, small(*OPTIONS, *options, f"run_dir={tmp_path}/run"))
    # A server trains nothing.
    steps = {rank["progress"]["step"] for rank in found if rank["progress"]["step"]}
    assert steps == {15}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["stopped_early"], summary["epochs"], summary["best_epoch"], summary["best_step"]) == (True, 3, 1, 5)
    for which, prefix in (("newest", "test_"), ("best", "best_test_")):
        evaluated = distrain.evaluate(tmp_path / "run", checkpoint=which)
        for key in ("loss", "accuracy", "top2", "auroc"):
            assert summary[f"{prefix}{key}"] == pytest.approx(evaluated[key], rel=1e-4), (which, key)
        by_class = {row["class"]: row["auroc"] for row in evaluated["classes"]}
        assert summary[f"{prefix}per_class"]["auroc"] == pytest.approx(by_class, rel=1e-4)


def results(run: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What must not depend on an interruption."""
    chosen = ("best_", "test_", "val_", "stopped", "epochs", "steps", "monitor")
    return {key: value for key, value in run["summary"].items() if key.startswith(chosen)} | run["progress"]


def test_a_resumed_run_counts_on_and_goes_on_after_an_early_stop_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*OPTIONS, "checkpoint.every_epochs=2")
    whole = train(small(*options, f"run_dir={tmp_path}/whole"))
    assert (whole["progress"]["epoch"], whole["progress"]["epochs_without_improvement"]) == (3, 2)
    # The first epoch was not saved, so the second is the best that was.
    assert whole["progress"]["best_step"] == 10
    # Stopped in the middle of the second epoch, after an epoch without improvement, and before the end of the third.
    folder = f"run_dir={tmp_path}/resumed"
    for stop_at in (8, 12):
        assert train(small(*options, folder), stop_at)["progress"]["step"] == stop_at
    resumed = train(small(*options, folder))
    assert results(resumed) == results(whole)
    # The run has ended: the same command trains nothing.
    again = train(small(*options, folder))
    assert again["progress"]["step"] == 15
    assert again["summary"]["end"] == resumed["summary"]["end"]
    # With more patience it counts on, with more epochs it counts anew.
    assert train(small(*options, folder, "trainer.patience=3"))["progress"]["epoch"] == 4
    longer = train(small(*options, folder, "trainer.patience=3", "trainer.epochs=10"))["progress"]
    assert (longer["epoch"], longer["epochs_without_improvement"]) == (7, 3)
    assert "with more epochs, trainer.patience counts from here on" in capsys.readouterr().err
    # Without patience it trains to the end, and another monitor chooses anew.
    changed = train(small(*options, folder, "trainer.epochs=10", "trainer.patience=null", "trainer.mode=min"))
    assert (changed["progress"]["epoch"], changed["summary"]["stopped_early"]) == (10, False)
    assert changed["progress"]["best_step"] > 35
    assert "was chosen by 'max val/loss': it is chosen anew, by 'min val/loss'" in capsys.readouterr().err


def monitor(*options: str) -> Monitor:
    return Monitor.of(task_for("class", *options))


def test_what_is_no_number_is_named_and_no_improvement(caplog: pytest.LogCaptureFixture) -> None:
    by_loss, progress = monitor("trainer.monitor=val/loss", "trainer.patience=2", "trainer.min_delta=0.5"), Progress()
    counts = []
    for loss in (math.nan, 4.0, 3.6, 3.4, math.inf, 3.0):
        by_loss.note(Evaluation(loss, 1, {"accuracy": 0.5}, {}, None), progress)
        counts.append((progress.epochs_without_improvement, by_loss.gives_up(progress)))
    assert counts == [(1, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
    assert "val/loss is nan after epoch 0, which is no improvement" in caplog.text
    assert not by_loss.is_better(math.nan, None)
    assert not by_loss.is_better(math.nan, 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "max val/accuracy"),
        (("trainer.monitor=val/loss",), "min val/loss"),
        (("trainer.monitor=val/loss", "trainer.mode=max"), "max val/loss"),
        (("trainer.monitor=val/auroc", "metrics=[auroc]"), "max val/auroc"),
    ],
)
def test_a_metric_says_whether_more_of_it_is_better(options: tuple[str, ...], expected: str) -> None:
    assert str(monitor(*options)) == expected


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("trainer.monitor=val/aurok", "metrics=[auroc]"), r"=val/aurok: no such number .*did you mean val/auroc\?"),
        (("trainer.monitor=accuracy",), r"trainer\.monitor=accuracy: .*choices: val/loss, val/accuracy"),
        (
            (
                "trainer.monitor=val/distances",
                "metrics=[{_target_: tests.tasks.own_metrics.Distances, name: distances}]",
            ),
            r"trainer\.mode=null: its class doesn't say whether more of val/distances is better; choices: max, min",
        ),
    ],
)
def test_a_monitor_that_can_not_be_used_is_refused_in_one_line(options: tuple[str, ...], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        monitor(*options)


def test_a_monitor_without_validation_is_refused_before_ranks_meet() -> None:
    plan = RunPlan.resolve(small("trainer.patience=3", "data.val_fraction=0"), World.from_environment())
    with pytest.raises(ConfigError, match=r"trainer\.patience=3: needs validation samples"):
        plan.check_sizes(plan.load(), plan.check())


def test_older_checkpoints_have_the_tasks_own_score_as_their_best() -> None:
    old = Progress(step=5, best_score=0.75, best_step=5)
    monitor().resume(old)
    assert old.best_score == 0.75
    monitor("trainer.monitor=val/loss").resume(old)
    assert old.best_score is old.best_step is None
