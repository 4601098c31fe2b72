"""The state of each rank when one failed, from what the ranks published last."""

from __future__ import annotations

from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]

from distrain.health.activity import RankActivity
from distrain.health.judge import Heartbeat
from distrain.health.members import Member, details_key, heartbeat_key
from distrain.health.process import Process
from distrain.health.rank_states import RankDetails, RankStates


def activity_at(step: int, *, independent_steps: bool = False) -> RankActivity:
    """An observer's activity; a batch has 10 samples."""
    activity = RankActivity()
    activity.find_samples = lambda epoch, offset, count, shard: [epoch, offset, count, *shard]
    activity.enter_epoch(0, 10 * step, 10, (0, 2))
    activity.step, activity.independent_steps = step, independent_steps
    return activity


def states_with(step: int, phase: str = "training") -> RankStates:
    """Rank 0 is at step 5; rank 1 was at ``step`` when it published its state last."""
    heartbeats = {0: Heartbeat(9, 40, 5, "training", shard=(0, 2)), 1: Heartbeat(9, 40, step, phase, shard=(1, 2))}
    return RankStates(heartbeats, {1: RankDetails(0, 10 * step, 10, [])})


def test_a_rank_in_lockstep_was_at_the_step_in_which_the_others_wait() -> None:
    # It published its last heartbeat two steps earlier.
    assert states_with(3).samples(1, 0, activity_at(5)) == [0, 50, 10, 1, 2]


def test_a_rank_with_independent_steps_was_where_it_published_last() -> None:
    assert states_with(3).samples(1, 0, activity_at(5, independent_steps=True)) == [0, 30, 10, 1, 2]


def test_a_rank_that_was_ahead_was_where_it_published_last() -> None:
    assert states_with(6).samples(1, 0, activity_at(5)) == [0, 60, 10, 1, 2]


def test_a_parameter_server_knows_the_samples_from_the_workers() -> None:
    server = activity_at(0)
    server.phase = "serving"
    states = states_with(3)
    states.details[0] = RankDetails(0, 50, 10, [])
    assert states.samples(1, 2, server) == [0, 50, 10, 1, 2]


def test_outside_training_there_are_no_samples() -> None:
    assert states_with(6, "evaluation").samples(1, 0, activity_at(5, independent_steps=True)) is None


def test_the_state_of_a_rank_that_published_nothing_is_unknown() -> None:
    states = RankStates({0: Heartbeat(9, 40, 5, "training", shard=(0, 2)), 1: Heartbeat()}, {})
    assert states.samples(1, 0, activity_at(5)) is None
    assert states.stack(1) == ""


def test_the_final_states_of_the_other_ranks_are_waited_for_but_not_forever() -> None:
    store = HashStore()
    members = [Member("here", Process.current(), is_local=True)] * 3
    for rank, heartbeat in enumerate([Heartbeat(), Heartbeat(step=4, waiting=True, failing=True), Heartbeat(step=4)]):
        store.set(heartbeat_key(rank), heartbeat.to_json())
    store.set(details_key(1), RankDetails(0, 40, 10, ["outer", "calls", "of", "wait"]).to_json())
    # Rank 2 never publishes a final state.
    states = RankStates.read(store, dict.fromkeys(range(3), Heartbeat()), members, unresponsive=(0,), interval=0)
    shared: dict[str, Any] = {"host": "here", "step": 4, "doing": ""}
    assert states.others(0, members, lambda rank: {"tensor": rank}) == [
        {"rank": 1, "place": {"tensor": 1}, **shared, "waiting": True, "stack": ["calls", "of", "wait"]},
        {"rank": 2, "place": {"tensor": 2}, **shared, "waiting": False, "stack": []},
    ]
