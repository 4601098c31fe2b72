"""The table is as wide as the terminal, whatever letters names have."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.files.live_text import display_width
from distrain.tools.comparison.text_table import to_text
from tests.tools.comparison.runs import CONFIG, read, write_run


@pytest.mark.parametrize("width", [20, 40, 80, 120, 400])
def test_no_line_of_the_table_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    for name in ("a", "数据并行" * 8, "é́" * 30, "long" * 30):
        write_run(tmp_path / name)
    lines = to_text(read(tmp_path), width).split("\n")
    assert all(display_width(line) <= width for line in lines[:5])
    if width > 20:
        assert len({display_width(line) for line in lines[:5]}) == 1
    assert ("too narrow for" in lines[-1]) == (width <= 120)


def test_most_important_columns_stay_longest(tmp_path: Path) -> None:
    lines = to_text(read(write_run(tmp_path / "a")), 40).split("\n")
    assert lines[0].split() == ["run", "best", "val", "accuracy", "test", "accuracy"]
    assert lines[1].split() == ["a", "0.9000", "0.8500"]


def test_runs_that_did_not_finish_say_so_below_the_table(tmp_path: Path) -> None:
    failure = {"rank": 0, "step": 3, "error": "ValueError: \x1b[31mred"}
    runs = read(write_run(tmp_path / "ok"), write_run(tmp_path / "bad", summary=None, failure=failure))
    lines = to_text(runs, 200).split("\n")
    assert "state" in lines[0]
    assert lines[-1] == r"bad: failed: rank 0, step 3: ValueError: \x1b[31mred"
    assert "state" not in to_text(runs[:1], 200).split("\n")[0]


def test_a_column_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", config=CONFIG, summary=None, rows=None))
    assert to_text([run], 200).split("\n")[0].split() == ["run", "state", "strategy"]
