"""A later start of a run takes its folder; a folder that is removed is made anew, and another one is left alone."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.errors import TakenOver
from distrain.runtime.run_owner import FolderState, RunOwner, claim_path
from tests.faulty_disk import Call, FaultyDisk


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_the_later_start_owns_the_folder_for_good(run_dir: Path) -> None:
    earlier = RunOwner.take(run_dir)
    copy = RunOwner.from_json(earlier.to_json())
    assert earlier.may_write
    assert copy.may_write
    later = RunOwner.take(run_dir)
    for owner in (earlier, copy):
        assert owner.is_taken
        with pytest.raises(TakenOver, match=f"another start of this run has taken over {run_dir}: "):
            owner.check()
    assert later.may_write
    later.release()
    assert earlier.is_taken, "also after the later start has ended"
    earlier.release()
    with pytest.raises(TakenOver):
        earlier.write_kept("config.yaml", "of the earlier start")
    assert list(run_dir.iterdir()) == []


def test_the_claim_of_a_start_that_died_is_replaced(run_dir: Path) -> None:
    RunOwner.take(run_dir)
    assert RunOwner.take(run_dir).may_write


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "close", "replace", "read"])
@pytest.mark.parametrize("claimed_before", [False, True])
def test_a_claim_that_can_not_be_written_is_said_and_written_later(
    operation: str, claimed_before: bool, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if claimed_before:
        RunOwner.take(run_dir)

    def fails(_: int, call: Call) -> int:
        return errno.EIO if call.operation == operation and "checkpoints" in call.path else 0

    with FaultyDisk(run_dir, fails):
        owner = RunOwner.take(run_dir)
        assert owner.may_write
        owner.check()
    if operation not in ("read", "mkdir"):
        (message,) = caplog.messages
        assert message.startswith(f"{claim_path(run_dir)} can't be written (Input/output error)")
    owner.restore()
    assert owner.may_write
    RunOwner.take(run_dir)
    assert owner.is_taken


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_claim_that_can_not_be_read_for_a_moment_changes_nothing(code: int, run_dir: Path) -> None:
    owner = RunOwner.take(run_dir)
    with FaultyDisk(run_dir, lambda _, call: code if call.operation in ("open_to_read", "stat") else 0):
        assert owner.may_write
    assert owner.may_write


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("remove", [shutil.rmtree, empty, lambda folder: shutil.rmtree(folder / "checkpoints")])
def test_a_removed_folder_is_made_anew_with_its_files(remove: Callable[[Path], None], run_dir: Path) -> None:
    owner = RunOwner.take(run_dir)
    other_rank = RunOwner.from_json(owner.to_json())
    owner.write_kept("config.yaml", "content")
    remove(run_dir)
    assert owner.state() is other_rank.state() is FolderState.REMOVED
    assert not owner.is_complete()
    owner.restore()
    assert owner.is_complete()
    assert other_rank.may_write
    assert (run_dir / "config.yaml").read_text() == "content"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step_00000001"])
def test_another_folder_in_its_place_is_not_ours(name: str, run_dir: Path) -> None:
    owner = RunOwner.take(run_dir)
    run_dir.rename(run_dir.with_name("moved"))
    (run_dir / name).mkdir(parents=True)
    with pytest.raises(TakenOver, match=f"the run folder {run_dir} was removed, and another one is in its place"):
        owner.restore()


@pytest.mark.parametrize("name", ["logs/rank_0.log", "checkpoints/.step_00000001.tmp-1/model.safetensors"])
def test_what_a_start_writes_while_its_folder_is_removed_is_not_another_folder(name: str, run_dir: Path) -> None:
    owner = RunOwner.take(run_dir)
    owner.write_kept("config.yaml", "content")
    run_dir.rename(run_dir.with_name("moved"))
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).touch()
    assert not owner.may_write, "a checkpoint would be published in a folder that is not complete"
    owner.restore()
    assert owner.is_complete()


def test_a_rank_that_does_not_see_the_folder_may_write_its_own(run_dir: Path, tmp_path: Path) -> None:
    owner = RunOwner.take(run_dir)
    shutil.rmtree(run_dir)
    assert RunOwner.from_json(owner.to_json()).may_write
