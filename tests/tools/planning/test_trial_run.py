"""How many steps a trial takes, and what ends it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest

from distrain.errors import Stopped
from distrain.runtime.world import World
from distrain.tools.planning.trial_run import mean_step, step_seconds, steps_of_trial
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer
from tests.runs import small


@pytest.mark.parametrize(
    ("expected", "period", "warm_up", "periods"),
    [
        (0.001, 1, 3, 1000),
        (0.1, 1, 3, 20),
        (10.0, 1, 3, 5),
        (0.1, 4, 3, 5),
        # A minute, rather than the five of five periods.
        (1.0, 64, 3, 1),
    ],
)
def test_a_trial_has_whole_periods_and_few_long_steps(expected: float, period: int, warm_up: int, periods: int) -> None:
    assert steps_of_trial(expected, period) == (warm_up, periods)


def test_each_part_of_a_period_counts_when_it_is_not_disturbed() -> None:
    # The last step of four takes longer, and something disturbs another step in each period.
    steps = [0.1, 0.1, 0.9, 0.2, 0.1, 0.9, 0.1, 0.2, 0.1, 0.1, 0.1, 0.9]
    assert mean_step([0.0, *itertools.accumulate(steps)], 4) == pytest.approx(0.5 / 4)


def test_a_request_to_stop_that_comes_after_the_last_step_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.fit

    def fit(self: Trainer) -> None:
        original(self)
        self.runtime.stop_requested = "SIGTERM"

    monkeypatch.setattr(Trainer, "fit", fit)
    plan = RunPlan.resolve(small(), World(0, 1, 0, 1, "here"))
    with contextlib.closing(plan.load()) as splits, pytest.raises(Stopped, match="stopped by SIGTERM"):
        step_seconds(plan, splits, tmp_path, expected=10.0)
