"""Short runs have in them what a long one has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from distrain.runtime.world import World
from distrain.training.run_plan import RunPlan
from distrain.verification import short_runs
from distrain.verification.short_runs import ShortRuns
from tests.runs import small

RANK = World(rank=0, size=3, local_rank=0, local_size=3, host="here")


def cut(steps: int, *overrides: str) -> ShortRuns:
    plan = RunPlan.resolve(small("strategy=ddp", *overrides), RANK)
    return short_runs.cut(plan, plan.check(), plan.load(), steps, Path("nowhere"))


@pytest.mark.parametrize("steps", [2, 3, 10])
@pytest.mark.parametrize("samples", [14, 400])
def test_an_epoch_ends_with_a_smaller_batch_that_ranks_share_unevenly(steps: int, samples: int) -> None:
    runs = cut(steps, f"data.train_size={samples}")
    batch_size = runs.config.data.batch_size
    assert runs.epoch_steps == math.ceil(len(runs.splits.train) / batch_size)
    assert runs.epoch_steps <= max(steps // 2, 2)
    assert runs.epoch_steps > 1
    assert 0 < runs.last_batch < batch_size
    assert runs.last_batch % RANK.size
    assert runs.save_at is None or runs.save_at < steps < 2 * runs.save_at


def test_the_serial_run_differs_in_nothing_but_its_strategy() -> None:
    runs = cut(6, "compression=topk", "optimizer=sgd", "trainer.micro_batch_size=2")
    asked, serial = runs.asked("fp64", "a"), runs.serial("fp64", "a")
    assert (serial.strategy.name, serial.compression.name) == ("single", "none")
    for section in ("model", "data", "optimizer", "loss", "trainer", "scheduler", "task", "seed"):
        assert getattr(asked, section) == getattr(serial, section)
    assert asked.trainer.precision == "fp64"
    assert runs.config.trainer.micro_batch_size == 2
