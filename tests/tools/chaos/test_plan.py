"""The plan of a campaign: settled by its seed, and fair."""

from __future__ import annotations

from collections import Counter
from typing import Any

from distrain.tools.chaos.plan import KINDS, Run, draw_kinds, plan


def drawn(**changes: Any) -> list[Run]:
    settings: dict[str, Any] = {
        "per_run": 5,
        "steps": 200,
        "world_size": 3,
        "start_seconds": 4.0,
        "step_seconds": 0.01,
        "seed": "7",
    }
    settings |= changes
    return plan(draw_kinds(list(KINDS), settings.pop("count", 65), settings["seed"]), **settings)


def test_same_seed_plans_the_same_and_another_seed_something_else() -> None:
    assert drawn() == drawn()
    assert drawn() != drawn(seed="8")


def test_all_kinds_come_equally_often() -> None:
    counts = Counter(fault.kind for run in drawn() for fault in run.faults)
    assert counts == dict.fromkeys(KINDS, 5)


def test_faults_of_a_run_come_in_the_order_of_their_steps_and_before_its_end() -> None:
    for run in drawn():
        steps = [fault.step for fault in run.faults if fault.step is not None]
        assert steps == sorted(steps)
        assert all(1 <= step <= 120 for step in steps)
        assert len(run.faults) <= 5


def test_only_kinds_that_may_strike_a_start_have_no_step() -> None:
    starting = {fault.kind for run in drawn(count=400) for fault in run.faults if fault.step is None}
    assert starting == {name for name, kind in KINDS.items() if kind.any_time}


def test_faults_of_links_have_runs_of_their_own() -> None:
    for run in drawn():
        assert {KINDS[fault.kind].needs_network for fault in run.faults} == {run.on_network}


def test_runs_are_numbered_on_from_the_first() -> None:
    runs = drawn(first=4)
    assert [run.number for run in runs] == list(range(4, 4 + len(runs)))


def test_every_rank_is_struck() -> None:
    assert {fault.rank for run in drawn() for fault in run.faults} == {0, 1, 2}


def test_run_of_a_single_step_can_be_hurt() -> None:
    assert all(fault.step in (None, 1) for run in drawn(steps=1) for fault in run.faults)
