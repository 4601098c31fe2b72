"""``distrain find lr`` sweeps the rate on the training's own ranks, and suggests where the loss falls fastest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distrain.cli.find import FindSettings
from distrain.errors import ConfigError
from distrain.tools.rate_finder.curve import Curve
from tests.runs import SMALL, launched


def test_the_steepest_fall_of_the_smoothed_loss_is_suggested() -> None:
    curve = Curve()
    for step in range(100):
        rate = 10 ** (-6 + step * 0.08)
        # It falls around a rate of 0.01, and rises from 0.2 on.
        curve.add(rate, 2 - 1 / (1 + (0.01 / rate) ** 2) + (rate / 0.5) ** 3)
        if curve.diverged:
            break
    suggestion = curve.suggestion()
    assert suggestion is not None
    assert 0.005 < suggestion < 0.05
    assert curve.diverged
    assert curve.smoothed[-1] > 4 * min(curve.smoothed)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    curve = Curve()
    assert curve.suggestion() is None
    for step in range(20):
        curve.add(10.0**step, 1.0 + step / 100)
    assert curve.suggestion() is None
    curve.add(1e30, math.nan)
    assert curve.diverged
    assert len(curve.rates) == 20
    curve.draw()


def test_a_command_on_two_ranks_writes_curve_and_command(tmp_path: Path) -> None:
    keys = [*(key for key in SMALL if not key.startswith("trainer.progress")), "strategy=ddp", "optimizer=sgd"]
    keys += ["model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group", "optimizer.lr=7"]
    arguments = ("lr", "nproc=2", "steps=40", "lowest=1e-4", "highest=1e4", "folder=found", "--", *keys)
    result = launched(tmp_path, "find", *arguments, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found" / "find_lr.json").read_text())
    assert found["rates"][1] / found["rates"][0] == pytest.approx(10 ** (8 / 39))
    assert found["diverged"]
    assert 10 < len(found["losses"]) < 40
    assert f"optimizer.lr={found['suggestion']:.2g}" in result.stdout
    assert "train.py nproc=2" in result.stdout
    assert "optimizer.lr=7" not in result.stdout
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"find_lr.json", "find_lr.png"}


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"highest=0\.1: must be above lowest=1"):
        FindSettings(what="lr", steps=100, lowest=1.0, highest=0.1, folder=None)
