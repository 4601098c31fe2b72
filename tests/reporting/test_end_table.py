"""The table at the end of a run fits the terminal, whatever the summary holds."""

from __future__ import annotations

import math

import pytest

from distrain.files.live_text import display_width
from distrain.reporting.end_table import end_table
from tests.tools.comparison.runs import SUMMARY

WHOLE = {
    **SUMMARY,
    "resumed_at_step": 10,
    "monitor": "val/accuracy",
    "best_epoch": 1,
    "best_test_accuracy": 0.84,
    "best_test_loss": 0.55,
    "step_ms": {"mean": 10.0, "p50": 9.5, "p95": 15.0},
    "stopped_early": True,
    # Activations that were not measured.
    "memory_by_kind_mb": {
        "measured": {"parameters": 10.0, "gradients": 20.0, "optimizer": 30.0, "activations": None, "buckets": 5.0}
    },
}


def test_the_table_says_what_the_run_came_to() -> None:
    assert end_table(WHOLE, "runs/first", 80) == [
        "  test              accuracy 0.8500, loss 0.5000",
        "  test of the best  accuracy 0.8400, loss 0.5500",
        "  validation        accuracy 0.8000",
        "  best validation   accuracy 0.9000, after epoch 1, stopped early",
        "  training loss     0.2000",
        "  steps             40, 30 of them since it was resumed, 2 epochs, 1.5 s",
        "  speed             1,000 images/s, 9.5 ms a step, 15 ms the slowest 5 %",
        "  time              compute 50%, communication 30%, data 10%, other 10%",
        "  memory            100 MB, parameters 10, gradients 20, optimizer 30, buckets 5",
        "  files             runs/first",
    ]


@pytest.mark.parametrize("width", [30, 40, 80])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {f"test_{'long' * 10}_{number}": 0.5 for number in range(20)},
        {"test_\x1b[31m数据": 0.5, "time_share": {"\x1b": 1.0, "x": "y"}, "monitor": 5, "best_val_5": math.inf},
        {"test_loss": None, "step_ms": None, "time_share": [], "steps": "many", "train_loss": math.nan},
    ],
)
def test_no_line_but_the_folders_is_wider_than_the_terminal(width: int, more: dict[str, object]) -> None:
    path = "/a/very/long/path" * 10
    *lines, last = end_table({**WHOLE, **more}, path, width)
    assert all(display_width(line) <= width and line.isprintable() for line in lines)
    # It can be copied.
    assert last.endswith(f"  {path}")


def test_a_summary_without_any_figure_leaves_the_folder() -> None:
    assert end_table({}, "runs/first", 80) == ["  files  runs/first"]
