"""The command: what it prints in a terminal and elsewhere, when it ends, with which code, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distrain.cli.commands import watch
from tests.tools.comparison.runs import SUMMARY
from tests.tools.watching.jobs import ELSEWHERE, NOW, status, write_job


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(*arguments: str) -> int:
    try:
        watch.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_run_is_watched_until_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_job(folder / "run", status())
    later: list[dict[str, Any]] = [
        {"content": status()},
        {"content": status(values={"train/loss": 0.25})},
        {"content": status(running=False), "summary": SUMMARY},
    ]
    monkeypatch.setattr(time, "sleep", lambda _: write_job(run, **later.pop(0)))
    assert code_of("run") == 0
    assert later == []
    # A line for each change, none where nothing changed.
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("step 20/60, loss 0.5000, accuracy 0.7500")
    assert second.endswith("step 20/60, loss 0.2500")
    assert third.startswith("ended, ")


def test_in_a_terminal_the_screen_is_drawn_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run, terminal = write_job(folder / "run", status()), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(time, "sleep", lambda _: write_job(run, None, failure={"error": "no room"}))
    assert code_of("run") == 1
    before, _, after = terminal.getvalue().partition("\x1b[11A\r\x1b[J")
    assert before.count("\n") == 11
    assert "failed: no room" in after


@pytest.mark.parametrize(
    ("changes", "reports", "code"),
    [
        ({}, {}, 0),
        ({"running": False}, {"summary": SUMMARY}, 0),
        ({"running": False}, {"stopped": {"reason": "SIGTERM"}}, 75),
        ({"running": False}, {"failure": {"error": "x"}}, 1),
        ({"running": False}, {}, 1),
    ],
)
def test_once_prints_once_for_people_and_for_scripts(
    folder: Path, changes: dict[str, bool], reports: dict[str, object], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(folder / "000_a=1", status(**changes), **reports)
    assert code_of("once=true", "000_a=1") == code
    assert capsys.readouterr().out.startswith("000_a=1: ddp, 3 ranks\n")
    assert code_of("run='000_a=1'", "once=true", "json=true") == code
    (line,) = capsys.readouterr().out.splitlines()
    content = json.loads(line)
    assert content["exit_code"] == (None if code == 0 and not reports else code)
    assert [rank["step"] for rank in content["ranks"]] == [20, 20, 20]


def test_a_run_whose_host_has_another_time_is_looked_at_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = status(writer=ELSEWHERE, time=NOW - 1e6)
    run = write_job(folder / "run", late)
    monkeypatch.setattr(time, "sleep", lambda _: write_job(run, dataclasses.replace(late, number=8)))
    assert code_of("run", "once=true", "json=true") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_ctrl_c_ends_watching_and_not_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    write_job(folder / "run", status())
    monkeypatch.setattr(time, "sleep", interrupt)
    assert code_of("run") == 130


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RUN: name one run's folder"),
        (["a", "b"], "RUN: name one run's folder"),
        (["a", "run=b"], "RUN: name one run's folder"),
        (["nowhere"], "RUN=nowhere: there is no such folder"),
        (["empty"], "RUN=empty: is not a run's folder"),
        (["both"], "RUN=both: holds 2 runs; name one of them. The newest is both/b"),
        (["both/a", "every=0"], "every=0.0: must be at least 0.1"),
        (["both/a", "onse=true"], "did you mean once?"),
    ],
)
def test_what_is_no_single_run_is_refused(
    folder: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    write_job(folder / "both" / "a", status())
    time.sleep(0.01)
    write_job(folder / "both" / "b", status())
    assert code_of(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
