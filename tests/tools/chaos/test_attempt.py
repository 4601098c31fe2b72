"""Only what one start of a command has written counts, and leaving the attempt kills all its processes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from distrain.tools.chaos.attempt import Attempt
from distrain.tools.chaos.launchers import CommandLauncher

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)


def start(folder: Path, program: str) -> Attempt:
    return Attempt(CommandLauncher(f"{{python}} -c '{program}' {{keys}}", 1), [], folder, folder / "output.log")


def test_only_what_this_attempt_wrote_counts(tmp_path: Path) -> None:
    tmp_path.joinpath("logs").mkdir()
    for path in (tmp_path / "output.log", tmp_path / "logs" / "rank_0.log"):
        path.write_text("before\n")
    rows = tmp_path / "metrics.jsonl"
    rows.write_text(json.dumps({"kind": "step", "step": 9, "time": time.time() - 1}) + "\n")
    failure = tmp_path / "failure.json"
    failure.write_text("{}")
    # By a clock that has been set back since.
    os.utime(failure, (time.time() + 3600,) * 2)
    with start(tmp_path, 'print("distrain: now"); print("later")') as attempt:
        assert attempt.exit_codes() == [0]
        assert attempt.has_ended()
        assert attempt.output() == "distrain: now\nlater\n"
        assert attempt.last_message() == "distrain: now"
        assert attempt.rank0_log() == ""
        assert attempt.newest_step() is None
        assert attempt.read_report("failure.json") is None
        with rows.open("a") as file:
            file.write(json.dumps({"kind": "step", "step": 2, "time": time.time()}) + "\n")
            file.write(json.dumps({"kind": "epoch", "step": 2, "time": time.time()}) + "\n")
            file.write('{"kind": "step", "st')
        assert attempt.newest_step() == 2
        failure.write_text('{"rank": 1}')
        assert attempt.read_report("failure.json") == {"rank": 1}
        assert attempt.read_report("stopped.json") is None


def test_remaining_processes_are_killed_on_leaving(tmp_path: Path) -> None:
    with start(tmp_path, 'import subprocess; subprocess.Popen(["sleep", "60"])') as attempt:
        assert attempt.exit_codes() == [0]
        assert len(attempt.remaining_pids(0)) == 1
    assert attempt.all_pids() == []
