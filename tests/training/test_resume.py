"""Going on: from which checkpoint, under which configuration, with what of each part, and on any ranks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.config.load import to_container
from distrain.data.batch import Batch
from distrain.errors import ConfigError, Failed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import StepResult
from distrain.training import resume
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small, trainer_for
from tests.strategies.helpers import ALONE

NORM_NET = ("model=custom", "model._target_=tests.runs.NormNet")


def train(*overrides: str) -> dict[str, Any]:
    """A rank's run, with the samples of each step that it saw."""
    seen: list[list[int]] = []
    configuration = small(*overrides)
    world = World.from_environment()
    check(configuration, world)
    with Runtime(configuration, world) as runtime:
        trainer = trainer_for(configuration, runtime)
        take_step = trainer.strategy.train_step

        def watched(batch: Batch) -> StepResult:
            seen.append(batch.indices.tolist())
            return take_step(batch)

        trainer.strategy.train_step = watched  # type: ignore[method-assign]
        summary = trainer.fit()
        model = {name: tensor.detach().clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"model": model, "seen": seen, "shard": trainer.strategy.data_shard, "summary": summary}


def start(ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return run_ranks(train, ranks, *overrides)


def steps_of(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The samples of each step over all shares."""
    shares = {rank["shard"]: rank["seen"] for rank in ranks}
    return [[sample for share in step for sample in share] for step in zip(*shares.values(), strict=True)]


def said(folder: Path) -> str:
    return (folder / "logs" / "rank_0.log").read_text()


def tables(folder: Path) -> list[dict[str, tuple[str, str]]]:
    """What became of each part, and why, at each resume that a run's log tells of."""
    text = said(folder)
    found = []
    for each in re.findall(r"this run \(.*\) has:\n((?:  .*\n)+)", text):
        rows = [re.split(r"  +", line.strip(), maxsplit=2) for line in each.splitlines()]
        found.append({part: (how, why) for part, how, why in rows})
    return found


# --- anything to anything --------------------------------------------------------------------------------------------


#: 127 images in batches of 10: 13 steps an epoch, the last of 7, so that every tenth step is amid one.
CHAIN = (
    *NORM_NET,
    "+model.kwargs.norm=batch",
    "data.train_size=127",
    "data.val_fraction=0",
    "optimizer=sgd",
    "optimizer.momentum=0.9",
    "optimizer.lr=0.01",
    "scheduler=step",
    "scheduler.milestones=[1.0,2.0]",
    "scheduler.gamma=0.5",
    "trainer.epochs=100",
)


def test_the_ranks_may_change_every_ten_steps(tmp_path: Path) -> None:
    whole = [train(*CHAIN, f"run_dir={tmp_path}/whole", "trainer.max_steps=40")]
    steps = []
    pipeline = ("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=1")
    for end, ranks, strategy in (
        (10, 4, ("strategy=ddp",)),
        (20, 2, pipeline),
        (30, 1, ()),
        (40, 3, ("strategy=ddp",)),
    ):
        options = (*CHAIN, *strategy, f"run_dir={tmp_path}/parts", f"trainer.max_steps={end}")
        last = start(ranks, *options) if ranks > 1 else [train(*options)]
        steps += steps_of(last)
    for rank in last:
        assert relative_difference(rank["model"], whole[0]["model"]) <= 1e-5
    # Not only each sample once an epoch, but those of each step.
    assert [sorted(step) for step in steps] == [sorted(step) for step in steps_of(whole)]
    for epoch in range(3):
        samples = [sample for step in steps[13 * epoch : 13 * epoch + 13] for sample in step]
        assert sorted(samples) == list(range(127))
    for key in ("epochs", "samples", "test_count"):
        assert last[0]["summary"][key] == whole[0]["summary"][key]
    assert last[0]["summary"]["train_loss"] == pytest.approx(whole[0]["summary"]["train_loss"], rel=1e-5)
    for table in tables(tmp_path / "parts"):
        hows = {part: how for part, (how, _) in table.items()}
        assert hows["model"] == hows["optimizer"] == hows["data position"] == "exact"
        assert hows["schedule"] == "changed"
        assert hows["random draws"] == "redistributed"
    assert "changed: strategy.name: ddp → pipeline" in said(tmp_path / "parts")


def test_the_batch_size_may_change_amid_an_epoch(tmp_path: Path) -> None:
    first = train(*CHAIN, f"run_dir={tmp_path}", "trainer.max_steps=5")
    second = train(*CHAIN, f"run_dir={tmp_path}", "data.batch_size=16", "trainer.max_steps=10")
    steps = steps_of([first]) + steps_of([second])
    assert [len(step) for step in steps] == [*[10] * 5, *[16] * 4, 13]
    assert sorted(sample for step in steps for sample in step) == list(range(127))


# --- the table -------------------------------------------------------------------------------------------------------


LOSSY = (*NORM_NET, "+model.kwargs.norm=group", "compression.min_elements=100", "trainer.epochs=100")


def hows(folder: Path) -> dict[str, str]:
    return {part: how for part, (how, _) in tables(folder)[-1].items()}


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint amid the first epoch of ddp on three ranks, by compressor."""
    folder = tmp_path_factory.mktemp("lossy")
    found = {}
    for name in ("topk", "powersgd"):
        start(3, "strategy=ddp", f"compression={name}", *LOSSY, f"run_dir={folder}/{name}", "trainer.max_steps=3")
        found[name] = folder / name / "checkpoints" / "step_00000003"
    return found


#: What becomes of most parts when only the ranks differ.
MOVED = {
    "model": "exact",
    "optimizer": "exact",
    "local state": "absent",
    "loss scale": "absent",
    "schedule": "changed",
    "data position": "exact",
    "random draws": "redistributed",
    "best metric": "absent",
}


@pytest.mark.parametrize(("name", "factors"), [("topk", "absent"), ("powersgd", "exact")])
def test_residuals_move_to_other_ranks(name: str, factors: str, lossy: dict[str, Path], tmp_path: Path) -> None:
    options = ("strategy=ddp", f"compression={name}", *LOSSY, "trainer.max_steps=4", f"resume={lossy[name]}")
    start(2, *options, f"run_dir={tmp_path}")
    assert hows(tmp_path) == {**MOVED, "residuals": "redistributed", "compressor's factors": factors}
    assert "the sum over 3 ranks, in equal shares among 2 replicas" in said(tmp_path)


def test_on_the_same_ranks_everything_is_exact(lossy: dict[str, Path], tmp_path: Path) -> None:
    options = ("strategy=ddp", "compression=powersgd", *LOSSY, "trainer.max_steps=3")
    start(3, *options, f"run_dir={tmp_path}", f"resume={lossy['powersgd']}")
    same = {"schedule": "exact", "random draws": "exact", "residuals": "exact", "compressor's factors": "exact"}
    assert hows(tmp_path) == {**MOVED, **same}


def test_a_pipeline_has_no_place_for_residuals_of_another_unit_or_without_error_feedback(
    lossy: dict[str, Path], tmp_path: Path
) -> None:
    options = (*LOSSY[:-2], "trainer.epochs=100", "trainer.max_steps=4")
    start(2, "strategy=pipeline", *options, f"run_dir={tmp_path}/a", f"resume={lossy['powersgd']}")
    assert hows(tmp_path / "a") == {**MOVED, "residuals": "reset", "compressor's factors": "reset"}
    start(2, "strategy=local_sgd", *options, f"run_dir={tmp_path}/b", f"resume={lossy['topk']}")
    assert hows(tmp_path / "b") == {**MOVED, "residuals": "reset", "compressor's factors": "reset"}
    assert "gradients travelled, now differences" in said(tmp_path / "b")


def test_copies_that_had_parted_go_on_alone_or_from_their_mean(tmp_path: Path) -> None:
    options = ("strategy=local_sgd", "strategy.sync_every=2", *NORM_NET, "+model.kwargs.norm=batch")
    start(2, *options, f"run_dir={tmp_path}/local", "trainer.max_steps=3")
    saved = f"resume={tmp_path}/local/checkpoints/step_00000003"
    start(2, *options, f"run_dir={tmp_path}/same", "trainer.max_steps=3", saved)
    found = hows(tmp_path / "same")
    assert (found["model"], found["optimizer"], found["local state"]) == ("exact",) * 3
    start(2, "strategy=ddp", *options[2:], f"run_dir={tmp_path}/ddp", "trainer.max_steps=4", saved)
    found = hows(tmp_path / "ddp")
    assert (found["model"], found["optimizer"], found["local state"]) == ("redistributed", "redistributed", "reset")


def test_one_process_has_its_table_too(tmp_path: Path) -> None:
    options = ("trainer.precision=fp16", "optimizer=sgd", "optimizer.momentum=0", "checkpoint.every_steps=7")
    run = Run(tmp_path / "whole", *options, "trainer.max_steps=7")
    assert tables(tmp_path / "whole") == []
    again = Run(tmp_path / "again", *options, "trainer.max_steps=7", f"resume={run.checkpoint(7)}")
    found = hows(again.folder)
    assert found == {
        "model": "exact",
        "optimizer": "absent",
        "local state": "absent",
        "loss scale": "exact",
        "residuals": "absent",
        "compressor's factors": "absent",
        "schedule": "exact",
        "data position": "exact",
        "random draws": "exact",
        "best metric": "exact",
    }
    assert "epoch 1, 20 of 48 samples seen" in said(again.folder)
    start(2, "strategy=ddp", *options, f"run_dir={tmp_path}/ddp", f"resume={run.checkpoint(7)}", "trainer.max_steps=7")
    assert (hows(tmp_path / "ddp")["loss scale"], hows(tmp_path / "ddp")["best metric"]) == ("exact", "exact")
    rounded = Run(
        tmp_path / "other", *options[1:], "trainer.precision=fp64", "trainer.max_steps=8", f"resume={run.checkpoint(7)}"
    )
    found = hows(rounded.folder)
    assert (found["model"], found["loss scale"], found["schedule"]) == ("changed", "absent", "changed")
    assert "float32 to float64" in said(rounded.folder)


# --- runs in this process --------------------------------------------------------------------------------------------


class Run:
    """A run of one process and its folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        configuration = small(f"run_dir={folder}", "trainer.log_every_steps=2", *overrides)
        check(configuration, ALONE)
        with Runtime(configuration, ALONE) as runtime:
            trainer = trainer_for(configuration, runtime)
            self.summary = trainer.fit()
        self.progress = trainer.progress

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


# --- does it fit? ----------------------------------------------------------------------------------------------------


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
    ],
)
def test_what_would_mean_something_else_is_refused_with_the_difference(override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resume.refuse_if_changed(small(override), Path("step_1"), saved_with(), amid_epoch=False)
    assert str(refused.value).startswith("resume=step_1: was saved with another configuration: ")
    assert shown in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["seed=3", "data.limit=20"])
