"""Background saves write the same files as blocking ones, run one at a time, and report every error."""

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.safetensors_writer import FileDigest
from distrain.communication.collectives import Communicator
from distrain.errors import Failed
from distrain.files.contained_folder import ContainedFolder
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import checkpointing
from distrain.training import saver as saving
from distrain.training.callbacks import Callback
from distrain.training.saver import Saver
from tests import runs
from tests.checkpoint.helpers import state as whole_state
from tests.checkpoint.helpers import state_of_rank
from tests.harness import HANG_SECONDS, run_ranks
from tests.training.test_trainer import Run, same

HERE = socket.gethostname()


def progress(step: int, best: int | None = None) -> dict[str, Any]:
    return asdict(Progress(step=step, samples=step, best_step=best))


def make_saver(folder: Path, *, background: bool = True, keep: int = 9) -> Saver:
    return Saver(folder, keep, background=background)


def failed_step(saver: Saver) -> int | None:
    saver.wait()
    return saver.failed_step


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    handler, logger = Lines(), logging.getLogger("distrain")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


class Gate:
    """Blocks saves until it is opened, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.entered = 0
        save = checkpoint_writer.save

        def slow(*args: Any, **kwargs: Any) -> Path:
            self.entered += 1
            self.reached.set()
            assert self.opened.wait(HANG_SECONDS)
            return save(*args, **kwargs)

        monkeypatch.setattr(checkpoint_writer, "save", slow)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def full_disk(monkeypatch: pytest.MonkeyPatch, times: int = 10**6) -> None:
    """Makes the next writes of files fail with a full disk."""
    write, left = safetensors_writer.write, [times]

    def fail(folder: ContainedFolder, name: str, content: Any) -> FileDigest:
        left[0] -= 1
        if left[0] < 0:
            return write(folder, name, content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path / name))

    monkeypatch.setattr(safetensors_writer, "write", fail)


# --- in the background -----------------------------------------------------------------------------------------------


def test_a_background_save_writes_the_same_files_as_a_blocking_one(tmp_path: Path, gate: Gate) -> None:
    given = whole_state()
    saver = make_saver(tmp_path / "background")
    saver.save(given, progress(1))
    assert gate.reached.wait(HANG_SECONDS)
    # Training continues in the meantime.
    for part in ("model", "optimizer", "compressor", "local"):
        for tensor in given[part].values():
            tensor.detach().zero_()
    gate.opened.set()
    saver.wait()
    make_saver(tmp_path / "blocking", background=False).save(whole_state(), progress(1))
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / where / "step_00000001").iterdir()}
        for where in ("background", "blocking")
    )
    assert one == other
    assert len(one) == 5


def test_every_copy_reuses_the_same_memory(tmp_path: Path) -> None:
    staging = saving._Staging()
    given = whole_state()
    first = staging.copy(given)
    addresses = {name: tensor.data_ptr() for name, tensor in first["model"].items()}
    given["model"]["double"] = torch.full((3,), 9.0, dtype=torch.float64)
    given["model"]["half"] = torch.zeros(4)
    second = staging.copy(given)
    for name, tensor in second["model"].items():
        assert torch.equal(tensor, given["model"][name]), name
        if name not in ("half", "empty"):
            assert tensor.data_ptr() == addresses[name], name
    # A copy to another layout is slower, so the copy keeps the tensor's strides; the file is contiguous.
    assert second["model"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    assert not any(tensor.requires_grad for tensor in second["model"].values())
    del given["model"]["part"]
    assert "part" not in staging.copy(given)["model"]


def test_memory_for_the_first_copy_is_allocated_after_the_first_step(tmp_path: Path) -> None:
    trained = whole_state()["model"]
    saver = Saver(tmp_path, 1, background=True, expected_tensors=lambda: list(trained.values()))
    saver.poll()
    assert saver._staging is not None
    assert saver._staging._preparation is not None
    saver._staging._preparation.result(timeout=HANG_SECONDS)
    ready = {buffer.data_ptr() for buffers in saver._staging._prepared_buffers.values() for buffer in buffers}
    saver.save(whole_state(), progress(1))
    used = {name: buffer.data_ptr() for name, (buffer, _) in saver._staging._buffers.items()}
    assert {used[f"model/{name}"] for name in trained} == ready
    assert not saver._staging._prepared_buffers
    saver.poll()
    saver.wait()
    assert checkpoint_reader.load_model(tmp_path / "step_00000001").keys() == trained.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_saved_as_they_were_when_the_save_began(tmp_path: Path) -> None:
    given = whole_state()
    given["model"] = {"large": torch.rand(1 << 22, device="cuda")}
    expected = given["model"]["large"].cpu()
    saver = make_saver(tmp_path)
    saver.save(given, progress(1))
    given["model"]["large"].zero_()
    saver.wait()
    assert torch.equal(checkpoint_reader.load(tmp_path / "step_00000001")[0]["model"]["large"], expected)


def test_a_save_waits_until_the_one_before_is_complete(tmp_path: Path, gate: Gate) -> None:
    saver = make_saver(tmp_path)
    saver.save(whole_state(), progress(1))
    saver.poll()
    second = threading.Thread(target=saver.save, args=(whole_state(), progress(2)))
    second.start()
    assert gate.reached.wait(HANG_SECONDS)
    time.sleep(0.1)
    assert (gate.entered, second.is_alive()) == (1, True)
    assert checkpoint_format.list_checkpoints(tmp_path) == []
    gate.opened.set()
    second.join(HANG_SECONDS)
    saver.wait()
    assert gate.entered == 2
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    saver = make_saver(tmp_path, keep=2)
    for step in range(1, 7):
        saver.save(whole_state(), progress(step, best=min(step, 2)))
    saver.wait()
    assert [int(path.name[5:]) for path in checkpoint_format.list_checkpoints(tmp_path)] == [2, 5, 6]


def test_the_cost_of_saving_is_reported(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make_saver(tmp_path)
    assert saver.report() == {"saves": 0, "failed": 0, "stall_ms": {"max": 0, "mean": 0}, "write_seconds": 0}
    saver.save(whole_state(), progress(1), start=time.perf_counter() - 0.5)
    assert gate.reached.wait(HANG_SECONDS)
    time.sleep(0.2)
    gate.opened.set()
    saver.save(whole_state(), progress(2))
    saver.wait()
    found = saver.report()
    assert (found["saves"], found["failed"]) == (2, 0)
    assert 500 <= found["stall_ms"]["max"] < 100_000
    assert found["stall_ms"]["mean"] < found["stall_ms"]["max"]
    assert 0.1 <= found["write_seconds"] < 100
    full_disk(monkeypatch)
    saver.save(whole_state(), progress(3))
    saver.wait()
    assert (saver.report()["saves"], saver.report()["failed"]) == (3, 1)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_logged_and_the_next_save_is_tried(
    tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    saver = make_saver(tmp_path, background=background, keep=1)
    saver.save(whole_state(), progress(1))
    assert failed_step(saver) is None
    full_disk(monkeypatch, times=1)
    saver.save(whole_state(), progress(2, best=2))
    assert failed_step(saver) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    (line,) = log_lines
    begins = f"ERROR CHECKPOINT NOT SAVED at step 2: rank 0 on {HERE}: {tmp_path}/.step_00000002."
    assert line.startswith(begins)
    assert "/model.safetensors: No space left on device (ENOSPC). The run goes on; older checkpoints stay" in line
    saver.save(whole_state(), progress(3))
    assert failed_step(saver) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_saverother_error_is_raised_at_the_next_step(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    saver.save({**whole_state(), "local": {"phase": torch.zeros(1, dtype=torch.complex64)}}, progress(1))
    assert saver._pending is not None
    saver.close()
    for step in (saver.poll, saver.wait):
        with pytest.raises(TypeError, match="local/phase is a tensor of"):
            step()


def test_a_failed_run_waits_for_a_save_up_to_a_time_limit(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_CLOSE_TIMEOUT_SECONDS", 0.2)
    saver = make_saver(tmp_path)
    saver.save(whole_state(), progress(1))
    start = time.monotonic()
    saver.close()
    assert 0.2 <= time.monotonic() - start < HANG_SECONDS
    monkeypatch.setattr(saving, "_CLOSE_TIMEOUT_SECONDS", HANG_SECONDS)
    threading.Timer(0.2, gate.opened.set).start()
    saver.close()
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_file_system_without_space_is_reported(tmp_path: Path, log_lines: list[str]) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        saver = make_saver(tmp_path)
        saver.save(whole_state(), progress(1))
        large = {**whole_state(), "model": {"large": torch.ones(1 << 19)}}
        saver.save(large, progress(2))
        assert failed_step(saver) == 2
        assert "No space left on device (ENOSPC)" in log_lines[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        saver.save(whole_state(), progress(3))
        saver.wait()
        assert checkpoint_reader.newest_valid(tmp_path) == tmp_path / "step_00000003"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _save_while_communicating(folder: Path) -> tuple[list[int | None], float]:
    """Saves in the background, once with a full disk on rank 1, while the training's group is in use."""
    rank, found = int(os.environ["RANK"]), []
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        training = runtime.communicator()
        group = Communicator(torch.distributed.new_group(backend="gloo"))
        saver = Saver(runtime.run_dir / "checkpoints", 9, group, background=True)
        total = torch.zeros(())
        for step in range(1, 5):
            with pytest.MonkeyPatch.context() as patched:
                if (step, rank) == (2, 1):
                    full_disk(patched)
                saver.save(state_of_rank(rank, 2, split=True), progress(step))
                for _ in range(20):
                    total += training.all_reduce(torch.ones(()))
                    saver.poll()
                found.append(failed_step(saver))
    return found, float(total)


