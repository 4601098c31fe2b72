"""What a user sees of a training: the first screen, the log, and what its summary says of where it comes from."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distrain
from distrain.cli import app, hydra_entry
from distrain.cli.commands import train as train_command
from distrain.config.schema import Config
from distrain.models.cnn import SimpleCNN
from tests.harness import run_ranks
from tests.runs import CONF, small
from tests.training.test_callbacks import Terminal


def train(config: Config) -> dict[str, Any]:
    return app.train(config)


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, and the same run resumed for a second one, on two ranks."""
    folder = tmp_path_factory.mktemp("starts") / "run"
    options = ("strategy=ddp", "trainer.memory_format=auto", f"run_dir={folder}")
    run_ranks(train, 2, small(*options, "trainer.epochs=1", "scheduler=constant", "trainer.progress=false"))
    (folder / "first.json").write_bytes((folder / "summary.json").read_bytes())
    run_ranks(train, 2, small(*options, "trainer.epochs=2", "scheduler=constant", "trainer.progress=lines"))
    return folder


def test_log_has_each_epoch_and_what_only_experts_read(two_starts: Path) -> None:
    log = (two_starts / "logs" / "rank_0.log").read_text()
    assert "INFO distrain.training.callbacks: epoch 1/1: loss " in log
    assert "INFO distrain.training.callbacks: epoch 2/2: loss " in log
    assert "an all-reduce has a latency of" in log
    assert "tried forward and backward passes" in log


def test_closing_line_counts_steps_and_time_of_this_start(two_starts: Path) -> None:
    log = (two_starts / "logs" / "rank_0.log").read_text()
    closing = [line for line in log.splitlines() if "images/s | compute" in line]
    assert " | 5 steps in " in closing[0]
    assert " | 5 of 10 steps in " in closing[1]


def test_in_a_terminal_a_live_line_says_what_happens_and_a_table_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    train(small(f"run_dir={tmp_path}", "trainer.epochs=1", "trainer.progress=auto"))
    assert "\rchecking 0:00" in terminal.getvalue()
    above, _, table = terminal.getvalue().rpartition("\x1b[K")
    assert "epoch 1/1  loss " in above
    assert "  test  " in table
    assert str(tmp_path) in table.splitlines()[-1]
    assert "test_accuracy" not in terminal.getvalue()
    # The log has what a file or a pipe would get.
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "epoch 1/1: loss " in log
    assert "test_accuracy " in log


@pytest.mark.parametrize(("progress", "said"), [("auto", "\r\x1b[Kstarting"), ("lines", ""), ("off", "")])
def test_a_terminal_is_told_at_once_that_the_training_starts(
    progress: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(app, "train", lambda _: None)
    train_command._task(hydra_entry.compose(CONF, "config", [f"trainer.progress={progress}"]))
    assert terminal.getvalue() == said


def test_summary_says_where_the_run_comes_from(two_starts: Path) -> None:
    first, second = (json.loads((two_starts / name).read_text()) for name in ("first.json", "summary.json"))
    assert (first["steps"], first["resumed_at_step"]) == (5, 0)
    assert (second["steps"], second["resumed_at_step"]) == (10, 5)
    for summary in (first, second):
        start, end = (datetime.datetime.fromisoformat(summary[key]) for key in ("start", "end"))
        assert start.tzinfo is not None
        assert start <= end < start + datetime.timedelta(hours=1)
        assert summary["versions"] == {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "distrain": distrain.__version__,
        }
        assert summary["command"]
        assert "git" in summary
        count = sum(parameter.numel() for parameter in SimpleCNN(3, 4, (8, 8)).parameters())
        assert summary["parameters"] == {"count": count, "trainable": count}
        assert summary["best_epoch"] * 5 == summary["best_step"]
        assert summary["best_val_accuracy"] >= summary["val_accuracy"]
