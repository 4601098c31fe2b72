"""Saving while training goes on: the same files as when it waits, one save at a time, and no error that is not told."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.safetensors_writer import FileDigest
from distrain.communication.collectives import Communicator
from distrain.errors import Failed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import checkpointing
from distrain.training import saver as saving
from distrain.training.callbacks import Callback
from distrain.training.saver import Saver
from tests import runs
from tests.checkpoint.helpers import state as whole_state
from tests.checkpoint.helpers import state_of_rank
from tests.harness import run_ranks
from tests.training.test_trainer import Run, same

HERE = socket.gethostname()


def progress(step: int, best: int | None = None) -> dict[str, Any]:
    return {"step": step, "best_step": best}


def saver(folder: Path, *, background: bool = True, keep: int = 9) -> Saver:
    return Saver(folder, keep, background=background)


def lost(of: Saver) -> int | None:
    of.wait()
    return of.lost


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Lines(), logging.getLogger("distrain")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


class Gate:
    """Keeps saves from going on until it is opened; counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.came = threading.Event(), threading.Event()
        self.entered = 0
        save = checkpoint_writer.save

        def slow(*args: Any, **kwargs: Any) -> Path:
            self.entered += 1
            self.came.set()
            assert self.opened.wait(30)
            return save(*args, **kwargs)

        monkeypatch.setattr(checkpoint_writer, "save", slow)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def full_disk(monkeypatch: pytest.MonkeyPatch, times: int = 10**6) -> None:
    """The next files can't be written."""
    write, left = safetensors_writer.write, [times]

    def fail(path: Path, content: Any) -> FileDigest:
        left[0] -= 1
        if left[0] < 0:
            return write(path, content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(safetensors_writer, "write", fail)


# --- in the background ----------------------------------------------------------------------------------------------


def test_the_files_are_those_of_a_save_that_training_waits_for(tmp_path: Path, gate: Gate) -> None:
    given = whole_state()
    behind = saver(tmp_path / "behind")
    behind.save(given, progress(1))
    assert gate.came.wait(30)
    # Training goes on meanwhile.
    for part in ("model", "optimizer", "compressor", "local"):
        for tensor in given[part].values():
            tensor.detach().zero_()
    gate.opened.set()
    behind.wait()
    saver(tmp_path / "before", background=False).save(whole_state(), progress(1))
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / where / "step_00000001").iterdir()}
        for where in ("behind", "before")
    )
    assert one == other
    assert len(one) == 5


