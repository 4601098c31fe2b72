"""Runs have short names of their own, and only keys that differ are shown."""

from __future__ import annotations

from pathlib import Path

from distrain.tools.comparison.differences import Difference, describe_runs, find_differences
from tests.tools.comparison.runs import CONFIG, SUMMARY, read, write_run


def test_names_are_as_short_as_tells_runs_apart(tmp_path: Path) -> None:
    runs = read(*(write_run(tmp_path / path) for path in ("x/1", "y/1", "y/2", "z/y/1")))
    assert [run.name for run in runs] == ["x/1", f"{tmp_path.name}/y/1", "2", "z/y/1"]


def test_names_stay_different_when_they_are_shortened(tmp_path: Path) -> None:
    long = "x" * 60
    runs = read(*(write_run(tmp_path / f"{long}{letter}{long}") for letter in "abc"))
    assert len({run.name for run in runs}) == 3
    assert all(len(run.name) < 60 for run in runs)


def test_names_have_no_control_characters(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a\nb\x1b[31m\u202e数据"))
    assert run.name == r"a\nb\x1b[31m\u202e数据"


def test_only_keys_that_differ_are_found_with_those_that_a_run_lacks(tmp_path: Path) -> None:
    other = {**CONFIG, "strategy": {"name": "local_sgd", "sync_every": 8}, "optimizer": {"lr": 0.1, "betas": [0.9, 1]}}
    torch = {**SUMMARY, "versions": {"torch": "2.14.1"}}
    runs = read(write_run(tmp_path / "a"), write_run(tmp_path / "b", config=other, summary=torch))
    assert find_differences(runs) == [
        Difference("strategy.name", ("ddp", "local_sgd")),
        Difference("strategy.sync_every", (None, "8")),
        Difference("optimizer.betas", (None, "[0.9, 1]")),
        Difference("version of torch", ("2.13.0", "2.14.1")),
    ]


def test_meshes_differ_where_their_keys_do_not(tmp_path: Path) -> None:
    config = {"strategy": {"name": "mesh", "mesh": {"data": None, "tensor": 2}}}
    summaries = [{**SUMMARY, "mesh": {"data": replicas, "tensor": 2}} for replicas in (2, 4)]
    runs = read(*(write_run(tmp_path / str(n), config=config, summary=each) for n, each in enumerate(summaries)))
    assert find_differences(runs) == [Difference("mesh", ("data 2 × tensor 2", "data 4 × tensor 2"))]


def test_a_run_without_a_configuration_makes_no_difference(tmp_path: Path) -> None:
    runs = read(write_run(tmp_path / "a"), write_run(tmp_path / "b", config=None))
    assert find_differences(runs) == []


def test_a_run_is_described_by_what_sets_it_apart_from_most(tmp_path: Path) -> None:
    runs = read(
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b"),
        write_run(tmp_path / "c", config={**CONFIG, "strategy": {"name": "pipeline", "stages": 2}, "seed": 3}),
    )
    differences = find_differences(runs)
    assert [difference.key for difference in differences] == ["strategy.name", "seed", "strategy.stages"]
    assert describe_runs(runs, differences) == ["", "", "strategy=pipeline"]