def test_two_ranks_save_while_they_train_and_agree_on_failures(tmp_path: Path) -> None:
    for failed, total in run_ranks(_save_while_communicating, 2, tmp_path):
        assert (failed, total) == ([None, 2, None, None], 4 * 20 * 2)
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step_00000001", "step_00000003", "step_00000004"]
    for path in left:
        checkpoint_reader.load(path)
    (line,) = [line for line in (tmp_path / "logs" / "rank_0.log").read_text().splitlines() if "ERROR" in line]
    assert f"rank 1 on {HERE}: " in line
    assert "model_00001.safetensors: No space left on device (ENOSPC)" in line


# --- in a run --------------------------------------------------------------------------------------------------------


def test_background_saves_do_not_change_a_run(tmp_path: Path) -> None:
    options = ("trainer.epochs=2", "checkpoint.every_steps=2", "checkpoint.keep=99")
    background, blocking = (
        Run(tmp_path / name, *options, f"checkpoint.background={value}")
        for name, value in (("background", "true"), ("blocking", "false"))
    )
    assert same(background.model, blocking.model)
    assert background.checkpoints == blocking.checkpoints == [2, 4, 5, 6, 8, 10]
    for step in background.checkpoints:
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (background.checkpoint(step) / name).read_bytes() == (blocking.checkpoint(step) / name).read_bytes()
    for run in (background, blocking):
        found = json.loads((run.folder / "summary.json").read_text())["checkpoint"]
        assert (found["saves"], found["failed"]) == (6, 0)
        assert 0 < found["stall_ms"]["mean"] <= found["stall_ms"]["max"]
        assert found["write_seconds"] > 0


