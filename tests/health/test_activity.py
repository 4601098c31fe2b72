"""Where a rank says it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from distrain.health.activity import Position, while_doing


@dataclass
class _Runtime:
    position: Position = field(default_factory=Position)


class _Trainer:
    def __init__(self) -> None:
        self.runtime = _Runtime()
        self.seen: list[str] = []

    @while_doing("saving")
    def save(self, fails: bool = False) -> str:
        self.seen.append(self.runtime.position.doing)
        if fails:
            raise OSError("no space left")
        return "saved"


@pytest.mark.parametrize(("doing", "measured"), [("", False), ("set-up", True), ("training", True), ("serving", False)])
def test_who_does_nothing_or_answers_others_is_not_judged_by_progress(doing: str, measured: bool) -> None:
    position = Position()
    position.doing = doing
    assert position.is_measured == measured


def test_every_step_is_progress() -> None:
    position = Position()
    position.enter_epoch(3, 20, 10, (1, 2))
    before = position.progress
    position.advance(33, 30)
    assert position.progress > before
    assert (position.step, position.epoch, position.offset, position.count, position.shard) == (33, 3, 30, 10, (1, 2))


def test_a_phase_counts_as_progress_and_ends() -> None:
    trainer = _Trainer()
    position = trainer.runtime.position
    position.doing = "training"
    before = position.progress
    assert trainer.save() == "saved"
    assert trainer.seen == ["saving"]
    assert position.doing == "training"
    assert position.progress == before + 2


def test_after_an_error_the_phase_stays_for_the_report() -> None:
    trainer = _Trainer()
    with pytest.raises(OSError, match="no space left"):
        trainer.save(fails=True)
    assert trainer.runtime.position.doing == "saving"


def test_samples_are_known_in_training_alone() -> None:
    position = Position()
    position.find_samples = lambda epoch, offset, count, shard: [epoch, offset, count, *shard]
    assert position.samples() is None
    position.enter_epoch(3, 20, 10, (1, 2))
    assert position.samples() == [3, 20, 10, 1, 2]
    position.doing = "evaluation"
    assert position.samples() is None
