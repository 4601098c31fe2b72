"""``nproc=N``: what is wrong is said in one line before ranks start, and the keys are no part of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.mistakes import MISTAKES
from distrain.cli.commands import doctor, evaluate, export, predict, train
from distrain.errors import EXIT_REFUSED
from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.launching.outcome import Outcome


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distrain"])
    for name in ("HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[LaunchSettings]:
    """What would have been started; nothing is."""
    settings: list[LaunchSettings] = []

    def note(launch: LaunchSettings, *_: Any) -> Outcome:
        settings.append(launch)
        return Outcome(0)

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(elastic, "run_ranks", note)
    monkeypatch.setattr("distrain.cli.hydra_entry.exit_now", leave)
    return settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="a mistake on a machine without a GPU is none with two")
@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_refused_in_one_line_before_ranks_start(
    arguments: str, started: list[LaunchSettings], capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments.split()
    with pytest.raises(SystemExit) as ended:
        train.main([word for word in ("nproc=2", "strategy=ddp") if not _is_given(word, words)] + words)
    printed = capfd.readouterr()
    assert ended.value.code == EXIT_REFUSED
    assert printed.out == ""
    assert printed.err.startswith("distrain: ")
    assert printed.err.count("\n") == 1
    assert MISTAKES[arguments] in printed.err
    assert not started


def _is_given(word: str, words: list[str]) -> bool:
    return any(given.partition("=")[0] == word.partition("=")[0] for given in words)


def test_a_correct_command_starts_ranks_without_training_itself(started: list[LaunchSettings], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["strategy=ddp", "nproc=2", "max_restarts=3", "run_dir=run"])
    assert ended.value.code == 0
    assert started == [LaunchSettings(nproc=2, max_restarts=3)]
    assert not (tmp_path / "run").exists()
    assert sys.argv == ["distrain", "strategy=ddp", "run_dir=run"]


def test_a_command_of_one_process_refuses_several(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        export.main(["nproc=2", "run=somewhere"])
    assert ended.value.code == EXIT_REFUSED
    assert "runs on one process; leave nproc out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (evaluate, ["nproc=2", "run=nowhere"], "run=nowhere: is not a folder"),
        (evaluate, ["nproc=2", "split=all", "run=nowhere"], "split=all: unknown choice"),
        (predict, ["nproc=2", "run=nowhere", "input=a.png"], "run=nowhere: is not a folder"),
        (doctor, ["nproc=2", "rank=1"], "rank=1: is for ranks that are started by hand"),
        (doctor, ["nproc=2", "wait=0"], "wait=0.0: must be greater than 0"),
        (doctor, ["nproc=2", "--", "env"], "nothing is examined then"),
    ],
)
def test_other_commands_check_first_too(
    command: Any, arguments: list[str], words: str, started: list[LaunchSettings], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == EXIT_REFUSED
    assert words in capfd.readouterr().err
    assert not started


def test_help_explains_the_keys(capfd: pytest.CaptureFixture[str]) -> None:
    train.main(["--help", "nproc"])
    assert "Ranks to start on this host" in capfd.readouterr().out


def test_a_slip_in_a_key_finds_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["max_restart=2"])
    assert "did you mean max_restarts" in capfd.readouterr().err
