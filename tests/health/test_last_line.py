from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distrain.health import last_line


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv(last_line.LAUNCHER, raising=False)
    return tmp_path / "error.json"


def failure(file: Path) -> ProcessFailure:
    return ProcessFailure(0, 1, 2, str(file))


def test_torchrun_shows_the_line_in_its_last_ones(error_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    last_line.print_last_line("distrain: x=1: is wrong\x1b")
    assert capfd.readouterr().err == "distrain: x=1: is wrong\\x1b\n"
    shown = str(ChildFailedError("train.py", {0: failure(error_file)})).splitlines()
    assert "distrain: x=1: is wrong\\x1b" in "\n".join(shown[-3:])


def test_distrains_launcher_prints_it_itself(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(last_line.LAUNCHER, str(os.getppid()))
    last_line.print_last_line("distrain: rank 1 stopped because …", cause="distrain: rank 0 failed")
    # What comes later is a consequence.
    last_line.tell_launcher("distrain: gone")
    assert capfd.readouterr().err == ""
    assert last_line.told_line(failure(error_file).message) == "distrain: rank 0 failed"


def test_a_rank_whose_launcher_has_ended_prints_it(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(last_line.LAUNCHER, str(os.getpid()))
    last_line.print_last_line("distrain: no")
    assert capfd.readouterr().err == "distrain: no\n"


def test_a_file_that_can_not_be_written_loses_no_line(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(last_line.LAUNCHER, str(os.getppid()))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file / "gone" / "error.json"))
    last_line.print_last_line("distrain: no")
    assert capfd.readouterr().err == "distrain: no\n"


def test_what_the_user_knows_already_is_not_told_again(error_file: Path) -> None:
    last_line.tell_launcher("distrain: stopped by SIGINT at step 3, saved")
    assert last_line.told_line(failure(error_file).message) == ""
    assert json.loads(error_file.read_text())["message"]["message"] == "distrain: stopped by SIGINT at step 3, saved"


@pytest.mark.parametrize("message", ["text", None, {}, {"extraInfo": 1}, {"extraInfo": {"distrain_line": 1}}])
def test_another_programs_file_tells_nothing(message: object) -> None:
    assert last_line.told_line(message) is None
