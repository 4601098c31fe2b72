"""What a rank records about its own work."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from distrain.health.activity import RankActivity, in_phase


@dataclass
class _Runtime:
    activity: RankActivity = field(default_factory=RankActivity)


class _Trainer:
    def __init__(self) -> None:
        self.runtime = _Runtime()
        self.phases: list[str] = []

    @in_phase("saving")
    def save(self, fails: bool = False) -> str:
        self.phases.append(self.runtime.activity.phase)
        if fails:
            raise OSError("no space left")
        return "saved"


@pytest.mark.parametrize(("phase", "timed"), [("", False), ("set-up", True), ("training", True), ("serving", False)])
def test_a_rank_without_a_phase_or_that_serves_has_no_time_limit(phase: str, timed: bool) -> None:
    activity = RankActivity()
    activity.phase = phase
    assert activity.is_timed == timed


def test_every_step_is_progress() -> None:
    activity = RankActivity()
    activity.enter_epoch(3, 20, 10, (1, 2))
    before = activity.progress
    activity.advance(33, 30)
    assert activity.progress > before
    assert (activity.step, activity.epoch, activity.offset, activity.count, activity.shard) == (33, 3, 30, 10, (1, 2))


def test_a_decorated_method_sets_the_phase_and_counts_as_progress() -> None:
    trainer = _Trainer()
    activity = trainer.runtime.activity
    activity.phase = "training"
    before = activity.progress
    assert trainer.save() == "saved"
    assert trainer.phases == ["saving"]
    assert activity.phase == "training"
    assert activity.progress == before + 2


def test_the_phase_of_a_method_that_raises_is_kept_for_the_report() -> None:
    trainer = _Trainer()
    with pytest.raises(OSError, match="no space left"):
        trainer.save(fails=True)
    assert trainer.runtime.activity.phase == "saving"


def test_samples_are_known_only_in_training() -> None:
    activity = RankActivity()
    activity.find_samples = lambda epoch, offset, count, shard: [epoch, offset, count, *shard]
    assert activity.samples() is None
    activity.enter_epoch(3, 20, 10, (1, 2))
    assert activity.samples() == [3, 20, 10, 1, 2]
    activity.phase = "evaluation"
    assert activity.samples() is None
