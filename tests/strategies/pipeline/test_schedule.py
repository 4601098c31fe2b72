"""Schedules: complete, free of deadlocks, and with the bubble and memory that their papers give."""

from __future__ import annotations

import itertools

import pytest

from distrain.strategies.pipeline.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    Schedule,
    TimedAction,
    actions_of_ranks,
    bubble_fraction,
    rank_of_stages,
    simulate,
)

GRID = [
    (name, ranks, virtual, microbatches)
    for name, ranks, microbatches in itertools.product(SCHEDULES, (2, 3, 4), (1, 2, 3, 5, 8, 12))
    for virtual in ([SCHEDULES[name].stages_per_rank] if SCHEDULES[name].stages_per_rank else [2, 3])
]


def simulated(schedule: Schedule, ranks: int, virtual: int, microbatches: int) -> list[list[TimedAction]]:
    order = actions_of_ranks(schedule, ranks, virtual, microbatches)
    return simulate(order, [1.0] * ranks * virtual, [2.0] * ranks * virtual)


def most_held(actions: list[Action]) -> int:
    held = most = 0
    for action in actions:
        held += {"forward": 1, "backward": -1, "weight": -1, "input": 0}[action.kind]
        most = max(most, held)
    return most


@pytest.mark.parametrize(("name", "ranks", "virtual", "microbatches"), GRID)
def test_every_order_is_complete_and_does_not_deadlock(name: str, ranks: int, virtual: int, microbatches: int) -> None:
    schedule = SCHEDULES[name]
    timelines = simulated(schedule, ranks, virtual, microbatches)
    kinds: tuple[ActionKind, ...] = (
        ("forward", "input", "weight") if schedule.splits_backward else ("forward", "backward")
    )
    rank_of_stage = rank_of_stages(schedule, ranks, virtual)
    for rank, timeline in enumerate(timelines):
        stages = [stage for stage, owner in enumerate(rank_of_stage) if owner == rank]
        expected = [Action(kind, stage, m) for kind in kinds for stage in stages for m in range(microbatches)]
        assert sorted(timed.action for timed in timeline) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)]
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 16)])
def test_the_bubble_of_equal_stages_follows_the_formula(name: str, virtual: int, ranks: int, microbatches: int) -> None:
    fraction = bubble_fraction(simulated(SCHEDULES[name], ranks, virtual, microbatches))
    assert fraction == pytest.approx((ranks - 1) / (virtual * microbatches + ranks - 1))


@pytest.mark.parametrize("name", ["interleaved_zero_bubble", "zbv_zero_bubble"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 16)])
def test_split_backward_passes_fill_most_of_the_bubble(name: str, ranks: int, microbatches: int) -> None:
    whole = bubble_fraction(simulated(SCHEDULES["interleaved_1f1b"], ranks, 2, microbatches))
    assert bubble_fraction(simulated(SCHEDULES[name], ranks, 2, microbatches)) < 0.75 * whole


def test_memory_does_not_grow_with_microbatches_except_under_gpipe() -> None:
    for name in SCHEDULES:
        virtual = SCHEDULES[name].stages_per_rank or 2
        few, many = (
            max(most_held(actions) for actions in actions_of_ranks(SCHEDULES[name], 4, virtual, count))
            for count in (16, 32)
        )
        assert (few, many) == (16, 32) if name == "gpipe" else few == many
    assert [most_held(actions) for actions in actions_of_ranks(SCHEDULES["1f1b"], 4, 1, 16)] == [4, 3, 2, 1]


def test_the_v_layout_gives_the_first_rank_the_last_stage() -> None:
    assert rank_of_stages(SCHEDULES["zbv_zero_bubble"], 3, 2) == [0, 1, 2, 2, 1, 0]
    assert rank_of_stages(SCHEDULES["interleaved_1f1b"], 3, 2) == [0, 1, 2, 0, 1, 2]


def test_an_order_that_deadlocks_is_refused() -> None:
    backward_first = [Action("backward", 0, 0), Action("forward", 0, 0)]
    with pytest.raises(ValueError, match="deadlocks"):
        simulate([backward_first], [1.0], [2.0])
