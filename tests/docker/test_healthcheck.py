"""The image's health check needs a running rank and a growing log."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import LAUNCH

HEALTH = runpy.run_path(str(LAUNCH.parent / "docker" / "healthcheck.py"))
problem: Callable[..., str | None] = HEALTH["problem"]
NOW = 1_000_000.0


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    for pid, words in {
        "1": ["/opt/distrain/bin/python3", "/opt/distrain/bin/torchrun", "/app/launch/train.py"],
        "7": ["/opt/distrain/bin/python3", "-u", "/app/launch/train.py", "strategy=ddp"],
    }.items():
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cmdline").write_text("\0".join(words))
    return tmp_path / "proc"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    log = tmp_path / "runs" / "one" / "logs" / "rank_0.log"
    log.parent.mkdir(parents=True)
    log.touch()
    os.utime(log, (NOW - 60, NOW - 60))
    return tmp_path / "runs"


def test_healthy_while_a_rank_runs_and_its_log_grows(proc: Path, runs: Path) -> None:
    assert problem(NOW, proc, runs) is None


def test_healthy_with_a_rank_of_the_installed_command(proc: Path, runs: Path) -> None:
    (proc / "7" / "cmdline").write_text("\0".join(["/opt/distrain/bin/python3", "-u", "-m", "distrain", "train"]))
    assert problem(NOW, proc, runs) is None


def test_unhealthy_when_only_the_launcher_is_left(proc: Path, runs: Path) -> None:
    (proc / "7" / "cmdline").unlink()
    assert problem(NOW, proc, runs) == "no rank runs"


def test_unhealthy_when_nothing_was_logged_for_long(proc: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem(NOW + 3600, proc, runs) == "nothing was logged for 30 minutes"
    monkeypatch.setenv("HEALTH_MINUTES", "90")
    assert problem(NOW + 3600, proc, runs) is None
