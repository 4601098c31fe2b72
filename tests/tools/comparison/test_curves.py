"""Curves are read in one pass, in bounded memory, and show every peak."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import statistics
from typing import Any

import pytest

from distrain.tools.comparison.curves import Curve, Metrics, TrainingClock, read_metrics
from tests.tools.comparison.runs import ROWS, epoch_row, step_row


def read(*rows: Any, end: bytes = b"") -> Metrics:
    return read_metrics(io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + end))


def drawn(curve: Curve, most: int = 50) -> list[tuple[int, float | None]]:
    return [(point.step, point.mean) for point in curve.points(most)]


def test_a_short_curve_is_drawn_row_by_row() -> None:
    curve = read(*ROWS).curves["train/loss"]
    assert drawn(curve) == [(10, 1.0), (20, 0.5), (30, 0.3), (40, 0.2)]
    assert all(point.low == point.mean == point.high for point in curve.points(4))
    assert (curve.lowest, curve.highest, curve.last, curve.rows) == (0.2, 1.0, (40, 0.2), 4)


@pytest.mark.parametrize("rows", [3_000, 70_001])
def test_a_long_curve_keeps_its_mean_and_every_extreme(rows: int) -> None:
    draw = random.Random(rows)
    values = {step: draw.random() for step in range(1, rows + 1)}
    values[rows // 3], values[rows // 2] = 50.0, -50.0
    curve = Curve()
    for step, value in values.items():
        curve.add(step, value)
    points = curve.points(200)
    assert 100 <= len(points) <= 200
    steps = [point.step for point in points]
    assert steps == sorted(set(steps))
    stretch = 2 * rows / len(points)
    assert points[0].step <= stretch
    assert points[-1].step >= rows - stretch
    for step, value in ((rows // 3, 50.0), (rows // 2, -50.0)):
        assert any(value in (point.low, point.high) and abs(point.step - step) <= stretch for point in points)
    ordinary = [point.mean for point in points if point.mean is not None]
    assert statistics.mean(ordinary) == pytest.approx(0.5, abs=0.05)
    # All rows are covered.
    assert max(later - step for step, later in itertools.pairwise(steps)) < 2 * rows / 100
    assert curve.rows == rows


def test_a_stretch_is_drawn_by_the_mean_of_all_its_rows() -> None:
    curve = Curve()
    for step in range(8_192):
        curve.add(step, None if step % 4 == 3 else float(step % 4))
    points = curve.points(100)
    assert [point.mean for point in points] == pytest.approx([1.0] * len(points))
    assert {(point.low, point.high) for point in points} == {(0.0, 2.0)}


def test_drawing_a_curve_twice_gives_the_same_points() -> None:
    curve = Curve()
    for step in range(5_000):
        curve.add(step, math.sin(step))
    assert curve.points(50) == curve.points(50)
    assert len(curve.points(400)) > len(curve.points(50))


def test_values_that_are_not_finite_break_the_line_and_are_counted() -> None:
    rows = [step_row(1, 1.0), step_row(2, None), step_row(3, 2.0)]
    odd = [
        b'{"kind":"step","step":%d,"train/loss":%s}\n' % (4 + n, v) for n, v in enumerate((b"NaN", b"1e999", b'"x"'))
    ]
    curve = read(*rows, end=b"".join(odd) + b'{"kind":"step","step":9,"train/loss":1%s}\n' % (b"0" * 400)).curves[
        "train/loss"
    ]
    assert drawn(curve) == [(1, 1.0), (2, None), (3, 2.0), (4, None), (5, None), (6, None), (9, None)]
    assert (curve.missing, curve.first_missing, curve.last) == (5, 2, (3, 2.0))


def test_a_curve_without_any_finite_value_has_no_last_one() -> None:
    curve = read(*(step_row(step, None) for step in range(1, 4))).curves["train/loss"]
    assert curve.last is None
    assert [value for _, value in drawn(curve)] == [None] * 3


@pytest.mark.parametrize(
    ("line", "invalid", "repeated"),
    [
        (b'{"kind": "step", "step": 50, "train/lo', 1, 0),
        (b"\xff\xfe\n", 1, 0),
        (b"[1]\n", 1, 0),
        (b"[" * 60_000 + b"\n", 1, 0),
        (b'{"kind": "step", "step": true}\n', 1, 0),
        (b'{"kind": "step", "step": -1}\n', 1, 0),
        (b'{"kind": "step", "step": 1.5}\n', 1, 0),
        (b'{"kind": "other", "step": 50}\n', 1, 0),
        (b'{"kind": "step", "step": 50, "x": "' + b"x" * 200_000 + b'"}\n', 1, 0),
        (b'{"kind": "step", "step": 40, "train/loss": 9}\n', 0, 1),
        (b'{"kind": "step", "step": 10, "train/loss": 9}\n', 0, 1),
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_counted(line: bytes, invalid: int, repeated: int) -> None:
    metrics = read(*ROWS, end=line + (b'{"kind":"step","step":60,"train/loss":0.1}\n' if line.endswith(b"\n") else b""))
    assert (metrics.invalid_lines, metrics.repeated_rows) == (invalid, repeated)
    assert metrics.curves["train/loss"].highest == 1.0
    assert metrics.last_step == (60 if line.endswith(b"\n") else 40)


def test_names_are_bounded_in_number_and_length() -> None:
    rows = {f"train/{n}": 1.0 for n in range(200)}
    metrics = read({"kind": "step", "step": 1, "x" * 90: 1.0, "train/" + "x" * 90: 1.0, "other": 1.0, **rows})
    assert len(metrics.curves) == 48
    assert metrics.omitted_names
    assert all(name in rows for name in metrics.curves)


def test_seconds_are_those_of_steps_however_long_the_run_paused() -> None:
    rows = [step_row(10, 1.0), step_row(20, 1.0), epoch_row(25, 0.5, 1.0)]
    rows[1]["time"] += 1e6
    metrics = read(*rows)
    assert [step for step, _ in metrics.clock.knots] == [0, 10, 20, 25]
    assert [seconds for _, seconds in metrics.clock.knots] == pytest.approx([0.0, 0.1, 0.2, 0.25])


def test_a_long_runs_clock_is_bounded_and_ends_at_its_last_step() -> None:
    clock = TrainingClock()
    for step in range(1, 10_001):
        clock.add(step, 1.0 if step <= 5_000 else 3.0)
    clock.finish(10_000)
    assert len(clock.knots) < 140
    assert clock.knots == sorted(clock.knots)
    seconds = dict(clock.knots)
    assert max(seconds) == 10_000
    assert [seconds[4_992], seconds[10_000]] == pytest.approx([4.992, 20.0])