class FullDisk(Callback):
    """The disk is full from one step up to another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
        self._patch, self._first, self._last = monkeypatch, first, last

    def on_step_end(self, trainer: Any) -> None:
        trainer.checkpointing.saver.wait()
        if trainer.progress.step == self._first:
            full_disk(self._patch)
        if trainer.progress.step == self._last:
            self._patch.undo()


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_survives_a_full_disk_and_names_only_a_saved_checkpoint_as_the_best(
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


def test_the_end_of_a_run_retries_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "once", "trainer.epochs=1", callback=FullDiskAtEpochEnd(monkeypatch, times=1))
    assert run.checkpoints == [5]
    assert run.summary["checkpoint"]["failed"] == 1


def test_a_run_whose_last_step_can_not_be_saved_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_LAST_SAVES", (0, 0.01))
    with pytest.raises(Failed):
        Run(tmp_path, "trainer.epochs=1", callback=FullDiskAtEpochEnd(monkeypatch, times=99))
    assert checkpoint_format.list_checkpoints(tmp_path / "checkpoints") == []
    assert not (tmp_path / "summary.json").exists()
    assert "step 5, the last one, could not be saved" in (tmp_path / "failure.json").read_text()


class FullDiskAtEpochEnd(Callback):
    """Writes of this many files fail after the last step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self._patch, self._times = monkeypatch, times

    def on_step_end(self, trainer: Any) -> None:
        if trainer.progress.step == 5:
            full_disk(self._patch, self._times)


def test_a_save_in_progress_completes_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    class Fails(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.progress.step == 3:
                assert gate.reached.wait(HANG_SECONDS)
                threading.Timer(0.2, gate.opened.set).start()
                raise RuntimeError("out of luck")

    with pytest.raises(Failed):
        Run(tmp_path, "checkpoint.every_steps=2", callback=Fails())
    assert [path.name for path in checkpoint_format.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]


def test_a_new_run_removes_the_temporary_files_of_a_dead_one(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / f".step_00000003.{HERE}.{os.getpid()}"
    half.mkdir(parents=True)
    run = Run(tmp_path, "trainer.max_steps=2")
    assert run.checkpoints == [2]
    assert not half.exists()


# --- split among ranks -----------------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[str, Tensor]:
    return dict(checkpoint_reader.load_model(path))


def test_pipeline_stages_save_their_own_files_and_saverstrategy_reads_them(tmp_path: Path) -> None:
    # Adam, which has the most state; a constant learning rate, since a schedule would end with each part.
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
