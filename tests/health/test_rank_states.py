"""What was in work when a rank failed, from what the ranks told last."""

from __future__ import annotations

from torch.distributed import HashStore  # type: ignore[attr-defined]

from distrain.health.activity import RankActivity
from distrain.health.judge import Heartbeat
from distrain.health.members import Member, beat_key, told_key
from distrain.health.process import Process
from distrain.health.rank_states import RankDetails, RankStates


def position(step: int, *, independent_steps: bool = False) -> RankActivity:
    """An observer's; a batch has 10 samples."""
    made = RankActivity()
    made.find_samples = lambda epoch, offset, count, shard: [epoch, offset, count, *shard]
    made.enter_epoch(0, 10 * step, 10, (0, 2))
    made.step, made.independent_steps = step, independent_steps
    return made


def found(step: int, doing: str = "training") -> RankStates:
    """Rank 1's last words, of that step."""
    beats = {0: Heartbeat(9, 40, 5, "training", shard=(0, 2)), 1: Heartbeat(9, 40, step, doing, shard=(1, 2))}
    return RankStates(beats, {1: RankDetails(0, 10 * step, 10, [])})


def test_a_rank_that_keeps_step_was_where_the_others_wait() -> None:
    # Its last beat was two steps earlier.
    assert found(3).samples(1, 0, position(5)) == [0, 50, 10, 1, 2]


def test_a_rank_that_does_not_was_where_it_said_last() -> None:
    assert found(3).samples(1, 0, position(5, independent_steps=True)) == [0, 30, 10, 1, 2]


def test_a_rank_that_was_ahead_was_where_it_said_last() -> None:
    assert found(6).samples(1, 0, position(5)) == [0, 60, 10, 1, 2]


def test_a_server_learns_it_from_the_workers() -> None:
    server = position(0)
    server.phase = "serving"
    whereabouts = found(3)
    whereabouts.told[0] = RankDetails(0, 50, 10, [])
    assert whereabouts.samples(1, 2, server) == [0, 50, 10, 1, 2]


def test_outside_of_training_there_are_none() -> None:
    assert found(6, "evaluation").samples(1, 0, position(5, independent_steps=True)) is None


def test_a_rank_that_said_nothing_is_unknown() -> None:
    silent = RankStates({0: Heartbeat(9, 40, 5, "training", shard=(0, 2)), 1: Heartbeat()}, {})
    assert silent.samples(1, 0, position(5)) is None
    assert silent.stack(1) == ""


def test_the_report_waits_until_the_others_have_said_where_they_are() -> None:
    store = HashStore()
    members = [Member("here", Process.current(), is_near=True)] * 3
    for rank, beat in enumerate([Heartbeat(), Heartbeat(step=4, waiting=True, ending=True), Heartbeat(step=4)]):
        store.set(beat_key(rank), beat.packed())
    store.set(told_key(1), RankDetails(0, 40, 10, ["outer", "calls", "of", "wait"]).packed())
    # Rank 2 never answers, and is not waited for endlessly.
    whereabouts = RankStates.read(store, dict.fromkeys(range(3), Heartbeat()), members, mute=(0,), seconds=0)
    assert whereabouts.others(0, members) == [
        {"rank": 1, "host": "here", "step": 4, "doing": "", "waiting": True, "stack": ["calls", "of", "wait"]},
        {"rank": 2, "host": "here", "step": 4, "doing": "", "waiting": False, "stack": []},
    ]
