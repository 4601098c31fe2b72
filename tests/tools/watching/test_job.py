"""The state of a run by what its folder holds and whether its process exists."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distrain.health.process import PlacedProcess, Process
from distrain.health.run_status import RunStatus
from distrain.tools.watching.job import SILENT_SECONDS, to_json
from tests.tools.comparison.runs import SUMMARY
from tests.tools.watching.jobs import ELSEWHERE, GONE, NOW, rank, read, reader, status, write_job

HERE = PlacedProcess.current()
KILLED = {"writer": dataclasses.replace(HERE, process=GONE)}
FAILURE = {"rank": 1, "host": "host1", "step": 20, "error": "OSError: no\x1b[31m room"}


def ended_at(seconds: float) -> dict[str, Any]:
    return {**SUMMARY, "end": datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")}


@pytest.mark.parametrize(
    ("content", "reports", "state", "code", "reason"),
    [
        (status(), {}, "running", None, ""),
        # What an earlier start has left says nothing while this one goes on.
        (status(), {"summary": SUMMARY, "stopped": {"reason": "SIGTERM"}}, "running", None, ""),
        (status(), {"failure": FAILURE}, "failed", 1, "rank 1, host host1, step 20: OSError: no\x1b[31m room"),
        (status(running=False), {"summary": SUMMARY}, "ended", 0, ""),
        (status(running=False), {"stopped": {"reason": "SIGTERM"}}, "stopped", 75, "by SIGTERM; the same command"),
        (status(running=False), {}, "killed", 1, "left no report"),
        (status(**KILLED), {}, "killed", 1, "the process of rank 0 on host0 is gone"),
        (status(**KILLED), {"failure": FAILURE}, "failed", 1, "rank 1"),
        (status(**KILLED), {"summary": ended_at(time.time())}, "ended", 0, ""),
        (status(**KILLED), {"summary": ended_at(time.time() - 36000)}, "killed", 1, ""),
        (status(**KILLED), {"summary": SUMMARY | {"end": "\x1b never"}}, "killed", 1, ""),
        (status(writer=ELSEWHERE), {}, "running", None, ""),
        (status(writer=ELSEWHERE, time=NOW - 2 * SILENT_SECONDS), {}, "silent", None, "no sign of life from"),
        (
            status(ranks=[rank(n, idle_seconds=31.0) for n in range(3)]),
            {},
            "hanging",
            None,
            "no rank has made progress for 3",
        ),
        (status(ranks=[rank(0, idle_seconds=31.0), rank(1)]), {}, "running", None, ""),
        (status(ranks=[rank(0, idle_seconds=31.0, phase="evaluation")]), {}, "running", None, ""),
        (status(ranks=[rank(0, idle_seconds=301.0, phase="evaluation")]), {}, "hanging", None, ""),
        (status(ranks=[rank(0, idle_seconds=151.0, phase="set-up")]), {}, "hanging", None, ""),
        # The first step compiles, which takes long.
        (status(ranks=[rank(0, idle_seconds=31.0)], compiles=True, first_step=20), {}, "running", None, ""),
        (None, {}, "starting", None, "there is no status.json yet"),
        (None, {"summary": SUMMARY}, "ended", 0, ""),
    ],
)
def test_state(
    content: RunStatus | None, reports: dict[str, Any], state: str, code: int | None, reason: str, tmp_path: Path
) -> None:
    job = read(write_job(tmp_path / "run", content, **reports))
    assert (job.state, job.exit_code) == (state, code)
    assert reason in job.reason
    assert job.problems == []
    assert json.loads(to_json(job))["state"] == state


def test_a_run_without_a_status_goes_on_as_long_as_the_process_that_claims_its_folder(tmp_path: Path) -> None:
    run = write_job(tmp_path / "run", None)
    claim = run / "checkpoints" / ".claim"
    claim.parent.mkdir()
    for pid, host, state in (
        (os.getpid(), socket.gethostname(), "running"),
        (GONE.pid, socket.gethostname(), "starting"),
        (os.getpid(), "elsewhere", "starting"),
        ("x", socket.gethostname(), "starting"),
    ):
        claim.write_text(json.dumps({"name": "x", "host": host, "pid": pid}))
        assert read(run).state == state


def test_what_was_logged_last_is_taken_from_the_metrics_if_the_status_has_none(tmp_path: Path) -> None:
    job = read(write_job(tmp_path / "run", None))
    assert (job.values["train/loss"], job.epoch_values["epoch/val_accuracy"]) == (0.2, 0.8)
    assert read(write_job(tmp_path / "other", status())).values["train/loss"] == 0.5


def test_a_process_that_a_signal_has_stopped_is_not_called_running(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            writer = dataclasses.replace(HERE, process=Process.of(process.pid))
            run = write_job(tmp_path / "run", status(writer=writer))
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert read(run).state == "suspended"
        finally:
            process.kill()
    assert read(run).state == "killed"


def test_a_run_elsewhere_whose_clock_is_wrong_is_known_by_its_changing_status(tmp_path: Path) -> None:
    old = {"writer": ELSEWHERE, "time": NOW - 1e6}
    run = write_job(tmp_path / "run", status(**old))
    watched = reader(run)
    assert watched.read().state == "silent"
    write_job(run, status(**old, number=8))
    assert watched.read().state == "running"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "status.json is not JSON"),
        ("[" * 100_000, "status.json is not JSON"),
        ("{}", "status.json has no valid writer"),
        (" " * ((1 << 22) + 1), "status.json has more than"),
        (json.dumps({**status().to_json(), "step": True}), "no valid step"),
        (json.dumps({**status().to_json(), "step": 10**30}), "no valid step"),
        (json.dumps({**status().to_json(), "time": "now"}), "no valid time"),
        (json.dumps({**status().to_json(), "time": float("nan")}), "no valid time"),
        (json.dumps({**status().to_json(), "running": 1}), "no valid running"),
        (json.dumps({**status().to_json(), "host": 1}), "no valid host"),
        (json.dumps({**status().to_json(), "ranks": {}}), "no valid ranks"),
        (json.dumps({**status().to_json(), "ranks": [1]}), "no valid ranks"),
        (json.dumps(status(ranks=[rank(0, place={"data": "x"})]).to_json()), "no valid data"),
        (json.dumps({**status().to_json(), "values": {str(n): n for n in range(1001)}}), "no valid values"),
    ],
)
def test_a_status_that_no_run_wrote_is_a_problem_in_one_line(content: str, problem: str, tmp_path: Path) -> None:
    job = read(write_job(tmp_path / "run", content))
    assert (job.state, job.status) == ("starting", None)
    assert len(job.problems) == 1
    assert problem in job.problems[0]


def test_a_status_is_read_as_it_was_written() -> None:
    placed = [rank(0, place={"data": 0, "tensor": 1})]
    for written in (status(ranks=placed), status(writer=ELSEWHERE, values={"train/loss": None})):
        assert RunStatus.from_json(json.loads(json.dumps(written.to_json()))) == written
    # An older run says no places.
    older = status().to_json()
    for each in older["ranks"]:
        del each["place"]
    assert RunStatus.from_json(older) == status()


def test_no_link_is_followed_and_no_pipe_is_read(tmp_path: Path) -> None:
    run = write_job(tmp_path / "run", None)
    (tmp_path / "other").write_text(json.dumps(status().to_json()))
    (run / "status.json").symlink_to(tmp_path / "other")
    assert "is a link" in read(run).problems[0]
    (run / "status.json").unlink()
    os.mkfifo(run / "status.json")
    assert "named pipe" in read(run).problems[0]
