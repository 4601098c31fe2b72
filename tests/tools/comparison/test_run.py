"""A broken or unfinished run is shown as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.tools.comparison.run import EMPTY, FAILED, FINISHED, STOPPED, UNFINISHED, shortened
from tests.tools.comparison.runs import ROWS, read, step_row, write_run


def test_a_finished_run_has_no_problems(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a"))
    assert (run.state, run.reason, run.problems) == (FINISHED, "", [])
    assert run.config is not None
    assert run.config["optimizer.lr"] == "0.1"
    assert run.training_seconds == pytest.approx(0.4)
    assert run.number("time_share.communication") == 0.3


def test_a_run_that_failed_says_where_and_why(tmp_path: Path) -> None:
    failure = {"rank": 1, "host": "h", "step": 7, "error": "Boom:\nno"}
    (run,) = read(write_run(tmp_path / "a", failure=failure))
    assert (run.state, run.reason) == (FAILED, "rank 1, host h, step 7: Boom: no")
    (run,) = read(write_run(tmp_path / "mesh", failure={**failure, "place": {"data": 0, "tensor": 1}}))
    assert run.reason == "rank 1 (data 0, tensor 1), host h, step 7: Boom: no"
    (run,) = read(write_run(tmp_path / "b", failure={}))
    assert (run.state, run.reason) == (FAILED, "")


def test_a_run_that_stopped_says_what_asked_for_it(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", summary=None, stopped={"reason": "SIGTERM", "step": 9}))
    assert (run.state, run.reason) == (STOPPED, "by SIGTERM at step 9; the same command resumes it")


def test_a_run_without_a_summary_is_not_finished(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", summary=None))
    assert run.state == UNFINISHED
    assert "last row at step 40" in run.reason


def test_a_run_that_has_logged_nothing_has_no_results(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", summary=None, rows=None))
    assert (run.state, run.reason) == (EMPTY, "nothing is logged yet")


def test_a_sweeps_table_says_why_a_job_has_no_results(tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "000_x"
    job.mkdir(parents=True)
    (job / "overrides.txt").touch()
    (tmp_path / "sweep" / "results.csv").write_text("job,status,reason\n000_x,failed,exit code 2\n")
    (run,) = read(tmp_path / "sweep")
    assert run.reason == "the sweep says failed: exit code 2"


def test_a_run_too_short_to_log_steps_has_the_seconds_of_its_summary(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", rows=[]))
    assert run.training_seconds == pytest.approx(0.4)
    (run,) = read(write_run(tmp_path / "b", summary={}, rows=[]))
    assert run.training_seconds is None


def test_a_time_that_no_clock_shows_is_left_out(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path / "a", summary=None, rows=[{**step_row(1, 1.0), "time": 1e300}]))
    assert run.reason.endswith("last row at step 1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"a: &x [1]\nb: *x\n"),
        ("config.yaml", b"a: !!python/object/apply:os.system [id]\n"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"[" * 1000),
        ("config.yaml", b"a: " + b"x" * (1 << 18)),
        ("summary.json", b"{"),
        ("summary.json", b"[" * 100_000),
        ("summary.json", b'{"steps": 1, "steps": 2}'),
        ("summary.json", b"\xff"),
        ("failure.json", b"no"),
    ],
)
def test_a_file_that_no_run_writes_is_named_and_the_rest_is_shown(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content)
    (run,) = read(folder)
    (problem,) = run.problems
    assert problem.startswith(name)
    assert run.metrics.curves["train/loss"].rows == 4


def test_cut_lines_and_losses_that_are_not_finite_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", rows=[*ROWS, step_row(50, None)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    (run,) = read(folder)
    assert run.problems == [
        "metrics.jsonl: 1 line cut off or not valid, left out",
        "train/loss is not finite in 1 of 5 rows, first at step 50",
    ]


def test_long_text_loses_its_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 6) == "abc…jk"
