"""The four formats of a prediction have the same content, however it is read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distrain.tools.predicting import result_files

ROWS: list[dict[str, Any]] = [
    {"path": "in/a.png", "error": "truncated"},
    {"path": 'in/"b",é.png', "class": "cat", "probability": 0.75, "top": [{"class": "cat"}, {"class": "dog"}]},
    {"path": "in/c.png", "class": "dog", "probability": 1, "labels": ["x", "y"], "numbers": {"age": 3.5}},
]


def written(tmp_path: Path, suffix: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = tmp_path / f"result{suffix}"
    result_files.write(path, suffix, lambda: iter(rows))
    return path


def test_json_is_that_of_the_standard_library(tmp_path: Path) -> None:
    assert written(tmp_path, ".json").read_text() == json.dumps(ROWS, indent=2) + "\n"
    assert result_files.to_json([]) == "[]\n"
    lines = written(tmp_path, ".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_tables_have_a_column_for_each_value_and_the_error_last(tmp_path: Path) -> None:
    columns = ["path", "class", "probability", "class_2", "labels", "numbers.age", "error"]
    cells = list(csv.reader(written(tmp_path, ".csv").open(newline="", encoding="utf-8")))
    assert cells[0] == columns
    assert cells[1] == ["in/a.png", "", "", "", "", "", "truncated"]
    assert cells[2] == ['in/"b",é.png', "cat", "0.75", "dog", "", "", ""]
    assert cells[3] == ["in/c.png", "dog", "1", "", "x;y", "3.5", ""]
    table = pq.read_table(written(tmp_path, ".parquet"))
    assert table.column_names == columns
    assert table["probability"].to_pylist() == [None, 0.75, 1.0]
    assert table["labels"].to_pylist() == [None, None, ["x", "y"]]
    assert table["error"].to_pylist() == ["truncated", None, None]


def test_parquet_is_written_in_pieces_and_shows_bytes_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_files, "_ROWS", 2)
    rows = [{"path": b"caf\xe9".decode("utf-8", "surrogateescape"), "class": str(number)} for number in range(5)]
    table = pq.read_table(written(tmp_path, ".parquet", rows))
    assert table["class"].to_pylist() == list("01234")
    assert table["path"].to_pylist() == ["caf\\xe9"] * 5
