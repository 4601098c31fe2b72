"""Which rank is found responsible, given made-up heartbeats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distrain.health.judge import UNREPORTED_EXIT, Heartbeat, Limits, ObservedRank, Verdict, judge, why_stuck

LIMITS = Limits(silence=10, step=60, setup=300)
#: The observer's clock.
NOW = 1000.0


def observed(silent: float = 0.5, idle: float = 0.0, step: int = 7, **fields: object) -> ObservedRank:
    """A rank whose last heartbeat and progress were seen so many seconds ago."""
    heartbeat = replace(Heartbeat(3, 40, step, "training"), **fields)  # type: ignore[arg-type]
    return ObservedRank(heartbeat, NOW - silent, NOW - idle)


def verdict_on(*ranks: ObservedRank, own_rank: int = 0) -> Verdict | None:
    return judge(own_rank, dict(enumerate(ranks)), LIMITS, NOW)


def test_no_rank_is_responsible_while_all_make_progress() -> None:
    assert verdict_on(observed(), observed(idle=30), observed(silent=9)) is None


def test_a_process_that_has_exited_comes_first() -> None:
    exited = observed()
    exited.exited = True
    assert verdict_on(observed(silent=50), exited, observed(idle=100)) == Verdict(1, UNREPORTED_EXIT)


def test_the_rank_that_was_silent_first_is_responsible() -> None:
    verdict = verdict_on(observed(idle=100), observed(silent=11), observed(silent=12))
    assert verdict is not None
    assert verdict.rank == 2
    assert verdict.reason == (
        "no heartbeat for 10 s (its process is stopped, or its host or network is down) in training"
    )


def test_an_observer_does_not_check_its_own_heartbeats() -> None:
    assert verdict_on(observed(silent=50), observed()) is None
    assert verdict_on(observed(silent=50), observed(), own_rank=1) is not None


def test_of_ranks_without_progress_the_one_that_does_not_wait_is_responsible() -> None:
    verdict = verdict_on(observed(idle=62, waiting=True), observed(idle=61), observed(idle=63, waiting=True))
    assert verdict is not None
    assert verdict.rank == 1
    assert verdict.reason == "no progress within runtime.timeout_seconds=60 in training, and it waits for no other rank"


def test_ranks_that_wait_are_not_responsible_while_another_works() -> None:
    # Rank 1 may be writing a large checkpoint, for less than a minute so far.
    assert verdict_on(observed(idle=70, waiting=True), observed(idle=59, phase="saving")) is None


def test_if_all_wait_the_one_furthest_behind_is_responsible() -> None:
    verdict = verdict_on(observed(idle=80, waiting=True), observed(idle=61, step=6, waiting=True))
    assert verdict is not None
    assert verdict.rank == 1
    assert "all ranks wait, and this one is furthest behind" in verdict.reason


def test_ranks_that_wait_for_an_expendable_rank_are_not_in_a_deadlock() -> None:
    assert verdict_on(observed(idle=80, waiting=True), observed(idle=90, expendable=True)) is None
    # Nor are they if it waits itself, as long as it makes progress.
    assert verdict_on(observed(idle=80, waiting=True), observed(idle=5, waiting=True, expendable=True)) is None


def test_ranks_that_have_just_begun_to_wait_are_not_in_a_deadlock() -> None:
    assert verdict_on(observed(idle=80, waiting=True), observed(idle=1, waiting=True)) is None


@pytest.mark.parametrize("phase", ["set-up", "finishing"])
def test_before_the_first_and_after_the_last_step_another_limit_applies(phase: str) -> None:
    assert verdict_on(observed(), observed(idle=299, phase=phase)) is None
    verdict = verdict_on(observed(), observed(idle=301, phase=phase))
    assert verdict is not None
    assert f"no progress within runtime.setup_timeout_seconds=300 in {phase}" in verdict.reason


@pytest.mark.parametrize("fields", [{"expendable": True}, {"leaving": True}])
def test_ranks_that_are_not_required_are_not_responsible(fields: dict[str, bool]) -> None:
    exited = observed(**fields)
    exited.exited = True
    assert verdict_on(observed(), exited, observed(silent=99, **fields), observed(idle=99, **fields)) is None


def test_a_rank_that_serves_others_needs_heartbeats_but_no_progress() -> None:
    assert verdict_on(observed(), observed(idle=1e6, progress=None)) is None
    assert verdict_on(observed(), observed(silent=20, progress=None)) is not None


def test_an_expendable_rank_is_stuck_unless_it_waits() -> None:
    assert why_stuck(observed(idle=61, expendable=True), LIMITS, NOW) == (
        "no progress within runtime.timeout_seconds=60 in training"
    )
    assert why_stuck(observed(idle=61, waiting=True), LIMITS, NOW) is None
    assert why_stuck(observed(idle=59), LIMITS, NOW) is None


def test_times_are_when_the_observer_saw_a_change() -> None:
    rank = ObservedRank(Heartbeat(1, 5), 0, 0)
    rank.update(Heartbeat(2, 5), 10)
    assert (rank.heartbeat_time, rank.progress_time) == (10, 0)
    rank.update(Heartbeat(3, 6), 20)
    assert (rank.heartbeat_time, rank.progress_time) == (20, 20)
    rank.update(Heartbeat(3, 6), 30)
    assert (rank.heartbeat_time, rank.progress_time) == (20, 20)
    rank.update(Heartbeat(4, 6, phase="saving"), 40)
    assert (rank.heartbeat_time, rank.progress_time) == (40, 40)
    rank.reset_clocks(100)
    assert (rank.heartbeat_time, rank.progress_time) == (100, 100)


def test_a_heartbeat_is_stored_in_less_than_100_bytes() -> None:
    heartbeat = Heartbeat(12345, 678, 90, "evaluation", waiting=True, shard=(3, 4))
    assert Heartbeat.from_json(heartbeat.to_json().encode()) == heartbeat
    assert len(heartbeat.to_json()) < 100
