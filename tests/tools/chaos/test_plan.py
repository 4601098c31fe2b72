"""A plan depends on its seed alone and treats all kinds and ranks equally."""

from __future__ import annotations

from collections import Counter
from typing import Any

from distrain.tools.chaos.plan import FAULT_KINDS, PlannedRun, draw_kinds, plan_runs


def plan(**changes: Any) -> list[PlannedRun]:
    settings: dict[str, Any] = {
        "per_run": 5,
        "steps": 200,
        "world_size": 3,
        "startup_seconds": 4.0,
        "step_seconds": 0.01,
        "seed": "7",
    }
    settings |= changes
    return plan_runs(draw_kinds(list(FAULT_KINDS), settings.pop("count", 65), settings["seed"]), **settings)


def test_plan_depends_on_the_seed() -> None:
    assert plan() == plan()
    assert plan() != plan(seed="8")


def test_all_kinds_are_planned_equally_often() -> None:
    counts = Counter(fault.kind for run in plan() for fault in run.faults)
    assert counts == dict.fromkeys(FAULT_KINDS, 5)


def test_faults_of_a_run_are_ordered_and_well_before_its_end() -> None:
    for run in plan():
        steps = [fault.step for fault in run.faults if fault.step is not None]
        assert steps == sorted(steps)
        assert all(1 <= step <= 120 for step in steps)
        assert len(run.faults) <= 5


def test_only_kinds_allowed_during_startup_have_no_step() -> None:
    starting = {fault.kind for run in plan(count=400) for fault in run.faults if fault.step is None}
    assert starting == {name for name, kind in FAULT_KINDS.items() if kind.during_startup}


def test_faults_of_links_are_planned_in_separate_runs() -> None:
    for run in plan():
        assert {FAULT_KINDS[fault.kind].needs_network for fault in run.faults} == {run.needs_network}


def test_runs_are_numbered_from_the_given_number() -> None:
    runs = plan(first=4)
    assert [run.number for run in runs] == list(range(4, 4 + len(runs)))


def test_every_rank_is_hit() -> None:
    assert {fault.rank for run in plan() for fault in run.faults} == {0, 1, 2}


def test_run_of_a_single_step_can_be_planned() -> None:
    assert all(fault.step in (None, 1) for run in plan(steps=1) for fault in run.faults)