def test_the_same_memory_serves_every_copy(tmp_path: Path) -> None:
    staging = saving._Staging()
    given = whole_state()
    first = staging.copy(given)
    places = {name: tensor.data_ptr() for name, tensor in first["model"].items()}
    given["model"]["double"] = torch.full((3,), 9.0, dtype=torch.float64)
    given["model"]["half"] = torch.zeros(4)
    second = staging.copy(given)
    for name, tensor in second["model"].items():
        assert torch.equal(tensor, given["model"][name]), name
        if name not in ("half", "empty"):
            assert tensor.data_ptr() == places[name], name
    # A strided copy takes longer, so the layout is kept; the file has the usual one.
    assert second["model"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    assert not any(tensor.requires_grad for tensor in second["model"].values())
    del given["model"]["part"]
    assert "part" not in staging.copy(given)["model"]


def test_memory_for_the_first_copy_is_made_ready_after_the_first_step(tmp_path: Path) -> None:
    trained = whole_state()["model"]
    behind = Saver(tmp_path, 1, background=True, expected=lambda: list(trained.values()))
    behind.poll()
    assert behind._staging is not None
    assert behind._staging._prepared is not None
    behind._staging._prepared.result(timeout=30)
    ready = {place.data_ptr() for places in behind._staging._spare.values() for place in places}
    behind.save(whole_state(), progress(1))
    used = {name: place.data_ptr() for name, (place, _) in behind._staging._places.items()}
    assert {used[f"model/{name}"] for name in trained} == ready
    assert not behind._staging._spare
    behind.poll()
    behind.wait()
    assert checkpoint_reader.load_model(tmp_path / "step_00000001").keys() == trained.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_as_they_were_when_they_were_saved(tmp_path: Path) -> None:
    given = whole_state()
    given["model"] = {"large": torch.rand(1 << 22, device="cuda")}
    expected = given["model"]["large"].cpu()
    behind = saver(tmp_path)
    behind.save(given, progress(1))
    given["model"]["large"].zero_()
    behind.wait()
    assert torch.equal(checkpoint_reader.load(tmp_path / "step_00000001")[0]["model"]["large"], expected)


def test_one_save_is_under_way_at_a_time_and_the_next_one_waits(tmp_path: Path, gate: Gate) -> None:
    behind = saver(tmp_path)
    behind.save(whole_state(), progress(1))
    behind.poll()
    second = threading.Thread(target=behind.save, args=(whole_state(), progress(2)))
    second.start()
    time.sleep(0.1)
    assert (gate.entered, second.is_alive()) == (1, True)
    assert checkpoint_format.list_checkpoints(tmp_path) == []
    gate.opened.set()
    second.join(30)
    behind.wait()
    assert gate.entered == 2
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    behind = saver(tmp_path, keep=2)
    for step in range(1, 7):
        behind.save(whole_state(), progress(step, best=min(step, 2)))
    behind.wait()
    assert [int(path.name[5:]) for path in checkpoint_format.list_checkpoints(tmp_path)] == [2, 5, 6]


def test_what_saving_cost_is_reported(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    behind = saver(tmp_path)
    assert behind.report() == {"saves": 0, "failed": 0, "stall_ms": {"max": 0, "mean": 0}, "write_seconds": 0}
    behind.save(whole_state(), progress(1), began=time.perf_counter() - 0.5)
    time.sleep(0.2)
    gate.opened.set()
    behind.save(whole_state(), progress(2))
    behind.wait()
    found = behind.report()
    assert (found["saves"], found["failed"]) == (2, 0)
    assert 500 <= found["stall_ms"]["max"] < 10_000
    assert found["stall_ms"]["mean"] < found["stall_ms"]["max"]
    assert 0.1 <= found["write_seconds"] < 10
    full_disk(monkeypatch)
    behind.save(whole_state(), progress(3))
    behind.wait()
    assert (behind.report()["saves"], behind.report()["failed"]) == (3, 1)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_said_and_the_next_save_is_tried(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    any_ = saver(tmp_path, background=background, keep=1)
    any_.save(whole_state(), progress(1))
    assert lost(any_) is None
    full_disk(monkeypatch, times=1)
    any_.save(whole_state(), progress(2, best=2))
    assert lost(any_) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    (line,) = said
    begins = f"ERROR CHECKPOINT NOT SAVED at step 2: rank 0 on {HERE}: {tmp_path}/.step_00000002."
    assert line.startswith(begins)
    assert "/model.safetensors: No space left on device (ENOSPC). The run goes on; older checkpoints stay" in line
    any_.save(whole_state(), progress(3))
    assert lost(any_) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_another_error_is_raised_at_the_next_step(tmp_path: Path) -> None:
    behind = saver(tmp_path)
    behind.save({**whole_state(), "local": {"phase": torch.zeros(1, dtype=torch.complex64)}}, progress(1))
    assert behind._under_way is not None
    behind.close()
    for step in (behind.poll, behind.wait):
        with pytest.raises(TypeError, match="local/phase is of"):
            step()


def test_a_run_that_ends_in_an_error_waits_for_a_save_but_not_for_ever(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_PATIENCE_SECONDS", 0.2)
    behind = saver(tmp_path)
    behind.save(whole_state(), progress(1))
    start = time.monotonic()
    behind.close()
    assert 0.2 <= time.monotonic() - start < 5
    monkeypatch.setattr(saving, "_PATIENCE_SECONDS", 30)
    threading.Timer(0.2, gate.opened.set).start()
    behind.close()
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path: Path, said: list[str]) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        behind = saver(tmp_path)
        behind.save(whole_state(), progress(1))
        large = {**whole_state(), "model": {"large": torch.ones(1 << 19)}}
        behind.save(large, progress(2))
        assert lost(behind) == 2
        assert "No space left on device (ENOSPC)" in said[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        behind.save(whole_state(), progress(3))
        behind.wait()
        assert checkpoint_reader.newest_valid(tmp_path) == tmp_path / "step_00000003"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _save_while_talking(folder: Path) -> tuple[list[int | None], float]:
    """Saves in the background, once with a full disk on rank 1, while the training's group is in use."""
    rank, found = int(os.environ["RANK"]), []
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        training = runtime.communicator()
        group = Communicator(torch.distributed.new_group(backend="gloo"))
        behind = Saver(runtime.run_dir / "checkpoints", 9, group, background=True)
        total = torch.zeros(())
        for step in range(1, 5):
            with pytest.MonkeyPatch.context() as patched:
                if (step, rank) == (2, 1):
                    full_disk(patched)
                behind.save(state_of_rank(rank, 2, split=True), progress(step))
                for _ in range(20):
                    total += training.all_reduce(torch.ones(()))
                    behind.poll()
                found.append(lost(behind))
    return found, float(total)


def test_two_ranks_save_while_they_train_and_agree_on_what_failed(tmp_path: Path) -> None:
    for failed, total in run_ranks(_save_while_talking, 2, tmp_path):
        assert (failed, total) == ([None, 2, None, None], 4 * 20 * 2)
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step_00000001", "step_00000003", "step_00000004"]
    for path in left:
        checkpoint_reader.load(path)
    (line,) = [line for line in (tmp_path / "logs" / "rank_0.log").read_text().splitlines() if "ERROR" in line]
    assert f"rank 1 on {HERE}: " in line
    assert "model_00001.safetensors: No space left on device (ENOSPC)" in line


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_and_without_the_background(tmp_path: Path) -> None:
    options = ("trainer.epochs=2", "checkpoint.every_steps=2", "checkpoint.keep=99")
    behind, before = (
        Run(tmp_path / name, *options, f"checkpoint.background={value}")
        for name, value in (("behind", "true"), ("before", "false"))
    )
    assert same(behind.model, before.model)
    assert behind.checkpoints == before.checkpoints == [2, 4, 5, 6, 8, 10]
    for step in behind.checkpoints:
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (behind.checkpoint(step) / name).read_bytes() == (before.checkpoint(step) / name).read_bytes()
    for run in (behind, before):
        found = json.loads((run.folder / "summary.json").read_text())["checkpoint"]
        assert (found["saves"], found["failed"]) == (6, 0)
        assert 0 < found["stall_ms"]["mean"] <= found["stall_ms"]["max"]
        assert found["write_seconds"] > 0


class FullDisk(Callback):
    """The disk is full from one step until before another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
        self._patch, self._first, self._last = monkeypatch, first, last

    def on_step_end(self, trainer: Any) -> None:
        trainer.checkpointing.saver.wait()
        if trainer.progress.step == self._first:
            full_disk(self._patch)
        if trainer.progress.step == self._last:
            self._patch.undo()


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_outlives_a_full_disk_and_believes_in_no_best_checkpoint_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    options = (
        "trainer.epochs=3",
        "checkpoint.every_steps=4",
        "checkpoint.keep=9",
        f"checkpoint.background={background}",
    )
    accuracies = iter([0.2, 0.8, 0.4])

    class Chosen(FullDisk):
        def on_fit_start(self, trainer: Any) -> None:
            evaluate = trainer.evaluate

            def told(split: str, *watch: Any) -> Any:
                found = evaluate(split, *watch)
                if split == "val":
                    object.__setattr__(found, "metrics", {**found.metrics, "accuracy": next(accuracies)})
                return found

            trainer.__dict__["evaluate"] = told

    # The second epoch ends at step 10 with the best accuracy, which can't be saved.
    run = Run(tmp_path, *options, callback=Chosen(monkeypatch, 9, 11))
    assert run.checkpoints == [4, 5, 8, 12, 15]
    assert [checkpoint_reader.load(run.checkpoint(step))[1]["best_step"] for step in run.checkpoints] == [
        None,
        5,
        5,
        5,
        15,
    ]
    assert run.trainer.progress.best_score == pytest.approx(0.4)
    assert run.summary["checkpoint"]["failed"] == 1
    assert run.summary["steps"] == 15


def test_the_end_of_a_run_tries_again_what_could_not_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "once", "trainer.epochs=1", callback=FullDiskAtEpochEnd(monkeypatch, times=1))
    assert run.checkpoints == [5]
    assert run.summary["checkpoint"]["failed"] == 1


def test_a_run_whose_last_step_can_not_be_saved_has_not_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_LAST_SAVES", (0, 0.01))
    with pytest.raises(Failed):
        Run(tmp_path, "trainer.epochs=1", callback=FullDiskAtEpochEnd(monkeypatch, times=99))
    assert checkpoint_format.list_checkpoints(tmp_path / "checkpoints") == []
    assert not (tmp_path / "summary.json").exists()
    assert "step 5, the last one, could not be saved" in (tmp_path / "failure.json").read_text()


class FullDiskAtEpochEnd(Callback):
    """So many files can't be written after the last step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self._patch, self._times = monkeypatch, times

    def on_step_end(self, trainer: Any) -> None:
        if trainer.progress.step == 5:
            full_disk(self._patch, self._times)


def test_a_failure_lets_a_save_that_is_under_way_become_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    class Fails(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.progress.step == 3:
                assert gate.came.wait(30)
                threading.Timer(0.2, gate.opened.set).start()
                raise RuntimeError("out of luck")

    with pytest.raises(Failed):
        Run(tmp_path, "checkpoint.every_steps=2", callback=Fails())
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]


def test_a_new_run_clears_away_what_a_dead_one_left(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / f".step_00000003.{HERE}.{os.getpid()}"
    half.mkdir(parents=True)
    run = Run(tmp_path, "trainer.max_steps=2")
    assert run.checkpoints == [2]
    assert not half.exists()


# --- split among ranks ----------------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[str, Tensor]:
    return checkpoint_reader.load_model(path)


def test_stages_save_their_own_files_and_any_strategy_reads_them(tmp_path: Path) -> None:
    # Adam, which keeps the most; a constant rate, since a schedule would end with each part.
    cnn = ("model=cifar_cnn", "data.height=32", "data.width=32", "optimizer.eps=1e-3")
    common = (*cnn, "scheduler=constant", "trainer.precision=fp64", "trainer.epochs=100")
    pipeline = ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")

    def go(name: str, ranks: int, steps: int, *more: str) -> dict[str, Any]:
        configuration = runs.small(*common, f"trainer.max_steps={steps}", f"run_dir={tmp_path / name}", *more)
        found: dict[str, Any] = run_ranks(runs.train_on_rank, ranks, configuration)[0]
        return found

    expected = go("whole", 1, 6)
    # Two replicas of two stages: one of them saves.
    go("split", 4, 3, *pipeline)
    saved = tmp_path / "split" / "checkpoints" / "step_00000003"
    files = {f"{part}_{rank:05d}.safetensors" for part in ("model", "optimizer") for rank in (0, 1)}
    assert {path.name for path in saved.iterdir()} == {*files, "state.json", "manifest.json"}
    assert _tensors(saved).keys() == expected["model"].keys()
    others = {"single": (1,), "ddp": (3, "strategy=ddp"), "more stages": (3, *pipeline, "strategy.stages=3")}
    for name, (ranks, *strategy) in others.items():
        shutil.copytree(tmp_path / "split" / "checkpoints", tmp_path / name / "checkpoints")
        found = go(name, int(ranks), 6, *map(str, strategy))
        assert found["summary"]["steps"] == 6
        assert runs.relative_difference(found["model"], expected["model"]) <= 1e-12, name
