"""Where a rank says it is."""

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
        self.seen: list[str] = []

    @in_phase("saving")
    def save(self, fails: bool = False) -> str:
        self.seen.append(self.runtime.activity.phase)
        if fails:
            raise OSError("no space left")
        return "saved"


@pytest.mark.parametrize(("doing", "measured"), [("", False), ("set-up", True), ("training", True), ("serving", False)])
def test_who_does_nothing_or_answers_others_is_not_judged_by_progress(doing: str, measured: bool) -> None:
    position = RankActivity()
    position.phase = doing
    assert position.is_measured == measured


def test_every_step_is_progress() -> None:
    position = RankActivity()
    position.enter_epoch(3, 20, 10, (1, 2))
    before = position.progress
    position.advance(33, 30)
    assert position.progress > before
    assert (position.step, position.epoch, position.offset, position.count, position.shard) == (33, 3, 30, 10, (1, 2))


def test_a_phase_counts_as_progress_and_ends() -> None:
    trainer = _Trainer()
    position = trainer.runtime.activity
    position.phase = "training"
    before = position.progress
    assert trainer.save() == "saved"
    assert trainer.seen == ["saving"]
    assert position.phase == "training"
    assert position.progress == before + 2


def test_after_an_error_the_phase_stays_for_the_report() -> None:
    trainer = _Trainer()
    with pytest.raises(OSError, match="no space left"):
        trainer.save(fails=True)
    assert trainer.runtime.activity.phase == "saving"


def test_samples_are_known_in_training_alone() -> None:
    position = RankActivity()
    position.find_samples = lambda epoch, offset, count, shard: [epoch, offset, count, *shard]
    assert position.samples() is None
    position.enter_epoch(3, 20, 10, (1, 2))
    assert position.samples() == [3, 20, 10, 1, 2]
    position.phase = "evaluation"
    assert position.samples() is None
