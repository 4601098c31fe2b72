"""What is measured on several ranks, and where it is refused."""

from __future__ import annotations

import contextlib
import dataclasses

from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tools.planning.measurement import measure
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import small


def refusal() -> str:
    world = World.from_environment()
    uneven = dataclasses.replace(world, host="a" if world.rank == 0 else "b")
    plan = RunPlan.resolve(small("data.batch_size=30"), dataclasses.replace(world, rank=0, size=1))
    with contextlib.closing(plan.load()) as splits:
        try:
            measure(plan, uneven, splits, {})
        except ConfigError as error:
            return str(error)
    return ""


def test_hosts_with_different_numbers_of_ranks_are_refused_on_all_of_them() -> None:
    line = "plan: hosts have different numbers of ranks: {'a': 1, 'b': 2}; a plan needs the same number on each"
    assert run_ranks(refusal, 3) == [line] * 3
