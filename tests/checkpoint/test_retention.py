"""Which checkpoints stay; temporary folders of dead processes are removed, and nothing complete is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import retention as checkpoint_retention
from distrain.checkpoint import writer as checkpoint_writer
from distrain.files.contained_folder import ContainedFolder
from tests.checkpoint.helpers import progress, save_steps, state
from tests.harness import run_ranks


def checkpoint_names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_format.list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("keep", "best", "newest", "left"),
    [
        (1, None, 50, [50]),
        (2, None, 50, [40, 50]),
        (2, 20, 50, [20, 40, 50]),
        (2, 50, 50, [40, 50]),
        (2, 99, 50, [40, 50]),
        (5, 10, 50, [10, 20, 30, 40, 50]),
        (9, None, 50, [10, 20, 30, 40, 50]),
        # The run went back to an earlier checkpoint; a later start must not resume the ones after it.
        (1, None, 30, [30]),
        (2, 10, 40, [10, 30, 40]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: int, best: int | None, newest: int, left: list[int]
) -> None:
    for number in (10, 20, 30, 40, 50):
        (tmp_path / f"step_{number:08d}").mkdir()
    checkpoint_retention.prune(tmp_path, keep, best, newest)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{number:08d}" for number in left]


def test_checkpoint_that_cannot_be_removed_is_logged(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 10, 20)

    def read_only(folder: ContainedFolder, name: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder.path / name))

    monkeypatch.setattr(ContainedFolder, "remove_tree", read_only)
    checkpoint_retention.prune(tmp_path, 1, None, 20)
    assert len(warnings) == 1
    assert "can't remove an old checkpoint" in warnings[0]
    assert checkpoint_names(tmp_path) == ["step_00000020"]


def _save_and_be_killed(folder: Path, after: int) -> None:
    """Saves step 40 again, then 50, and removes 40; kills itself before call number ``after`` that changes the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "fdopen", "replace", "fsync", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for step in (40, 50):
        checkpoint_writer.save(folder, state(seed=step), progress(step))
    checkpoint_retention.prune(folder, 1, None, 50)


def _kill_at_every_moment(folder: Path) -> int:
    """Saves in one process after another, each killed one call later, until one finishes; returns the number killed."""
    for after in range(1000):
        shutil.copytree(folder / "original", folder / str(after))
        child = os.fork()
        if not child:
            try:
                _save_and_be_killed(folder / str(after), after)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return after
    return -1


def test_process_killed_at_any_moment_loses_no_checkpoint_and_leaves_no_invalid_one(tmp_path: Path) -> None:
    checkpoint_writer.save(tmp_path / "original", state(seed=39), progress(40))
    (killed,) = run_ranks(_kill_at_every_moment, 1, tmp_path)
    assert killed > 30
    seeds = []
    for after in range(killed):
        folder = tmp_path / str(after)
        assert all(checkpoint_reader.is_valid(path) for path in checkpoint_format.list_checkpoints(folder))
        checkpoint_retention.remove_leftovers(folder)
        assert not list(folder.glob(".*"))
        newest = checkpoint_reader.newest_valid(folder)
        assert newest is not None
        loaded, position = checkpoint_reader.load(newest)
        # Step 40 is the old checkpoint or the new one.
        (seed,) = [seed for seed in (39, 40, 50) if torch.equal(loaded["model"]["part"], state(seed)["model"]["part"])]
        assert position["step"] == max(seed, 40)
        seeds.append(seed)
    assert seeds == sorted(seeds)
    assert set(seeds) == {39, 40, 50}


def _dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["", ".replaced", ".removed"])
def test_only_abandoned_temporary_folders_are_removed(tmp_path: Path, kind: str) -> None:
    here = socket.gethostname()
    used = [f".step_00000001.{here}.{os.getppid()}{kind}", f".step_00000001.another.host.{_dead_process()}{kind}"]
    left = [f".step_00000001.{here}.{_dead_process()}{kind}", f".step_00000001.{here}.{os.getpid()}{kind}"]
    old = [f".step_00000002.another.host.7{kind}", f".step_00000002.{here}.{os.getppid()}{kind}"]
    others = [".step_x", ".notes", "step_00000003"]
    for name in (*used, *left, *old, *others):
        (tmp_path / name).mkdir()
    for name in old:
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    checkpoint_retention.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*used, *others}
    checkpoint_retention.remove_leftovers(tmp_path / "nowhere")


def test_replaced_checkpoint_is_restored_if_the_new_one_is_missing(saved: Path) -> None:
    saved.rename(saved.with_name(f".{saved.name}.{socket.gethostname()}.{_dead_process()}.replaced"))
    checkpoint_retention.remove_leftovers(saved.parent)
    assert list(saved.parent.iterdir()) == [saved]
    checkpoint_reader.load(saved)
