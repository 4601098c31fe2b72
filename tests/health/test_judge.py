"""Who is to blame, judged from made-up beats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distrain.health.judge import UNREPORTED_EXIT, Heartbeat, Limits, ObservedRank, Verdict, is_stuck, judge

LIMITS = Limits(silence=10, step=60, setup=300)
#: The observer's clock.
NOW = 1000.0


def seen(silent: float = 0.5, idle: float = 0.0, step: int = 7, **told: object) -> ObservedRank:
    """A rank that beat and made progress so many seconds ago."""
    beat = replace(Heartbeat(3, 40, step, "training"), **told)  # type: ignore[arg-type]
    return ObservedRank(beat, NOW - silent, NOW - idle)


def blamed(*ranks: ObservedRank, own: int = 0) -> Verdict | None:
    return judge(own, dict(enumerate(ranks)), LIMITS, NOW)


def test_nobody_is_blamed_while_all_get_on() -> None:
    assert blamed(seen(), seen(idle=30), seen(silent=9)) is None


def test_a_process_that_is_gone_comes_first() -> None:
    gone = seen()
    gone.gone = True
    assert blamed(seen(silent=50), gone, seen(idle=100)) == Verdict(1, UNREPORTED_EXIT)


def test_the_rank_that_was_silent_first_is_blamed() -> None:
    verdict = blamed(seen(idle=100), seen(silent=11), seen(silent=12))
    assert verdict is not None
    assert verdict.rank == 2
    assert verdict.reason == "no sign of life for 10 s (stopped, or its host or network is gone) in training"


def test_an_observer_does_not_hear_itself() -> None:
    assert blamed(seen(silent=50), seen()) is None
    assert blamed(seen(silent=50), seen(), own=1) is not None


def test_of_ranks_without_progress_the_one_that_waits_for_nobody_is_blamed() -> None:
    verdict = blamed(seen(idle=62, waiting=True), seen(idle=61), seen(idle=63, waiting=True))
    assert verdict is not None
    assert verdict.rank == 1
    assert verdict.reason == "no progress within runtime.timeout_seconds=60 in training, and it waits for no other rank"


def test_while_somebody_still_works_those_who_wait_are_blameless() -> None:
    # Rank 1 writes a large checkpoint, say, and began less than a minute ago.
    assert blamed(seen(idle=70, waiting=True), seen(idle=59, phase="saving")) is None


def test_if_all_wait_the_furthest_behind_is_blamed() -> None:
    verdict = blamed(seen(idle=80, waiting=True), seen(idle=61, step=6, waiting=True))
    assert verdict is not None
    assert verdict.rank == 1
    assert "all ranks wait, and this one is furthest behind" in verdict.reason


def test_those_who_wait_for_a_rank_they_can_do_without_are_not_in_a_deadlock() -> None:
    assert blamed(seen(idle=80, waiting=True), seen(idle=90, expendable=True)) is None
    # Not even if it waits itself, as long as it gets on.
    assert blamed(seen(idle=80, waiting=True), seen(idle=5, waiting=True, expendable=True)) is None


def test_ranks_that_have_just_begun_to_wait_are_not_in_a_deadlock() -> None:
    assert blamed(seen(idle=80, waiting=True), seen(idle=1, waiting=True)) is None


@pytest.mark.parametrize("doing", ["set-up", "finishing"])
def test_before_and_after_all_steps_another_limit_counts(doing: str) -> None:
    assert blamed(seen(), seen(idle=299, phase=doing)) is None
    verdict = blamed(seen(), seen(idle=301, phase=doing))
    assert verdict is not None
    assert f"no progress within runtime.setup_timeout_seconds=300 in {doing}" in verdict.reason


@pytest.mark.parametrize("told", [{"expendable": True}, {"left": True}])
def test_ranks_that_nobody_needs_are_not_blamed(told: dict[str, bool]) -> None:
    gone = seen(**told)
    gone.gone = True
    assert blamed(seen(), gone, seen(silent=99, **told), seen(idle=99, **told)) is None


def test_a_rank_that_serves_others_is_not_judged_by_progress() -> None:
    assert blamed(seen(), seen(idle=1e6, progress=None)) is None
    assert blamed(seen(), seen(silent=20, progress=None)) is not None


def test_an_expendable_rank_gives_itself_up_unless_it_waits() -> None:
    assert is_stuck(seen(idle=61, expendable=True), LIMITS, NOW) == (
        "no progress within runtime.timeout_seconds=60 in training"
    )
    assert is_stuck(seen(idle=61, waiting=True), LIMITS, NOW) is None
    assert is_stuck(seen(idle=59), LIMITS, NOW) is None


def test_clocks_go_by_what_the_observer_saw_change() -> None:
    rank = ObservedRank(Heartbeat(1, 5), 0, 0)
    rank.look(Heartbeat(2, 5), 10)
    assert (rank.beat_seen, rank.progress_seen) == (10, 0)
    rank.look(Heartbeat(3, 6), 20)
    assert (rank.beat_seen, rank.progress_seen) == (20, 20)
    rank.look(Heartbeat(3, 6), 30)
    assert (rank.beat_seen, rank.progress_seen) == (20, 20)
    rank.look(Heartbeat(4, 6, phase="saving"), 40)
    assert (rank.beat_seen, rank.progress_seen) == (40, 40)
    rank.forgive(100)
    assert (rank.beat_seen, rank.progress_seen) == (100, 100)


def test_a_beat_travels_as_a_few_bytes_of_text() -> None:
    beat = Heartbeat(12345, 678, 90, "evaluation", waiting=True, expendable=False, left=False, shard=(3, 4))
    assert Heartbeat.unpacked(beat.packed().encode()) == beat
    assert len(beat.packed()) < 100
