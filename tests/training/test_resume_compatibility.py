"""Resuming: which checkpoint, under which configurations, what is refused, and the metrics of a resumed run."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.config.load import to_container
from distrain.errors import ConfigError, Failed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import resume
from tests.harness import run_ranks
from tests.runs import check, small, trainer_for
from tests.strategies.helpers import ALONE
from tests.training.resumed import Run, log_of

# --- compatibility ---------------------------------------------------------------------------------------------------


def saved_with(*overrides: str) -> dict[str, Any]:
    return to_container(small(*overrides))


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("model=resnet18", "model.name: simple_cnn → resnet18"),
        ("optimizer=sgd", "optimizer.name: adam → sgd"),
        ("data.val_fraction=0.2", "data.val_fraction: 0.1 → 0.2"),
        ("data.split_seed=8", "data.split_seed: 0 → 8"),
        ("data.train_size=54", "data.train_size: 53 → 54"),
        ("prune.amount=0.5", "prune.amount: null → 0.5"),
    ],
)
def test_an_incompatible_configuration_is_refused_with_the_difference(override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resume.refuse_incompatible(small(override), Path("step_1"), saved_with(), mid_epoch=False)
    assert str(refused.value).startswith("resume=step_1: was saved with another configuration: ")
    assert shown in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["seed=3", "data.limit=20"])
def test_the_order_of_samples_may_change_only_between_epochs(override: str) -> None:
    resume.refuse_incompatible(small(override), Path("step_1"), saved_with(), mid_epoch=False)
    with pytest.raises(ConfigError, match=r"in the middle of an epoch, whose order of samples would change"):
        resume.refuse_incompatible(small(override), Path("step_1"), saved_with(), mid_epoch=True)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.5",
        "data.batch_size=5",
        "data.augment.flip=true",
        "trainer.epochs=7",
        "strategy=ddp",
        "loss=mean_squared_error",
    ],
)
def test_other_keys_may_change(override: str) -> None:
    resume.refuse_incompatible(small(override), Path("step_1"), saved_with(), mid_epoch=True)


def test_keys_that_a_release_added_or_removed_are_ignored() -> None:
    older = saved_with()
    older["model"]["gone"] = 3
    del older["data"]["noise"]
    resume.refuse_incompatible(small(), Path("step_1"), older, mid_epoch=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of three epochs of five steps, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    return Run(folder, "trainer.epochs=3", "checkpoint.every_steps=1", "checkpoint.keep=99", "logger=tensorboard")


def test_another_model_is_refused_before_the_run_starts(parts: Run) -> None:
    for where in (f"resume={parts.checkpoint(5)}", f"run_dir={parts.folder}"):
        with pytest.raises(ConfigError, match=r"^resume=.*: was saved with another configuration: model\."):
            check(small("model=resnet18", where), ALONE)
    check(small("model=resnet18", f"run_dir={parts.folder}", "resume=never"), ALONE)


class Narrow(nn.Module):
    """A user's model, whose width is in its code and not in the configuration."""

    width = 4

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 8 * 8, self.width)
        self.out = nn.Linear(self.width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.hidden(images.flatten(1)))
        return result


