"""Callbacks: plain lines where there is no terminal, what status.json holds, and a profiler trace if configured."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distrain.config.schema import EmaConfig, SwaConfig
from distrain.training.callbacks import Callback, EpochLog, PlainProgress, Profiler, StatusValues, default_callbacks
from tests.runs import small

STEP = {
    "train/loss": 0.34567,
    "train/accuracy": 0.8765,
    "speed/images_per_second": 12345.6,
    "time/communication": 0.123,
    "speed/bytes_sent_per_step": 0.0,
    "speed/compression_ratio": 1.0,
}
EPOCH = {"epoch/train_loss": 0.45678, "epoch/train_accuracy": 0.81234, "epoch/images_per_second": 23456.7}
VALIDATED = {**EPOCH, "epoch/val_loss": 0.56789, "epoch/val_accuracy": 0.79012}


def trainer(**progress: int) -> Any:
    """A stand-in with the attributes of a trainer that callbacks use: 20 steps in 2 epochs."""
    made = SimpleNamespace(
        total_steps=20,
        progress=SimpleNamespace(**{"step": 0, "epoch": 0, **progress}),
        config=SimpleNamespace(trainer=SimpleNamespace(epochs=2, ema=EmaConfig(), swa=SwaConfig())),
        task=SimpleNamespace(metrics=("accuracy",), validated=("accuracy",)),
        runtime=SimpleNamespace(world=SimpleNamespace(rank=0)),
        now=0.0,
    )
    made.report = SimpleNamespace(seconds=lambda: made.now)
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def last(self) -> str:
        """Current content of the live line."""
        return self.getvalue().rpartition("\r")[2].rstrip()


@pytest.mark.parametrize(
    ("sent", "ratio", "expected"),
    [
        (0.0, 1.0, ""),
        (1_234_567.0, 1.0, ", sent 1.23 MB"),
        (44_000.0, 28.44, ", sent 44 kB (28.4x less)"),
        (512.0, 1000.4, ", sent 512 B (1,000x less)"),
        (3e9, 2.0, ", sent 3 GB (2.0x less)"),
    ],
)
def test_the_bytes_that_a_rank_sends_per_step_are_shown(sent: float, ratio: float, expected: str) -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream=stream)
    shown = {**STEP, "speed/bytes_sent_per_step": sent, "speed/compression_ratio": ratio}
    watched = trainer(step=5)
    plain.on_fit_start(watched)
    watched.now = 10
    plain.on_log(watched, shown)
    assert stream.getvalue().rstrip("\n").endswith(f"communication 12%{expected}")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_one_line_per_epoch_is_logged(on_terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distrain"):
        EpochLog(on_terminal=on_terminal).on_epoch_end(trainer(epoch=1), VALIDATED)
    (record,) = caplog.records
    expected = "epoch 1/2: loss 0.4568, accuracy 0.8123 | validation: loss 0.5679, accuracy 0.7901 | 23,457 images/s"
    assert record.getMessage() == expected
    assert getattr(record, "file_only", False) is not on_terminal


def test_an_epoch_in_which_no_step_was_timed_tells_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    values = {name: value for name, value in VALIDATED.items() if name != "epoch/images_per_second"}
    with caplog.at_level(logging.INFO, logger="distrain"):
        EpochLog(on_terminal=True).on_epoch_end(trainer(epoch=1), values)
    assert caplog.messages[0].endswith("accuracy 0.7901")


# --- plain lines -----------------------------------------------------------------------------------------------------


def test_plain_lines_come_every_epoch_and_at_most_once_per_interval() -> None:
    stream, run = io.StringIO(), trainer()
    lines = PlainProgress(every_seconds=10, stream=stream)
    run.now = 5.0
    lines.on_fit_start(run)
    for now, step in ((14.0, 1), (15.0, 2), (20.0, 3), (25.0, 4)):
        run.now, run.progress.step = now, step
        lines.on_step_end(run)
        lines.on_log(run, STEP)
    run.now, run.progress.epoch = 30.0, 1
    lines.on_epoch_end(run, EPOCH)
    run.now, run.progress.step = 39.0, 5
    lines.on_log(run, STEP)
    lines.on_fit_end(run)
    figures = "loss 0.3457, accuracy 0.876, 12,346 images/s, communication 12%"
    assert stream.getvalue().splitlines() == [
        f"step 2/20: {figures}",
        f"step 4/20: {figures}",
    ]


# --- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "terminal", "expected"),
    [
        ("auto", True, [StatusValues, EpochLog]),
        ("auto", False, [StatusValues, EpochLog, PlainProgress]),
        ("bar", False, [StatusValues, EpochLog]),
        ("lines", True, [StatusValues, EpochLog, PlainProgress]),
        ("off", True, [StatusValues, EpochLog]),
        ("false", True, [StatusValues, EpochLog]),
    ],
)
def test_lines_are_printed_where_there_is_no_terminal_or_they_are_chosen(
    mode: str, terminal: bool, expected: list[type[Callback]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    options = small(f"trainer.progress={mode}").trainer
    assert [type(each) for each in default_callbacks(options, tmp_path, is_main=True)] == expected
    assert default_callbacks(options, tmp_path, is_main=False) == []


def test_progress_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(epoch=1)
    PlainProgress(every_seconds=0).on_log(run, STEP)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 0/20: loss 0.3457" in captured.err


# --- the profiler ----------------------------------------------------------------------------------------------------


def test_the_profiler_records_the_configured_steps_after_warmup(tmp_path: Path) -> None:
    options = small("trainer.profile_steps=2").trainer
    *_, profiler = default_callbacks(options, tmp_path, is_main=True)
    assert isinstance(profiler, Profiler)
    run = trainer()
    profiler.on_fit_start(run)
    for step in range(Profiler.warmup + 4):
        torch.full((step + 1, 3), 1.0).square()
        profiler.on_step_end(run)
    profiler.on_fit_end(run)
    (trace,) = (tmp_path / "tensorboard").glob("rank_0.*.pt.trace.json")
    recorded = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "aten::square"]
    assert [event["args"]["Input Dims"][0] for event in recorded] == [[6, 3], [7, 3]]


def test_the_base_class_does_nothing() -> None:
    nothing, run = Callback(), trainer()
    nothing.on_fit_start(run)
    nothing.on_step_end(run)
    nothing.on_log(run, STEP)
    nothing.on_epoch_end(run, EPOCH)
    nothing.on_fit_end(run)
