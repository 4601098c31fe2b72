"""How many steps a trial takes."""

from __future__ import annotations

import pytest

from distrain.tools.planning.trial_run import steps_of_trial


@pytest.mark.parametrize(
    ("expected", "period", "warm_up", "periods"),
    [
        (0.001, 1, 3, 400),
        (0.1, 1, 3, 30),
        (10.0, 1, 3, 5),
        (0.1, 4, 4, 7),
        # A minute, rather than the nine of eight periods.
        (1.0, 64, 64, 1),
    ],
)
def test_a_trial_has_whole_periods_and_few_long_steps(expected: float, period: int, warm_up: int, periods: int) -> None:
    assert steps_of_trial(expected, period) == (warm_up, periods)
