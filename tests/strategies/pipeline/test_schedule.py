"""Orders of work: complete, playable, as idle and as hungry for memory as their papers say."""

from __future__ import annotations

import itertools

import pytest

from distrain.strategies.pipeline.schedule import SCHEDULES, Kind, Schedule, Work, bubble, orders, placement, play

GRID = [
    (name, ranks, virtual, microbatches)
    for name, ranks, microbatches in itertools.product(SCHEDULES, (2, 3, 4), (1, 2, 3, 5, 8, 12))
    for virtual in ([SCHEDULES[name].virtual] if SCHEDULES[name].virtual else [2, 3])
]


def played(schedule: Schedule, ranks: int, virtual: int, microbatches: int) -> list[list[tuple[Work, float, float]]]:
    order = orders(schedule, ranks, virtual, microbatches)
    return play(order, [1.0] * ranks * virtual, [2.0] * ranks * virtual)


def most_kept(lane: list[Work]) -> int:
    kept = most = 0
    for work in lane:
        kept += {"forward": 1, "backward": -1, "weight": -1, "input": 0}[work.kind]
        most = max(most, kept)
    return most


@pytest.mark.parametrize(("name", "ranks", "virtual", "microbatches"), GRID)
def test_every_order_is_complete_and_does_not_deadlock(name: str, ranks: int, virtual: int, microbatches: int) -> None:
    schedule = SCHEDULES[name]
    lanes = played(schedule, ranks, virtual, microbatches)
    kinds: tuple[Kind, ...] = ("forward", "input", "weight") if schedule.splits_backward else ("forward", "backward")
    where = placement(schedule, ranks, virtual)
    for rank, lane in enumerate(lanes):
        mine = [stage for stage, owner in enumerate(where) if owner == rank]
        wanted = [Work(kind, stage, m) for kind in kinds for stage in mine for m in range(microbatches)]
        assert sorted(work for work, _, _ in lane) == sorted(wanted)


@pytest.mark.parametrize(
    ("name", "virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)]
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 16)])
def test_the_bubble_of_equal_stages_is_the_formula(name: str, virtual: int, ranks: int, microbatches: int) -> None:
    found = bubble(played(SCHEDULES[name], ranks, virtual, microbatches))
    assert found == pytest.approx((ranks - 1) / (virtual * microbatches + ranks - 1))


@pytest.mark.parametrize("name", ["interleaved_zero_bubble", "zbv_zero_bubble"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 16)])
def test_split_backward_passes_fill_most_of_the_bubble(name: str, ranks: int, microbatches: int) -> None:
    whole = bubble(played(SCHEDULES["interleaved_1f1b"], ranks, 2, microbatches))
    assert bubble(played(SCHEDULES[name], ranks, 2, microbatches)) < 0.75 * whole


def test_memory_is_bounded_by_stages_except_under_gpipe() -> None:
    for name in SCHEDULES:
        virtual = SCHEDULES[name].virtual or 2
        few, many = (max(most_kept(lane) for lane in orders(SCHEDULES[name], 4, virtual, count)) for count in (16, 32))
        assert (few, many) == (16, 32) if name == "gpipe" else few == many
    assert [most_kept(lane) for lane in orders(SCHEDULES["1f1b"], 4, 1, 16)] == [4, 3, 2, 1]


def test_a_v_gives_the_first_rank_the_last_stage() -> None:
    assert placement(SCHEDULES["zbv_zero_bubble"], 3, 2) == [0, 1, 2, 2, 1, 0]
    assert placement(SCHEDULES["interleaved_1f1b"], 3, 2) == [0, 1, 2, 0, 1, 2]


def test_an_order_that_waits_for_itself_is_named() -> None:
    backward_first = [Work("backward", 0, 0), Work("forward", 0, 0)]
    with pytest.raises(ValueError, match="deadlocks"):
        play([backward_first], [1.0], [2.0])
