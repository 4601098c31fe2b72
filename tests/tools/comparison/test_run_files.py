"""Runs are found below folders, and nothing outside a folder is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.files.contained_folder import ContainedFolder
from distrain.tools.comparison.run import read_run
from distrain.tools.comparison.run_files import MOST_RUNS, find_runs
from tests.tools.comparison.runs import write_run


def found(*paths: Path) -> list[str]:
    return [str(run.path.resolve()) for run in find_runs([str(path) for path in paths]).runs]


def test_runs_are_found_in_the_order_of_the_command_line_and_of_names(tmp_path: Path) -> None:
    b, a = write_run(tmp_path / "day" / "b"), write_run(tmp_path / "day" / "a")
    deep = write_run(tmp_path / "outputs" / "2026-11-29" / "04-00-00_sweep" / "000_optimizer.lr=0.1")
    assert found(tmp_path / "outputs", b, tmp_path) == [str(deep), str(b), str(a)]


def test_a_job_without_results_is_found_and_other_folders_are_not(tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "001_x=1"
    job.mkdir(parents=True)
    (job / "overrides.txt").write_text("x=1")
    (tmp_path / "sweep" / "notes").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("a: 1")
    write_run(tmp_path / ".hidden")
    assert found(tmp_path) == [str(job)]


def test_a_link_in_a_searched_folder_is_not_followed_but_a_named_one_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "elsewhere" / "run")
    inside = write_run(tmp_path / "runs" / "inside")
    (tmp_path / "runs" / "linked").symlink_to(run)
    assert found(tmp_path / "runs") == [str(inside)]
    (notice,) = find_runs([str(tmp_path / "runs")]).notices
    assert notice.endswith("1 link is not followed; name a run behind a link itself")
    assert found(tmp_path / "runs" / "linked") == [str(run)]


@pytest.mark.parametrize("stray", ["link", "dangling", "pipe", "folder", "proc"])
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_a_strange_thing_in_the_place_of_a_file_is_a_problem_of_the_run(tmp_path: Path, stray: str, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"kind": "step", "step": 1, "train/loss": 123456.75}\n')
    folder = write_run(tmp_path / "run")
    path = folder / name
    path.unlink()
    targets = {"link": secret, "dangling": tmp_path / "nothing", "proc": Path("/proc/self/environ")}
    if stray in targets:
        path.symlink_to(targets[stray])
    elif stray == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    run = read_run(find_runs([str(folder)]).runs[0])
    assert any(name in problem for problem in run.problems), run.problems
    assert all(curve.highest < 123456 for curve in run.metrics.curves.values())
    assert "123456.75" not in repr(run)


def test_a_folder_that_can_not_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = write_run(tmp_path / "inside")
    for name in ("locked1", "locked2"):
        (tmp_path / name).mkdir()
    names = ContainedFolder.names

    def refuse(self: ContainedFolder, name: str) -> list[str]:
        if "locked" in name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self.path / name))
        return names(self, name)

    monkeypatch.setattr(ContainedFolder, "names", refuse)
    runs = find_runs([str(tmp_path)])
    assert [run.path for run in runs.runs] == [inside]
    assert runs.notices == [f"{tmp_path}/locked1 can't be looked into: Permission denied, nor can 1 more"]


def test_what_is_no_folder_or_holds_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, problem in (("file", "not a folder"), ("none", "no such folder"), ("empty", "holds none")):
        with pytest.raises(ConfigError, match=problem) as refused:
            find_runs([str(tmp_path / name)])
        assert "\n" not in str(refused.value)


def test_more_runs_than_a_page_can_show_are_refused(tmp_path: Path) -> None:
    for number in range(MOST_RUNS + 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "overrides.txt").touch()
    with pytest.raises(ConfigError, match=f"more than {MOST_RUNS}"):
        find_runs([str(tmp_path)])


def test_a_broken_table_of_a_sweep_is_told_and_its_jobs_are_shown(tmp_path: Path) -> None:
    job = write_run(tmp_path / "sweep" / "000_x")
    (tmp_path / "sweep" / "results.csv").write_bytes(b"job,status\n\xff\n")
    runs = find_runs([str(tmp_path / "sweep")])
    assert [run.path for run in runs.runs] == [job]
    assert "results.csv" in runs.notices[0]
