"""How many steps a trial takes, and what ends it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from distrain.errors import Stopped
from distrain.runtime.world import World
from distrain.tools.planning.trial_run import step_seconds, steps_of_trial
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer
from tests.runs import small


@pytest.mark.parametrize(
    ("expected", "period", "warm_up", "periods"),
    [
        (0.001, 1, 3, 1000),
        (0.1, 1, 3, 30),
        (10.0, 1, 3, 5),
        (0.1, 4, 3, 7),
        # A minute, rather than the nine of eight periods.
        (1.0, 64, 3, 1),
    ],
)
def test_a_trial_has_whole_periods_and_few_long_steps(expected: float, period: int, warm_up: int, periods: int) -> None:
    assert steps_of_trial(expected, period) == (warm_up, periods)


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
