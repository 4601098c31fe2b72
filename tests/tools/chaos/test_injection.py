"""A run's log must name the checkpoint it resumed from, and the damaged ones it left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.tools.chaos.attempt import Attempt
from distrain.tools.chaos.damage import CheckpointTracker
from distrain.tools.chaos.injection import FaultMissed, Target, check_resume, inject, resumed_checkpoint
from distrain.tools.chaos.plan import Fault

OLD, NEW = Path("run/checkpoints/step_00000010"), Path("run/checkpoints/step_00000020")
RESUMED = "12:00 INFO distrain.training.resume: resumed from /a: b/run/checkpoints/step_000000{}: step {}, epoch 0\n"
LEFT_OUT = (
    "12:00 WARNING distrain.checkpoint.reader: "
    "checkpoint left out: run/checkpoints/step_00000020/state.json is missing\n"
)


def test_resumed_checkpoint_is_read_from_the_log() -> None:
    assert resumed_checkpoint(RESUMED.format(10, 10)) == "step_00000010"
    assert resumed_checkpoint("12:00 INFO distrain.cli.app: run folder: run\n") is None


def test_newest_intact_checkpoint_is_accepted() -> None:
    assert check_resume(RESUMED.format(20, 20), NEW, []) == []
    assert check_resume("", None, []) == []


def test_older_checkpoint_or_none_is_a_problem_without_damage() -> None:
    assert check_resume(RESUMED.format(10, 10), NEW, []) == ["began with step_00000010, not with step_00000020"]
    assert check_resume("", NEW, []) == ["began with step 0, not with step_00000020"]


def test_damaged_checkpoint_must_be_left_out_and_named() -> None:
    assert check_resume(LEFT_OUT + RESUMED.format(10, 10), OLD, [NEW]) == []
    assert check_resume(RESUMED.format(10, 10), OLD, [NEW]) == ["the log does not say that step_00000020 was left out"]
    assert check_resume(RESUMED.format(20, 20), OLD, [NEW])[0] == "resumed from step_00000020, which was damaged"
    assert check_resume(LEFT_OUT, None, [NEW]) == []


def test_older_damaged_checkpoint_need_not_be_named() -> None:
    assert check_resume(RESUMED.format(20, 20), NEW, [OLD]) == []


class HangingAttempt(Attempt):
    """A job that neither saves nor ends."""

    def __init__(self) -> None:
        pass

    def has_ended(self) -> bool:
        return False


def test_a_job_that_never_saves_is_not_awaited_for_ever(tmp_path: Path) -> None:
    target = Target(HangingAttempt(), CheckpointTracker(tmp_path / "checkpoints"), patience_seconds=0.05)
    with pytest.raises(FaultMissed, match=r"^the run began no save within 0\.05 s$"):
        inject(target, Fault("kill_saving", 0, 0.0, 0, (0.0, 0.0, 0.0)))
