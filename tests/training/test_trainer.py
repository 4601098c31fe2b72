"""The loop: where it ends, what it writes, and that a resumed run is the run that was never interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.config.schema import Config
from distrain.data.base import data_source
from distrain.errors import Failed
from distrain.reporting.loggers.base import InMemoryLogger
from distrain.runtime.run_owner import RunOwner
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import StepResult
from distrain.training.callback_list import CallbackList
from distrain.training.callbacks import Callback
from distrain.training.report import flatten
from distrain.training.run_plan import total_steps
from tests.data.helpers import images_of
from tests.runs import small, trainer_for
from tests.strategies.helpers import ALONE

#: 48 images to train on, in batches of 10 with a ragged last one of 8, and 5 to validate.
TRAIN, VAL, TEST, STEPS = 48, 5, 31, 5


class DropoutNet(nn.Module):
    """A model whose outputs in training depend on torch's random numbers."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels * image_size[0] * image_size[1], 16)
        self.norm = nn.BatchNorm1d(16)
        self.output = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.output(F.dropout(self.norm(self.hidden(images.flatten(1))), 0.5, self.training))
        return logits


DROPOUT = ("model=custom", "model._target_=tests.training.test_trainer.DropoutNet", "optimizer.lr=0.01")


class Witness(Callback):
    """Records the calls of the trainer, the number of updates at each call, and each step's results."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.results: list[StepResult] = []
        self.rates: list[float] = []
        self.logged: list[Mapping[str, float]] = []
        self.epochs: list[Mapping[str, float]] = []

    def on_fit_start(self, trainer: Any) -> None:
        self.calls.append(("start", trainer.progress.step))
        take_step = trainer.strategy.train_step

        def watched(batch: Any) -> StepResult:
            result: StepResult = take_step(batch)
            self.results.append(result)
            self.rates.append(trainer.strategy.optimizer.param_groups[0]["lr"])
            return result

        trainer.strategy.train_step = watched

    def on_step_end(self, trainer: Any) -> None:
        self.calls.append(("step", trainer.progress.step))

    def on_log(self, trainer: Any, values: Mapping[str, float]) -> None:
        self.calls.append(("log", trainer.progress.step))
        self.logged.append(values)

    def on_epoch_end(self, trainer: Any, values: Mapping[str, float]) -> None:
        self.calls.append(("epoch", trainer.progress.step))
        self.epochs.append(values)

    def on_fit_end(self, trainer: Any) -> None:
        self.calls.append(("end", trainer.progress.step))


class Run:
    """A run in this process, and its files."""

    def __init__(self, folder: Path, *overrides: str, callback: Callback | None = None) -> None:
        self.folder = folder
        self.config: Config = small(f"run_dir={folder}", "trainer.log_every_steps=2", *overrides)
        self.witness = Witness()
        self.logger = InMemoryLogger()
        with Runtime(self.config, ALONE) as runtime:
            self.trainer = trainer_for(self.config, runtime)
            self.trainer.report.logger = self.logger
            self.trainer.callbacks = CallbackList([self.witness, *([callback] if callback else [])])
            self.summary = self.trainer.fit()
        self.model = {name: tensor.clone() for name, tensor in self.trainer.strategy.model_state().items()}

    @property
    def checkpoints(self) -> list[int]:
        return [int(path.name[5:]) for path in checkpoint_format.list_checkpoints(self.folder / "checkpoints")]

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.logger.rows if row["kind"] == kind]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("whole"), *DROPOUT, "trainer.epochs=3", "checkpoint.keep=9")


def test_an_epoch_ends_with_evaluation_and_checkpoint(whole: Run) -> None:
    assert whole.checkpoints == [STEPS, 2 * STEPS, 3 * STEPS]
    rows = whole.rows("epoch")
    assert [(row["step"], row["epoch"]) for row in rows] == [(5, 1), (10, 2), (15, 3)]
    for row in rows:
        assert {"epoch/train_loss", "epoch/train_accuracy", "epoch/val_loss", "epoch/val_accuracy"} < row.keys()
        assert row["epoch/val_accuracy"] * VAL == round(row["epoch/val_accuracy"] * VAL)


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_samples(whole: Run) -> None:
    for number, row in enumerate(whole.rows("epoch")):
        results = whole.witness.results[number * STEPS : (number + 1) * STEPS]
        assert [result.count for result in results] == [10, 10, 10, 10, 8]
        assert row["epoch/train_loss"] * TRAIN == pytest.approx(
            math.fsum(float(r.loss_sum) for r in results), rel=1e-14
        )
        assert row["epoch/train_accuracy"] == sum(int(result.metric_sums) for result in results) / TRAIN


def test_each_log_covers_the_steps_since_the_last_one(whole: Run) -> None:
    rows = whole.rows("step")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14]
    names = ("loss", "accuracy", "gradient_norm", "learning_rate")
    speeds = tuple(f"speed/{name}" for name in ("images_per_second", "step_ms", "bytes_sent_per_step"))
    times = ("time/compute", "time/communication", "time/data", "time/other")
    for row in rows:
        assert set(row) == {
            "kind",
            "step",
            *(f"train/{name}" for name in names),
            *speeds,
            *times,
            "speed/compression_ratio",
        }
        assert sum(row[name] for name in times) == pytest.approx(1)
        assert row["speed/images_per_second"] > 0
        assert row["train/gradient_norm"] > 0
    results = whole.witness.results
    first, third = rows[0], rows[2]
    assert first["train/loss"] == pytest.approx(float(results[0].loss_sum + results[1].loss_sum) / 20)
    # The fifth step closed its epoch, so that the next row is of the sixth alone.
    assert third["train/loss"] == pytest.approx(float(results[5].loss_sum) / 10)


def test_the_learning_rate_follows_the_schedule(whole: Run) -> None:
    expected = [whole.config.optimizer.lr * whole.trainer.schedule(step) for step in range(3 * STEPS)]
    assert whole.witness.rates == expected
    assert len(set(expected)) > 5
    assert [row["train/learning_rate"] for row in whole.rows("step")] == expected[1::2]


def test_callbacks_are_called_in_order(whole: Run) -> None:
    per_epoch: list[tuple[str, int]] = []
    for step in range(1, 3 * STEPS + 1):
        per_epoch.append(("step", step))
        per_epoch += [("log", step)] if step % 2 == 0 else []
        per_epoch += [("epoch", step)] if step % STEPS == 0 else []
    assert whole.witness.calls == [("start", 0), *per_epoch, ("end", 3 * STEPS)]
    assert len(whole.witness.logged) == len(whole.rows("step"))
    assert [values["epoch"] for values in whole.witness.epochs] == [1, 2, 3]


def test_the_summary_has_the_results_of_the_run(whole: Run) -> None:
    summary = whole.summary
    assert json.loads((whole.folder / "summary.json").read_text()) == summary
    expected = {"strategy": "single", "world_size": 1, "mesh": {}, "compression": "none"}
    counted = {"epochs": 3, "steps": 15, "samples": 3 * TRAIN, "test_count": TEST, "bytes_sent_per_step": 0}
    assert {name: summary[name] for name in {**expected, **counted}} == {**expected, **counted}
    last = whole.rows("epoch")[-1]
    assert summary["train_loss"] == last["epoch/train_loss"]
    assert summary["val_accuracy"] == last["epoch/val_accuracy"]
    assert sum(summary["time_share"].values()) == pytest.approx(1)
    assert 0 < summary["step_ms"]["p50"] <= summary["step_ms"]["p95"]
    assert summary["images_per_second"] > 0
    assert summary["wall_seconds"] > 0
    assert summary["peak_memory_mb"] > 50


def test_the_test_split_is_counted_exactly(whole: Run) -> None:
    splits = data_source(whole.config.data).load()
    model = DropoutNet(3, 4, (8, 8)).eval()
    model.load_state_dict(whole.model)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (splits.mean, splits.std))
    logits = model((images_of(splits.test) / 255 - mean) / std)
    assert whole.summary["test_correct"] == int((logits.argmax(1) == splits.test.targets).sum())
    assert whole.summary["test_accuracy"] == whole.summary["test_correct"] / TEST
    expected = F.cross_entropy(logits, splits.test.targets).item()
    assert whole.summary["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_final_metrics_and_figures_are_logged(whole: Run) -> None:
    assert whole.logger.figures == [(15, "test/predictions"), (15, "test/confusion_matrix")]
    assert whole.logger.final == {
        f"final/{name}": whole.summary[name]
        for name in ("train_loss", "val_accuracy", "test_accuracy", "test_loss", "images_per_second")
    }


def test_dropout_depends_on_seed_and_step_alone(whole: Run, tmp_path: Path) -> None:
    again = Run(tmp_path / "again", *DROPOUT, "trainer.epochs=3")
    assert same(again.model, whole.model)
    other = Run(tmp_path / "other", *DROPOUT, "trainer.epochs=3", "seed=4294967295")
    assert not same(other.model, whole.model)

    class Masks(Callback):
        def __init__(self) -> None:
            self.masks: list[Tensor] = []

        def on_step_end(self, trainer: Any) -> None:
            trainer._generators.begin_step(trainer.progress.step, 0)
            self.masks.append(torch.rand(8))

    masks = Masks()
    Run(tmp_path / "masks", *DROPOUT, "trainer.epochs=1", callback=masks)
    assert len({tuple(mask.tolist()) for mask in masks.masks}) == STEPS


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_run_that_ends_within_an_epoch_evaluates_and_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.epochs=4", "trainer.max_steps=7")
    assert run.checkpoints == [5, 7]
    assert (run.summary["steps"], run.summary["epochs"], run.summary["samples"]) == (7, 1, TRAIN + 20)
    assert run.summary["test_count"] == TEST
    assert run.summary["train_loss"] == run.rows("epoch")[0]["epoch/train_loss"]
    _, progress = checkpoint_reader.load(run.checkpoint(7))
    assert (progress["step"], progress["epoch"], progress["epoch_samples"]) == (7, 1, 20)
    assert progress["epoch_sums"][2] == 20
    assert json.loads((tmp_path / "summary.json").read_text()) == run.summary


def test_within_the_first_epoch_the_training_loss_covers_the_samples_so_far(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.max_steps=3")
    expected = math.fsum(float(result.loss_sum) for result in run.witness.results) / 30
    assert run.summary["train_loss"] == pytest.approx(expected, rel=1e-14)
    assert run.summary["val_accuracy"] is None
    assert "final/val_accuracy" not in run.logger.final
    assert run.summary["epochs"] == 0


def test_a_step_limit_at_the_end_of_an_epoch_ends_the_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.epochs=4", "trainer.max_steps=5")
    assert (run.summary["steps"], run.summary["epochs"]) == (5, 1)
    assert len(run.rows("epoch")) == 1


def test_without_validation_images_there_is_no_validation(tmp_path: Path) -> None:
    run = Run(tmp_path, "data.val_fraction=0", "trainer.epochs=1")
    (row,) = run.rows("epoch")
    assert not any("val" in name for name in row)
    assert run.summary["val_accuracy"] is None
    assert run.summary["samples"] == 53
    _, progress = checkpoint_reader.load(run.checkpoint(6))
    assert progress["best_step"] is None


@pytest.mark.parametrize(("epochs", "limit", "steps"), [(3, None, 15), (3, 7, 7), (3, 99, 15)])
def test_total_steps_is_the_smaller_of_epochs_and_max_steps(epochs: int, limit: int | None, steps: int) -> None:
    config = small(f"trainer.epochs={epochs}", f"trainer.max_steps={'null' if limit is None else limit}")
    assert total_steps(config, 5) == steps


def test_nested_keys_become_dotted_ones() -> None:
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_on_fit_end_is_also_called_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Fails(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.progress.step == 3:
                raise RuntimeError("out of luck")

    class Notes(Fails):
        ended_at: int | None = None

        def on_fit_end(self, trainer: Any) -> None:
            self.ended_at = trainer.progress.step

    notes = Notes()
    with pytest.raises(Failed):
        Run(tmp_path, callback=notes)
    assert notes.ended_at == 3
    problem = "CallbackFailed: callback Notes failed in on_step_end (RuntimeError: out of luck) at "
    assert f"failed at step 3: {problem}" in capsys.readouterr().err


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_saved_at_their_intervals_and_old_ones_removed(tmp_path: Path) -> None:
    options = ("trainer.epochs=4", "checkpoint.every_steps=3", "checkpoint.every_epochs=2")
    kept = Run(tmp_path / "all", *options, "checkpoint.keep=99")
    assert kept.checkpoints == [3, 6, 9, 10, 12, 15, 18, 20]
    run = Run(tmp_path / "few", *options, "checkpoint.keep=1")
    _, progress = checkpoint_reader.load(run.checkpoint(20))
    assert set(run.checkpoints) <= {20, progress["best_step"]}
    assert same(run.model, kept.model)


def test_the_best_checkpoint_is_kept_in_addition_to_the_newest(tmp_path: Path) -> None:
    # A rate that ruins what the first epoch learned.
    options = ("trainer.epochs=4", "checkpoint.keep=1", "scheduler=constant", "optimizer.lr=0.01")

    class Ruin(Callback):
        def on_epoch_end(self, trainer: Any, values: Mapping[str, float]) -> None:
            if trainer.progress.epoch == 2:
                with torch.no_grad():
                    for tensor in trainer.strategy.model_state().values():
                        tensor.zero_()

    run = Run(tmp_path, *options, callback=Ruin())
    accuracies = [row["epoch/val_accuracy"] for row in run.rows("epoch")]
    best = 1 + accuracies.index(max(accuracies))
    assert best <= 2
    assert run.checkpoints == [best * STEPS, 4 * STEPS]


def test_a_save_within_an_epoch_does_not_change_its_training_loss(whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=3", "checkpoint.every_steps=2", "trainer.log_every_steps=3")
    assert same(run.model, whole.model)
    for row, expected in zip(run.rows("epoch"), whole.rows("epoch"), strict=True):
        assert row["epoch/train_loss"] == pytest.approx(expected["epoch/train_loss"], rel=1e-14)
        assert row["epoch/train_accuracy"] == expected["epoch/train_accuracy"]


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("saved")
    return Run(folder, *DROPOUT, "trainer.epochs=3", "checkpoint.every_steps=1", "checkpoint.keep=99")


@pytest.mark.parametrize("step", [1, 5, 7, 10, 14])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(saved: Run, step: int, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=3", f"resume={saved.checkpoint(step)}", "checkpoint.keep=99")
    assert same(run.model, saved.model)
    assert run.witness.calls[0] == ("start", step)
    assert len(run.witness.results) == 15 - step
    counts = ("train_loss", "val_accuracy", "test_correct", "test_loss", "steps", "samples", "epochs")
    assert {name: run.summary[name] for name in counts} == {name: saved.summary[name] for name in counts}
    later = [row for row in saved.rows("epoch") if row["step"] >= run.rows("epoch")[0]["step"]]
    for row, expected in zip(run.rows("epoch"), later, strict=True):
        for name in ("epoch", "epoch/train_loss", "epoch/train_accuracy", "epoch/val_loss", "epoch/val_accuracy"):
            assert row[name] == pytest.approx(expected[name], rel=1e-14), name
    assert torch.equal(
        checkpoint_reader.load(run.checkpoint(15))[0]["optimizer"]["hidden.weight/exp_avg"],
        checkpoint_reader.load(saved.checkpoint(15))[0]["optimizer"]["hidden.weight/exp_avg"],
    )


@pytest.mark.parametrize("options", [("trainer.precision=fp16",), ("optimizer=sgd", "optimizer.momentum=0.9")])
def test_a_resumed_run_with_other_state_equals_the_uninterrupted_one(options: tuple[str, ...], tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", *DROPOUT, *options, "trainer.epochs=2", "checkpoint.every_steps=3")
    resumed = Run(tmp_path / "resumed", *DROPOUT, *options, "trainer.epochs=2", f"resume={whole.checkpoint(9)}")
    assert len(resumed.witness.results) == 1
    assert same(resumed.model, whole.model)


def test_a_run_resumes_the_newest_valid_checkpoint_of_its_folder(
    saved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Run(tmp_path, *DROPOUT, "trainer.epochs=3", "trainer.max_steps=7", "scheduler=constant")
    newest = first.checkpoint(7) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    second = Run(tmp_path, *DROPOUT, "trainer.epochs=3", "trainer.max_steps=9", "scheduler=constant")
    assert second.witness.calls[0] == ("start", 5)
    assert str(newest) in capsys.readouterr().err
    straight = Run(tmp_path / "straight", *DROPOUT, "trainer.epochs=3", "trainer.max_steps=9", "scheduler=constant")
    assert same(second.model, straight.model)
    anew = Run(tmp_path, *DROPOUT, "trainer.max_steps=1", "resume=never")
    assert anew.witness.calls[0] == ("start", 0)


def test_a_finished_run_does_not_train_again(saved: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=2", f"resume={saved.checkpoint(15)}")
    assert run.witness.results == []
    assert same(run.model, saved.model)
    assert run.summary["steps"] == 15
    assert run.summary["test_correct"] == saved.summary["test_correct"]
    assert run.summary["images_per_second"] == 0


def test_a_lower_limit_ends_a_resumed_run_at_once(saved: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=3", "trainer.max_steps=4", f"resume={saved.checkpoint(7)}")
    assert run.witness.results == []
    assert run.summary["steps"] == 7


def test_a_resumed_run_may_have_another_batch_size(saved: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=2", "data.batch_size=20", f"resume={saved.checkpoint(3)}")
    # 18 samples of the first epoch are left, then 48.
    assert [result.count for result in run.witness.results] == [18, 20, 20, 8]
    assert run.summary["samples"] == 2 * TRAIN


def test_a_run_resumed_between_epochs_may_have_other_images(saved: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, *DROPOUT, "trainer.epochs=2", "data.limit=20", f"resume={saved.checkpoint(5)}")
    assert [result.count for result in run.witness.results] == [10, 10]
    assert run.summary["epochs"] == 2


def test_a_checkpoint_of_another_model_is_refused(
    saved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Failed):
        Run(tmp_path, f"resume={saved.checkpoint(5)}")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distrain: ")]
    assert f"resume={saved.checkpoint(5)}: was saved with another configuration: model._target_: " in line


def test_a_later_start_takes_over_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class AnotherStarts(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.progress.step == 3:
                RunOwner.take(tmp_path)

    with pytest.raises(Failed):
        Run(tmp_path, "checkpoint.every_steps=2", "checkpoint.background=false", callback=AnotherStarts())
    assert "failed at step 4: another start of this run has taken over" in capsys.readouterr().err
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]
