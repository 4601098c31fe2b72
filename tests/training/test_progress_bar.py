"""The live line of a training: its phases, its width, and what replaces it at the end."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrain.files.live_text import display_width
from distrain.health.activity import RankActivity
from distrain.training import progress_bar
from distrain.training.progress_bar import ProgressBar, shows_bar
from tests.harness import HANG_SECONDS
from tests.tools.comparison.runs import SUMMARY
from tests.training.test_callbacks import EPOCH, STEP, VALIDATED, Terminal, trainer


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress_bar, "terminal_size", lambda: (120, 24))


def training(stream: io.StringIO, *, compiles: bool = False, **progress: int) -> tuple[ProgressBar, Any, RankActivity]:
    """The line of a run of 20 steps in 2 epochs that has begun, and what it looks at."""
    run, activity = trainer(**progress), RankActivity()
    run.config.trainer.compile = compiles
    line = ProgressBar(stream=stream)
    line.follow(activity)
    activity.phase = "training"
    line.on_fit_start(run)
    return line, run, activity


def test_each_phase_is_named() -> None:
    line, run, activity = training(Terminal(), compiles=True)
    assert line.text(100).startswith("epoch 1/2  compiling   ░")
    run.progress.step = 5
    assert line.text(100).startswith("epoch 1/2  training    ██")
    activity.phase, activity.batches = "evaluation", (3, 40)
    assert line.text(100).startswith("epoch 1/2  evaluating 3/40  ██")
    activity.phase = "saving"
    assert "  saving  " in line.text(100)
    activity.phase, run.progress.step, run.progress.epoch = "finishing", 20, 2
    shown = line.text(100)
    assert shown.startswith("epoch 2/2  finishing")
    assert "left" not in shown


def test_before_training_the_line_says_what_happens_and_for_how_long() -> None:
    line = ProgressBar(stream=Terminal())
    line.say("loading data")
    try:
        assert line.text(100) == "loading data 0:00"
        activity = RankActivity()
        activity.phase = "set-up"
        line.follow(activity)
        assert line.text(100) == "setting up 0:00"
    finally:
        line.close()


def test_a_phase_that_lasts_shows_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    line, _, activity = training(Terminal())
    activity.phase = "saving"
    line.text(100)
    now = time.monotonic()
    monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=lambda: now + 65))
    assert "  saving 1:05  " in line.text(100)


def test_what_matters_less_is_left_out_of_a_narrow_terminal() -> None:
    line, run, _ = training(Terminal())
    line.on_log(run, {**STEP, "speed/bytes_sent_per_step": 44_000.0, "speed/compression_ratio": 28.44})
    run.progress.step = 5
    line._began -= 50
    wide = line.text(200)
    for part in ("25%", "5/20", "2:30 left", "loss 0.3457", "accuracy 0.876", "12,346 images/s", "communication 12%"):
        assert part in wide, part
    assert wide.endswith("sent 44 kB (28.4x less)")
    shown = line.text(79)
    assert "█" in shown
    assert "loss 0.3457" in shown
    assert "accuracy 0.876" in shown
    assert line.text(40) == "epoch 1/2  training     25%  2:30 left"
    for width in range(1, 200):
        assert display_width(line.text(width)) <= width


def test_the_line_of_a_resumed_run_counts_the_time_left_from_its_step() -> None:
    line, run, _ = training(Terminal(), step=15, epoch=1)
    assert "left" not in line.text(100)
    run.progress.step = 16
    line._began -= 10
    shown = line.text(100)
    assert shown.startswith("epoch 2/2")
    assert "80%" in shown
    assert "0:40 left" in shown


def test_a_thread_redraws_the_line_and_epochs_stand_above_it() -> None:
    terminal = Terminal()
    line, run, _ = training(terminal)
    line.say("loading data")
    deadline = time.monotonic() + HANG_SECONDS
    while "epoch 1/2  training" not in terminal.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.progress.epoch = 1
    line.on_epoch_end(run, VALIDATED)
    line.on_epoch_end(run, EPOCH)
    line.close()
    line.close()
    assert "epoch 1/2  loss 0.4568  accuracy 0.8123  val loss 0.5679  val accuracy 0.7901\n" in terminal.getvalue()
    assert "epoch 1/2  loss 0.4568  accuracy 0.8123\n" in terminal.getvalue()
    assert terminal.last() == ""


def test_a_table_takes_the_place_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = ProgressBar()
    line.say("training")
    line.end(SUMMARY, Path("runs/first"))
    last = terminal.getvalue().rpartition("\x1b[K")[2].split("\n")
    assert last[0] == ""
    assert last[1].split() == ["test", "accuracy", "0.8500,", "loss", "0.5000"]
    assert last[-2].split() == ["files", "runs/first"]


def test_a_line_that_is_not_shown_does_nothing() -> None:
    terminal = Terminal()
    line = ProgressBar(shown=False, stream=terminal)
    line.say("loading data")
    line.close()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("mode", "terminal", "shown"),
    [("auto", True, True), ("auto", False, False), ("bar", False, True), ("lines", True, False), ("off", True, False)],
)
def test_the_line_is_shown_in_a_terminal(
    mode: str, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    assert shows_bar(mode) is shown