def test_an_epoch_keeps_its_order_and_the_next_may_have_another(override: str) -> None:
    resume.refuse_if_changed(small(override), Path("step_1"), saved_with(), amid_epoch=False)
    with pytest.raises(ConfigError, match=r"amid an epoch, whose order of samples would change"):
        resume.refuse_if_changed(small(override), Path("step_1"), saved_with(), amid_epoch=True)


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
def test_anything_else_may_change(override: str) -> None:
    resume.refuse_if_changed(small(override), Path("step_1"), saved_with(), amid_epoch=True)


def test_a_key_that_came_with_a_release_is_no_difference() -> None:
    older = saved_with()
    older["model"]["gone"] = 3
    del older["data"]["noise"]
    resume.refuse_if_changed(small(), Path("step_1"), older, amid_epoch=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three epochs (of five steps) in one go, each step saved."""
    folder = tmp_path_factory.mktemp("whole")
    return Run(folder, "trainer.epochs=3", "checkpoint.every_steps=1", "checkpoint.keep=99", "logger=tensorboard")


def test_another_model_is_refused_before_anything_starts(parts: Run) -> None:
    for where in (f"resume={parts.checkpoint(5)}", f"run_dir={parts.folder}"):
        with pytest.raises(ConfigError, match=r"^resume=.*: was saved with another configuration: model\."):
            check(small("model=resnet18", where), ALONE)
    check(small("model=resnet18", f"run_dir={parts.folder}", "resume=never"), ALONE)


def test_a_damaged_checkpoint_refuses_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path, "trainer.max_steps=2", "trainer.epochs=1")
    torch.save({}, run.checkpoint(2) / "model.safetensors")
    check(small("model=resnet18", f"run_dir={tmp_path}"), ALONE)


def test_a_checkpoint_of_before_configurations_were_saved_is_gone_on_from(parts: Run, tmp_path: Path) -> None:
    state, progress = checkpoint_reader.load(parts.checkpoint(7))
    state.update(compressor=state["compressor"][0], local={}, config=None)
    older = checkpoint_writer.save(tmp_path / "older", state, progress)
    run = Run(tmp_path / "run", "trainer.epochs=3", f"resume={older}")
    assert run.summary["test_loss"] == parts.summary["test_loss"]
    assert "doesn't hold its configuration" in said(run.folder)


def test_a_checkpoint_with_an_odd_position_is_refused_by_the_name_of_what_is_odd(
    parts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, progress = checkpoint_reader.load(parts.checkpoint(7))
    state.update(compressor=state["compressor"][0], local={})
    odd = checkpoint_writer.save(tmp_path / "odd", state, progress | {"epoch_samples": "20"})
    with pytest.raises((ConfigError, Failed)):
        Run(tmp_path / "run", "trainer.epochs=3", f"resume={odd}")
    assert f"resume={odd}" in (told := said(tmp_path / "run") + capsys.readouterr().err)
    assert "progress.epoch_samples='20' is not of type int" in told


def blind_on_one_rank(folder: Path, saved: Path) -> str:
    load = checkpoint_reader.load

    def fails(path: Path) -> Any:
        if os.environ["RANK"] == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return load(path)

    checkpoint_reader.load = fails
    configuration = small("strategy=ddp", f"run_dir={folder}", f"resume={saved}", "trainer.epochs=3")
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(Failed, ConfigError):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            trainer_for(configuration, runtime).fit()
    return told.getvalue()


def test_a_rank_that_cant_read_what_rank_0_chose_is_named_by_all(parts: Run, tmp_path: Path) -> None:
    for told in run_ranks(blind_on_one_rank, 2, tmp_path, parts.checkpoint(5)):
        assert f"resume={parts.checkpoint(5)}: rank 1 on {World.from_environment().host} can't read it: " in told
        assert "Permission denied" in told


# --- what a run writes goes on ---------------------------------------------------------------------------------------


def figures(run: Run) -> list[dict[str, Any]]:
    """All rows, without what depends on the clock."""
    rows = run.rows("step") + run.rows("epoch")
    timed = ("speed/", "time", "epoch/images")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def points(run: Run) -> dict[str, list[int]]:
    """The steps of everything in the event files, by tag."""
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    found: dict[str, list[int]] = {}
    for path in sorted((run.folder / "tensorboard").iterdir()):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            assert MessageToDict(event)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """The folder of a run that was killed at step 8 while it wrote a row, and had saved its fifth step last."""
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


def test_rows_and_curves_go_on_without_doubles_and_gaps(broken_off: Path, tmp_path: Path) -> None:
    options = ("trainer.epochs=3", "logger=tensorboard", "scheduler=constant")
    resumed = Run(broken_off, *options)
    assert resumed.progress.step == 15
    whole = Run(tmp_path / "whole", *options)
    assert figures(resumed) == figures(whole)
    assert points(resumed) == points(whole)
    assert resumed.rows("step")[2]["train/loss"] == whole.rows("step")[2]["train/loss"]


def test_a_resume_amid_a_window_or_before_an_epoch_s_end_leaves_their_means_right(tmp_path: Path) -> None:
    # The first epoch's end, at step 5, is not saved: what is saved there is of before it.
    options = ("trainer.epochs=2", "checkpoint.every_steps=1", "checkpoint.every_epochs=2", "checkpoint.keep=99")
    whole = Run(tmp_path / "whole", *options)
    for step in (3, 5):
        run = Run(tmp_path / str(step), *options, f"resume={whole.checkpoint(step)}")
        # Saving ends a window, so that the next row is of the samples since then; an epoch's is of all.
        later = [row for row in figures(whole) if row["step"] > step or (row["kind"] == "epoch" and row["step"] == 5)]
        assert figures(run) == later


def test_beginning_anew_leaves_nothing_of_the_former_course(broken_off: Path, tmp_path: Path) -> None:
    options = ("trainer.epochs=1", "logger=tensorboard", "resume=never")
    run = Run(broken_off, *options)
    whole = Run(tmp_path / "whole", *options)
    assert figures(run) == figures(whole)
    assert points(run) == points(whole)


def test_a_run_that_has_ended_stays_as_it_is(parts: Run) -> None:
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
    assert "nothing is left to train" in said(parts.folder)


def test_a_longer_end_takes_the_place_of_the_former(tmp_path: Path) -> None:
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
    """Warnings about damaged checkpoints are looked for in the log files."""
    logger = logging.getLogger("distrain")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