class Adapting(Narrow):
    """Takes what it can use of a narrower model."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        own = self.state_dict()
        fitting = {name: saved if saved.shape == own[name].shape else own[name] for name, saved in state_dict.items()}
        return super().load_state_dict(fitting, *arguments, **options)


@pytest.mark.parametrize("where", ["run_dir", "resume"])
def test_a_model_whose_code_changed_is_refused_before_the_run_starts(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("model=custom", f"model._target_={__name__}.Narrow")
    run = Run(tmp_path, *model, "trainer.max_steps=2")
    named = f"run_dir={tmp_path}" if where == "run_dir" else f"resume={run.checkpoint(2)}"
    check(small(*model, named), ALONE)
    monkeypatch.setattr(Narrow, "width", 5)
    misfit = r"^resume=.*: the saved model is not this model: hidden\.weight is \(4, 192\), the model's \(5, 192\)"
    with pytest.raises(ConfigError, match=misfit):
        check(small(*model, named), ALONE)


def test_only_a_model_that_loads_in_its_own_way_may_have_other_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An optimizer without state of its own, which the model could not adapt.
    optimizer = ("optimizer=sgd", "optimizer.momentum=0")
    model = ("model=custom", f"model._target_={__name__}.Adapting", f"run_dir={tmp_path}", *optimizer)
    Run(tmp_path, *model, "trainer.max_steps=2")
    monkeypatch.setattr(Narrow, "width", 5)
    check(small(*model), ALONE)
    assert Run(tmp_path, *model, "trainer.max_steps=3").progress.step == 3


def test_an_optimizer_that_the_saved_state_does_not_fit_is_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model takes what it can use of other shapes, which the optimizer can't.
    model = ("model=custom", f"model._target_={__name__}.Adapting", f"run_dir={tmp_path}", "optimizer=adam")
    Run(tmp_path, *model, "trainer.max_steps=2")
    check(small(*model), ALONE)
    monkeypatch.setattr(Narrow, "width", 5)
    misfit = r"^resume=.*: optimizer state hidden\.\S+ is \(4.*\), the parameter \(5.*\); to start from .*$"
    with pytest.raises(ConfigError, match=misfit):
        check(small(*model), ALONE)


def test_a_checkpoint_of_another_optimizer_is_refused_before_the_run_starts(parts: Run, tmp_path: Path) -> None:
    go_on = r"optimizer\.name: adam → sgd; to go on from it type optimizer=adam; to start from the beginning .*$"
    with pytest.raises(ConfigError, match=go_on):
        check(small("optimizer=sgd", f"run_dir={parts.folder}"), ALONE)
    # One that doesn't contain its configuration.
    state, progress = checkpoint_reader.load(parts.checkpoint(7))
    state.update(compressor=state["compressor"][0], local={}, config=None)
    older = checkpoint_writer.save(tmp_path / "older", state, progress)
    with pytest.raises(ConfigError, match=r"^resume=.*saved with optimizer=adam, and this run has optimizer=sgd; to"):
        check(small("optimizer=sgd", f"resume={older}"), ALONE)


def test_a_damaged_checkpoint_is_not_compared(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.max_steps=2", "trainer.epochs=1")
    torch.save({}, run.checkpoint(2) / "model.safetensors")
    check(small("model=resnet18", f"run_dir={tmp_path}"), ALONE)


def test_a_checkpoint_without_a_configuration_can_be_resumed(parts: Run, tmp_path: Path) -> None:
    state, progress = checkpoint_reader.load(parts.checkpoint(7))
    state.update(compressor=state["compressor"][0], local={}, config=None)
    older = checkpoint_writer.save(tmp_path / "older", state, progress)
    run = Run(tmp_path / "run", "trainer.epochs=3", f"resume={older}")
    assert run.summary["test_loss"] == parts.summary["test_loss"]
    assert "doesn't contain its configuration" in log_of(run.folder)


def test_a_checkpoint_with_an_invalid_position_is_refused_with_the_key(parts: Run, tmp_path: Path) -> None:
    state, progress = checkpoint_reader.load(parts.checkpoint(7))
    state.update(compressor=state["compressor"][0], local={})
    odd = checkpoint_writer.save(tmp_path / "odd", state, progress | {"epoch_samples": "20"})
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path / "run", "trainer.epochs=3", f"resume={odd}")
    assert f"resume={odd}: {odd}/state.json: progress.epoch_samples='20' must be a whole number" in str(caught.value)


def unreadable_on_one_rank(folder: Path, saved: Path) -> str:
    load = checkpoint_reader.load

    def fails(path: Path) -> Any:
        if os.environ["RANK"] == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return load(path)

    checkpoint_reader.load = fails
    configuration = small("strategy=ddp", f"run_dir={folder}", f"resume={saved}", "trainer.epochs=3")
    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.suppress(Failed, ConfigError):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            trainer_for(configuration, runtime).fit()
    return output.getvalue()


def test_all_ranks_name_a_rank_that_can_not_read_the_checkpoint(parts: Run, tmp_path: Path) -> None:
    for output in run_ranks(unreadable_on_one_rank, 2, tmp_path, parts.checkpoint(5)):
        assert f"resume={parts.checkpoint(5)}: rank 1 on {World.from_environment().host} can't read it: " in output
        assert "Permission denied" in output


def resumed_step(folder: Path, newest: str) -> int:
    load = checkpoint_reader.load

    def fails(path: Path) -> Any:
        if os.environ["RANK"] == "1" and path.name == newest:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return load(path)

    checkpoint_reader.load = fails
    configuration = small("strategy=ddp", f"run_dir={folder}", "trainer.epochs=3")
    with Runtime(configuration, World.from_environment()) as runtime:
        return trainer_for(configuration, runtime).checkpointing.resume().step


def test_all_ranks_use_the_checkpoint_before_one_that_a_single_rank_can_not_read(parts: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(parts.folder, tmp_path / "run")
    newest = max(path.name for path in (folder / "checkpoints").iterdir())
    before = int(newest.removeprefix("step_")) - 1
    assert run_ranks(resumed_step, 2, folder, newest) == [before, before]
    warning = (
        f"checkpoint left out: {folder}/checkpoints/{newest}: rank 1 on {World.from_environment().host} can't read"
    )
    assert warning in log_of(folder)
    assert "Stale file handle" in log_of(folder)


# --- metrics of a resumed run ----------------------------------------------------------------------------------------


def figures(run: Run) -> list[dict[str, Any]]:
    """All rows, without the values that depend on the clock."""
    rows = run.rows("step") + run.rows("epoch")
    timed = ("speed/", "time", "epoch/images")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def points(run: Run) -> dict[str, list[int]]:
    """The steps of all values in the event files, by tag, but speeds: an epoch that is warm-up alone has none."""
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    found: dict[str, list[int]] = {}
    for path in sorted((run.folder / "tensorboard").iterdir()):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            assert MessageToDict(event)
            for value in event.summary.value:
                if not value.tag.endswith("images_per_second"):
                    found.setdefault(value.tag, []).append(event.step)
    return found


@pytest.fixture
def killed_run(tmp_path: Path) -> Path:
    """The folder of a run that was killed at step 8 while it wrote a row; its last checkpoint is of step 5."""
    options = ("trainer.epochs=3", "checkpoint.every_steps=99", "logger=tensorboard", "checkpoint.keep=99")
    run = Run(tmp_path, *options, "trainer.max_steps=8", "scheduler=constant")
    checkpoint_reader.verify(run.checkpoint(5))
    damaged = run.checkpoint(8) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "summary.json").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 8, "ti')
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-3])
    return tmp_path


def test_metrics_continue_without_duplicates_or_gaps(killed_run: Path, tmp_path: Path) -> None:
    options = ("trainer.epochs=3", "logger=tensorboard", "scheduler=constant")
    resumed = Run(killed_run, *options)
    assert resumed.progress.step == 15
    whole = Run(tmp_path / "whole", *options)
    assert figures(resumed) == figures(whole)
    assert points(resumed) == points(whole)
    assert resumed.rows("step")[2]["train/loss"] == whole.rows("step")[2]["train/loss"]


def test_means_are_right_after_a_resume_between_logs_or_before_the_end_of_an_epoch(tmp_path: Path) -> None:
    # The checkpoint of step 5 is saved before the end of the first epoch, not after it.
    options = ("trainer.epochs=2", "checkpoint.every_steps=1", "checkpoint.every_epochs=2", "checkpoint.keep=99")
    whole = Run(tmp_path / "whole", *options)
    for step in (3, 5):
        run = Run(tmp_path / str(step), *options, f"resume={whole.checkpoint(step)}")
        # A save resets the sums, so the next step row covers the samples since the save; an epoch row covers all.
        later = [row for row in figures(whole) if row["step"] > step or (row["kind"] == "epoch" and row["step"] == 5)]
        assert figures(run) == later


def test_a_run_from_the_beginning_removes_the_former_metrics(killed_run: Path, tmp_path: Path) -> None:
    options = ("trainer.epochs=1", "logger=tensorboard", "resume=never")
    run = Run(killed_run, *options)
    whole = Run(tmp_path / "whole", *options)
    assert figures(run) == figures(whole)
    assert points(run) == points(whole)


def test_resuming_a_finished_run_changes_nothing(parts: Run) -> None:
    def content() -> dict[str, bytes]:
        names = ("summary.json", "metrics.jsonl")
        events = {path.name: path.read_bytes() for path in (parts.folder / "tensorboard").iterdir()}
        return {**events, **{name: (parts.folder / name).read_bytes() for name in names}}

    before = content()
    again = Run(
        parts.folder, "trainer.epochs=3", "checkpoint.every_steps=1", "logger=tensorboard", "checkpoint.keep=99"
    )
    assert again.summary == parts.summary
    assert content() == before
    assert "nothing is left to train" in log_of(parts.folder)


def test_a_longer_run_replaces_the_former_final_results(tmp_path: Path) -> None:
    options = ("trainer.epochs=3", "logger=tensorboard", "scheduler=constant")
    Run(tmp_path, *options, "trainer.max_steps=7")
    run = Run(tmp_path, *options, "trainer.max_steps=9")
    found = points(run)
    assert found["test/predictions"] == found["test/confusion_matrix"] == [9]
    assert found["final/test_accuracy"] == [0]
    assert [len(steps) for tag, steps in found.items() if tag.startswith("_hparams_/")] == [1, 1, 1]
    assert found["train/loss"] == [2, 4, 6, 8]
    assert found["epoch/val_loss"] == [5]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keeps warnings about damaged checkpoints out of the output; tests look for them in the log files."""
    logger = logging.getLogger("distrain")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
