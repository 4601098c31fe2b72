"""Figures are read, written and ordered as people expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.tools.comparison.final_figures import (
    Figure,
    bytes_sent,
    figures_of,
    lower_is_better,
    ordered,
    show_bytes,
    show_number,
)
from tests.tools.comparison.runs import SUMMARY, epoch_row, read, write_run


def test_figures_come_from_the_summary_and_the_best_from_the_curves(tmp_path: Path) -> None:
    runs = read(write_run(tmp_path / "a"))
    shown = {figure.label: figure.show(figure.value(runs[0])) for figure in figures_of(runs)}
    assert shown == {
        "best validation accuracy": "0.9000",
        "last validation accuracy": "0.8000",
        "best validation loss": "0.6000",
        "last validation loss": "0.7000",
        "test accuracy": "0.8500",
        "test loss": "0.5000",
        "train loss": "0.7000",
        "steps": "40",
        "epochs": "2",
        "seconds of training": "0.4",
        "seconds in all": "1.5",
        "images/s": "1,000",
        "ms per step": "10.00",
        "parameters": "5,000",
        "peak memory, MiB": "100",
    }
    assert bytes_sent(runs[0]) == 80_000


def test_numbers_of_a_hostile_summary_are_no_numbers(tmp_path: Path) -> None:
    odd = {"steps": True, "test_accuracy": "1", "images_per_second": 10**400, "step_ms": [1], "test_loss": None}
    (run,) = read(write_run(tmp_path / "a", summary=odd, rows=None))
    assert figures_of([run]) == []


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ("val_accuracy", "bac"),
        ("best_val_accuracy", "abc"),
        ("test_loss", "bac"),
        ("step_ms.mean", "abc"),
        ("images_per_second", "abc"),
    ],
)
def test_runs_are_ordered_by_a_metric_the_best_first(tmp_path: Path, metric: str, names: str) -> None:
    write_run(tmp_path / "c", summary=None, rows=None)
    write_run(tmp_path / "a", rows=[epoch_row(1, 0.9, 0.1), epoch_row(2, 0.5, 0.1)])
    slower = {**SUMMARY, "test_loss": 0.4, "step_ms": {"mean": 20.0}, "images_per_second": 500.0}
    write_run(tmp_path / "b", rows=[epoch_row(1, 0.6, 0.1)], summary=slower)
    assert "".join(run.name for run in ordered(read(tmp_path), metric)) == names


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric=val_acc: .*choices: .*val_accuracy.*did you mean val_accuracy"):
        ordered(read(write_run(tmp_path / "a")), "val_acc")


def test_differences_are_absolute_for_metrics_and_in_percent_for_costs() -> None:
    metric = Figure("x", lambda run: None, False, 4)
    assert metric.show_difference(0.9, 0.8) == "+0.1000"
    assert metric.show_difference(0.8, 0.9) == "−0.1000"
    assert metric.show_difference(0.8, 0.8) == metric.show_difference(None, 0.8) == ""
    assert metric.show_difference(1e-9, 0.0) == "+1e-09"
    cost = Figure("x", lambda run: None)
    assert cost.show_difference(150, 100) == "+50.0 %"
    assert cost.show_difference(50, 100) == "−50.0 %"
    assert cost.show_difference(5000, 100) == "×50"
    assert cost.show_difference(5, 0) == ""


def test_numbers_and_bytes_are_written_for_people() -> None:
    numbers = [1234567.0, 0.000012345, 1234.56, 1e300, -3.0]
    assert [show_number(number) for number in numbers] == ["1,234,567", "1.234e-05", "1,235", "1e+300", "-3"]
    assert [show_number(number, 2) for number in (0.0, 0.004567, 1.005, 2e7)] == [
        "0.00",
        "0.0046",
        "1.00",
        "20,000,000",
    ]
    assert [show_bytes(n) for n in (None, 0, 999, 1500, 2.5e9, 1e20)] == [
        "–",
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 GB",
        "1e+05 PB",
    ]


def test_losses_errors_and_costs_are_better_when_smaller() -> None:
    small = ("test_loss", "epoch/val_loss", "mean_absolute_error", "step_ms.p95", "wall_seconds", "peak_memory_mb")
    assert all(map(lower_is_better, small))
    assert not any(map(lower_is_better, ("val_accuracy", "test_mean_iou", "images_per_second", "compression_ratio")))
