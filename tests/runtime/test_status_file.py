"""status.json is written by a thread that never disturbs the run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.health.activity import RankActivity
from distrain.health.judge import Heartbeat, ObservedRank
from distrain.health.members import Member
from distrain.health.process import Process
from distrain.health.run_status import RunStatus
from distrain.runtime import status_file
from distrain.runtime.run_owner import RunOwner
from distrain.runtime.status_file import StatusFile
from tests.harness import HANG_SECONDS


@pytest.fixture
def owner(tmp_path: Path) -> RunOwner:
    (tmp_path / "run").mkdir()
    return RunOwner.take(tmp_path / "run")


@pytest.fixture
def activity() -> RankActivity:
    return RankActivity()


@pytest.fixture
def status(owner: RunOwner, activity: RankActivity, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusFile]:
    monkeypatch.setattr(status_file, "_SHORTEST_INTERVAL", 0.01)
    made = StatusFile(owner, "host0", activity, None, (600.0, 300.0))
    yield made
    made.close()


def read(owner: RunOwner) -> RunStatus:
    return RunStatus.from_json(json.loads((owner.run_dir / "status.json").read_text()))


def wait_for_step(owner: RunOwner, step: int) -> RunStatus:
    deadline = time.monotonic() + HANG_SECONDS
    while not (owner.run_dir / "status.json").exists() or (found := read(owner)).step != step:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_it_follows_the_training_and_says_at_the_end_that_it_is_the_last(
    owner: RunOwner, activity: RankActivity, status: StatusFile
) -> None:
    status.begin_training(5, 60, 3, compiles=True)
    status.note_step({"train/loss": 0.5, "train/gradient_norm": math.nan})
    status.note_epoch({"epoch": 1.0, "epoch/val_loss": 0.6})
    activity.enter_epoch(0, 0, 8, (0, 1))
    activity.advance(20, 8)
    seen = wait_for_step(owner, 20)
    assert (seen.running, seen.first_step, seen.total_steps, seen.epoch, seen.epochs) == (True, 5, 60, 1, 3)
    assert seen.values == {"train/loss": 0.5, "train/gradient_norm": None}
    assert seen.epoch_values == {"epoch": 1.0, "epoch/val_loss": 0.6}
    assert seen.compiles
    assert seen.writer.is_visible
    assert seen.writer.process.is_alive
    (rank,) = seen.ranks
    assert (rank.host, rank.phase, rank.step, rank.has_left) == ("host0", "training", 20, False)
    assert seen.seconds_left is not None
    status.close()
    last = read(owner)
    assert not last.running
    assert last.number > seen.number
    status.close()
    assert read(owner) == last


def test_a_training_that_begins_while_the_file_is_written_has_lasted_no_time(status: StatusFile) -> None:
    now = time.monotonic()
    status.begin_training(5, 60, 3, compiles=False)
    seen = status.status(now, running=True)
    assert (seen.training_seconds, seen.first_step) == (0, 5)
    assert RunStatus.from_json(json.loads(json.dumps(seen.to_json()))) == seen


def test_every_rank_is_told_as_rank_0_knows_it(owner: RunOwner, activity: RankActivity) -> None:
    now = time.monotonic()
    seen = [
        (Member("a", Process(1, 1), is_local=True), ObservedRank(Heartbeat(3, 7, 20, "training"), now, now - 4)),
        (Member("b", Process(2, 1), is_local=False), ObservedRank(Heartbeat(3, None, 18, "serving"), now - 2, now)),
        (Member("b", Process(3, 1), is_local=False), ObservedRank(Heartbeat(3, 7, 9, leaving=True), now, now)),
        (Member("b", Process(4, 1), is_local=True), ObservedRank(Heartbeat(3, 7, 9), now, now, exited=True)),
    ]
    made = StatusFile(owner, "a", activity, lambda: seen, (600.0, 300.0))
    made.close()
    before = made.status(now, running=True)
    seen[0][1].update(Heartbeat(4, 8, 30, "training"), now + 2)
    after = made.status(now + 2, running=True)
    assert [rank.host for rank in after.ranks] == ["a", "b", "b", "b"]
    assert [rank.phase for rank in after.ranks[:2]] == ["training", "serving"]
    assert [rank.has_left for rank in after.ranks] == [False, False, True, True]
    assert before.ranks[0].idle_seconds == pytest.approx(4)
    assert after.ranks[0].idle_seconds == 0
    assert after.ranks[1].silent_seconds == pytest.approx(4)
    assert after.ranks[0].steps_per_second > 0
    assert after.ranks[1].steps_per_second == 0
    assert (before.step, after.step) == (20, 30)
    assert after.phase == "training"


def test_nothing_is_written_into_a_folder_that_another_start_has_taken(
    owner: RunOwner, activity: RankActivity, status: StatusFile
) -> None:
    wait_for_step(owner, 0)
    RunOwner.take(owner.run_dir)
    status.close()
    assert read(owner).running


def test_an_error_is_logged_once_and_ends_nothing(
    owner: RunOwner, activity: RankActivity, status: StatusFile, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_step(owner, 0)
    status.close()
    (owner.run_dir / "status.json").unlink()
    (owner.run_dir / "status.json").symlink_to("elsewhere")
    again = StatusFile(owner, "host0", activity, None, (600.0, 300.0))
    deadline = time.monotonic() + HANG_SECONDS
    while again._number < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("status.json can't be written: ")
    assert "is a link to 'elsewhere'" in record.getMessage()
    assert record.file_only  # type: ignore[attr-defined]
    assert not (owner.run_dir / "elsewhere").exists()
