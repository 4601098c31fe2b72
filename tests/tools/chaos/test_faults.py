"""What a run's log must say after a fault."""

from __future__ import annotations

from pathlib import Path

from distrain.tools.chaos.faults import loaded_from, wrong_resume

OLD, NEW = Path("run/checkpoints/step_00000010"), Path("run/checkpoints/step_00000020")
WENT_ON = "12:00 INFO distrain.training.resume: resumed from /a: b/run/checkpoints/step_000000{}: step {}, epoch 0\n"
LEFT_OUT = (
    "12:00 WARNING distrain.checkpoint.reader: "
    "checkpoint left out: run/checkpoints/step_00000020/state.json is missing\n"
)


def test_the_checkpoint_is_read_off_the_log() -> None:
    assert loaded_from(WENT_ON.format(10, 10)) == "step_00000010"
    assert loaded_from("12:00 INFO distrain.cli.app: run folder: run\n") is None


def test_newest_whole_checkpoint_is_right() -> None:
    assert wrong_resume(WENT_ON.format(20, 20), NEW, []) == []
    assert wrong_resume("", None, []) == []


def test_older_one_or_none_is_wrong_without_damage() -> None:
    assert wrong_resume(WENT_ON.format(10, 10), NEW, []) == ["went on from step_00000010, not from step_00000020"]
    assert wrong_resume("", NEW, []) == ["went on from the beginning, not from step_00000020"]


def test_damaged_one_must_be_left_out_and_named() -> None:
    assert wrong_resume(LEFT_OUT + WENT_ON.format(10, 10), OLD, [NEW]) == []
    assert wrong_resume(WENT_ON.format(10, 10), OLD, [NEW]) == ["the log doesn't say that step_00000020 was left out"]
    assert wrong_resume(WENT_ON.format(20, 20), OLD, [NEW])[0] == "loaded step_00000020, which was damaged"
    assert wrong_resume(LEFT_OUT, None, [NEW]) == []


def test_damaged_one_that_is_older_needs_no_word() -> None:
    assert wrong_resume(WENT_ON.format(20, 20), NEW, [OLD]) == []
