"""A sweep's jobs: their names, and how each ends independently of the others."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrain.tools.launching import jobs as jobs_module
from distrain.tools.launching.jobs import (
    DONE,
    FAILED,
    NOT_RUN,
    STOPPED,
    TIMED_OUT,
    Job,
    JobResult,
    JobRunner,
    job_array_lines,
    make_jobs,
)
from tests.tools.launching.helpers import STUBBORN, is_running, program, wait_until

#: Does what `mode=` says, in the folder that `run_dir=` names.
TRAINING = """
import json, os, pathlib, sys, time
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = pathlib.Path(given["run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
mode = given["mode"]
print("training", mode, flush=True)
if mode == "reported":
    print("distrain: rank 1 on b failed at step 3: bad luck", file=sys.stderr)
    print("a report of the launcher")
    sys.exit(1)
if mode == "report":
    (folder / "failure.json").write_text(json.dumps({"rank": 1, "host": "b", "step": 3, "error": "worse luck"}))
    sys.exit(1)
if mode == "stopped":
    (folder / "stopped.json").write_text(json.dumps({"reason": "trainer.max_minutes", "step": 7, "exit_code": 75}))
    sys.exit(75)
if mode == "crash":
    raise ZeroDivisionError
if mode == "launched":
    print("ValueError: in a rank")
    print("E1122 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 1) local_rank: 0")
    print("=" * 60)
    sys.exit(1)
if mode == "hang":
    time.sleep(600)
if mode != "silent":
    (folder / "summary.json").write_text(json.dumps({"val_accuracy": float(mode), "wall_seconds": 1.5}))
"""


def runner(start: list[str], **changes: Any) -> JobRunner:
    return JobRunner(start, **{"parallel": 2, "minutes": None, "grace_seconds": 0.2, **changes})


def jobs(tmp_path: Path, *modes: str) -> list[Job]:
    return make_jobs([[f"mode={mode}"] for mode in modes], 0, [], tmp_path / "sweep")


def run(tmp_path: Path, *modes: str, **changes: Any) -> list[JobResult]:
    start = program(tmp_path / "training.py", TRAINING)
    results, code = runner(start, **changes).run(jobs(tmp_path, *modes))
    assert code == 0
    return results


def test_job_is_named_by_its_number_and_its_values(tmp_path: Path) -> None:
    overrides = [["strategy=ddp", "compression=fp16", "+x=a/b"], ["strategy=ddp", "compression=none", "+x=[1,2]"]]
    first, second = make_jobs(overrides, 4, ["strategy"], tmp_path)
    assert first.name == "004_compression=fp16,x=a_b"
    assert first.swept == {"compression": "fp16", "x": "a/b"}
    assert second.folder == tmp_path / "005_compression=none,x=_1,2_"
    assert first.arguments == ["strategy=ddp", "compression=fp16", "+x=a/b", f"run_dir='{first.folder}'"]


def test_names_are_short_and_unique(tmp_path: Path) -> None:
    first, second = make_jobs([[f"key={'x' * 300}{end}"] for end in "ab"], 0, [], tmp_path)
    assert len(first.name) <= 100
    assert first.name != second.name


def test_lines_for_a_job_array_are_quoted_for_a_shell(tmp_path: Path) -> None:
    sweep_jobs = make_jobs([["a=[1,2]", "b='x y'"], ["a=3", "b=z"]], 0, [], tmp_path)
    assert [shlex.split(line) for line in job_array_lines(sweep_jobs).splitlines()] == [
        job.arguments for job in sweep_jobs
    ]


def let_an_hour_pass(monkeypatch: pytest.MonkeyPatch, when: Callable[[], object]) -> None:
    """Lets the runner's clock jump as soon as a condition holds: no limit is too short for a busy machine then."""
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (3600 if when() else 0))
    monkeypatch.setattr(jobs_module, "time", clock)


def test_failed_and_hanging_jobs_do_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    # The hanging job takes one of two places, so the last one ends when all others have.
    let_an_hour_pass(monkeypatch, lambda: any("005_" in line and "starts" not in line for line in lines))
    results = run(tmp_path, "0.1", "reported", "0.2", "hang", "0.3", "0.4", minutes=10, log=lines.append)
    assert [result.status for result in results] == [DONE, FAILED, DONE, TIMED_OUT, DONE, DONE]
    assert [result.summary.get("val_accuracy") for result in results] == [0.1, None, 0.2, None, 0.3, 0.4]
    assert results[1].reason == "rank 1 on b failed at step 3: bad luck"
    assert results[3].reason == "ended after 10 minutes; it can be resumed from its newest checkpoint"


def test_reason_is_the_runs_report_or_else_its_last_line(tmp_path: Path) -> None:
    report, crash, silent, launched = run(tmp_path, "report", "crash", "silent", "launched")
    assert report.reason == "rank 1 on b at step 3: worse luck"
    assert crash.reason == "ZeroDivisionError"
    assert launched.reason == "ValueError: in a rank"
    assert silent.reason == "exited with code 0 but wrote no summary.json"
    assert {report.status, crash.status, silent.status} == {FAILED}


def test_job_that_stopped_by_itself_did_not_fail(tmp_path: Path) -> None:
    result = run(tmp_path, "stopped")[0]
    assert (result.status, result.reason) == (STOPPED, "trainer.max_minutes at step 7; it saved its state")


@pytest.mark.parametrize("age", [3600, 0, -3600])
def test_report_of_an_earlier_attempt_is_ignored_whatever_the_clock_says(tmp_path: Path, age: float) -> None:
    run(tmp_path, "report")
    job = jobs(tmp_path, "report")[0]
    os.utime(job.folder / "failure.json", (time.time() - age,) * 2)
    start = program(tmp_path / "crash.py", "raise KeyError('new')")
    assert runner(start).run([job])[0][0].reason == "KeyError: 'new'"


def test_a_clock_that_is_set_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(time.time(), 3600)
    monkeypatch.setattr(time, "time", lambda: next(hours))
    assert run(tmp_path, "0.5")[0].seconds < 600


def test_output_is_written_to_the_jobs_folder(tmp_path: Path) -> None:
    result = run(tmp_path, "0.5")[0]
    assert (result.job.folder / "output.log").read_text() == "training 0.5\n"


def test_finished_job_is_not_run_again(tmp_path: Path) -> None:
    run(tmp_path, "0.5")
    again = run(tmp_path, "0.5")[0]
    assert (again.status, again.seconds, again.summary["val_accuracy"]) == (DONE, 1.5, 0.5)
    assert (again.job.folder / "output.log").read_text() == "training 0.5\n"


def test_folder_of_another_sweeps_job_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "0.5")
    start = program(tmp_path / "training.py", TRAINING)
    other = make_jobs([["seed=1", "mode=0.5"]], 0, ["seed"], tmp_path / "sweep")
    result = runner(start).run(other)[0][0]
    assert (result.status, result.summary) == (NOT_RUN, {})
    assert result.reason.endswith("holds a training with other settings; name another sweep.folder")


def test_jobs_run_in_parallel(tmp_path: Path) -> None:
    """Each of two jobs waits for the other to start."""
    both = f"""
import pathlib, sys, time
pathlib.Path({str(tmp_path)!r}, sys.argv[1].partition("=")[2]).touch()
while not all(pathlib.Path({str(tmp_path)!r}, name).exists() for name in ("one", "two")):
    time.sleep(0.02)
"""
    start = program(tmp_path / "both.py", both)
    results, _ = runner(start, minutes=5).run(jobs(tmp_path, "one", "two"))
    assert [result.reason for result in results] == ["exited with code 0 but wrote no summary.json"] * 2


def test_job_that_ignores_sigterm_is_killed_with_its_descendants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    let_an_hour_pass(monkeypatch, pid_file.exists)
    start = [
        *program(tmp_path / "stubborn.py", STUBBORN.replace("len(sys.argv) == 2", "sys.argv[2] != 'descendant'")),
        str(pid_file),
    ]
    assert runner(start, minutes=10).run(jobs(tmp_path, "x"))[0][0].status == TIMED_OUT
    assert not is_running(int(pid_file.read_text()))


def test_termination_signal_ends_running_jobs_and_starts_no_more(tmp_path: Path) -> None:
    start = program(tmp_path / "training.py", TRAINING)
    sweep_jobs = jobs(tmp_path, "0.1", "hang", "0.2")
    log = sweep_jobs[1].folder / "output.log"

    def interrupt() -> None:
        wait_until(lambda: log.exists() and log.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    results, code = runner(start, parallel=1).run(sweep_jobs)
    assert code == 128 + signal.SIGTERM
    assert [(result.status, result.reason) for result in results] == [
        (DONE, ""),
        (FAILED, "ended with the sweep"),
        (NOT_RUN, "the sweep ended before"),
    ]
