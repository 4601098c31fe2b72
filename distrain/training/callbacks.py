"""What may watch a run: the base class does nothing; progress and the profiler are built on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from distrain.checkpoint.progress import Progress
from distrain.config.schema import Config
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Task
from distrain.training.report import Report

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


class RunView(Protocol):
    """What callbacks see of a run; it is the trainer, and not theirs to change."""

    @property
    def config(self) -> Config:
        """The run's configuration."""

    @property
    def task(self) -> Task:
        """What the model is trained to do."""

    @property
    def runtime(self) -> Runtime:
        """This rank's surroundings."""

    @property
    def strategy(self) -> Strategy:
        """Holds the model."""

    @property
    def progress(self) -> Progress:
        """How far the run has come."""

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""

    @property
    def report(self) -> Report:
        """Sums and times of the steps."""


class Callback:
    """Called by the trainer, on every rank, at fixed points. Subclass it and pass it to the run."""

    def on_fit_start(self, run: RunView) -> None:
        """Before the first step."""

    def on_step_end(self, run: RunView) -> None:
        """After each update; runs in the hot loop."""

    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        """After metrics of the last steps were summed over the ranks."""

    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        """After an epoch's evaluation."""

    def on_fit_end(self, run: RunView) -> None:
        """After the last step, also when it failed."""


class ProgressBar(Callback):
    """One live line: epoch, loss, accuracy, images/s, time left, share of time in communication."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bar: Any = None

    def on_fit_start(self, run: RunView) -> None:
        """Draws the empty bar."""
        self._bar = tqdm(
            desc=_title(run),
            total=run.total_steps,
            initial=run.progress.step,
            unit="step",
            file=self._stream or sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
            smoothing=0.05,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def on_step_end(self, run: RunView) -> None:
        """Moves the bar on; tqdm redraws a few times a second at most."""
        self._bar.update()

    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        """Shows the newest figures."""
        self._bar.set_description_str(_title(run), refresh=False)
        self._bar.set_postfix_str(
            f"loss {values['train/loss']:.4f}, {_metrics(run, values, 'train/', 3)}, "
            f"{values['speed/images_per_second']:,.0f} img/s, comm {values['time/communication']:.0%}{_sent(values)}",
            refresh=False,
        )

    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        """Leaves one line an epoch above the bar."""
        self._bar.set_description_str(_title(run), refresh=False)
        tqdm.write(_epoch_line(run, values), file=self._stream or sys.stderr)

    def on_fit_end(self, run: RunView) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class PlainProgress(Callback):
    """The same figures as plain lines, for files and pipes: one an epoch, and one a logged step if epochs are long."""

    def __init__(self, every_seconds: float = 10, stream: TextIO | None = None) -> None:
        self._every = every_seconds
        self._stream = stream
        self._last = 0.0

    def on_fit_start(self, run: RunView) -> None:
        """Starts the clock."""
        self._last = run.report.seconds()

    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        """Prints a line if the last is old enough."""
        now = run.report.seconds()
        if now - self._last < self._every:
            return
        self._last = now
        print(
            f"step {run.progress.step}/{run.total_steps}: loss {values['train/loss']:.4f}, "
            f"{_metrics(run, values, 'train/', 3)}, {values['speed/images_per_second']:,.0f} images/s, "
            f"communication {values['time/communication']:.0%}{_sent(values)}",
            file=self._stream or sys.stderr,
            flush=True,
        )

    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        """Prints the epoch's line."""
        self._last = run.report.seconds()
        print(_epoch_line(run, values), file=self._stream or sys.stderr, flush=True)


def _sent(values: Mapping[str, float]) -> str:
    """What a rank sends a step, and how many times fewer bytes than without compression."""
    size = values["speed/bytes_sent_per_step"]
    if not size:
        return ""
    unit, factor = next((unit, factor) for unit, factor in _UNITS if size >= factor or factor == 1)
    ratio = values["speed/compression_ratio"]
    return f", sent {size / factor:.3g} {unit}" + (
        f" ({ratio:,.{0 if ratio >= 100 else 1}f}x less)" if ratio >= 1.05 else ""
    )


def _title(run: RunView) -> str:
    epochs = run.config.trainer.epochs
    return f"epoch {min(run.progress.epoch + 1, epochs)}/{epochs}"


def _metrics(run: RunView, values: Mapping[str, float], prefix: str, digits: int) -> str:
    return ", ".join(f"{name} {values[prefix + name]:.{digits}f}" for name in run.task.metrics)


def _epoch_line(run: RunView, values: Mapping[str, float]) -> str:
    parts = [f"epoch {run.progress.epoch}/{run.config.trainer.epochs}:"]
    parts.append(f"loss {values['epoch/train_loss']:.4f}, {_metrics(run, values, 'epoch/train_', 4)}")
    if "epoch/val_loss" in values:
        metrics = _metrics(run, values, "epoch/val_", 4)
        parts.append(f"| validation: loss {values['epoch/val_loss']:.4f}, {metrics}")
    parts.append(f"| {values['epoch/images_per_second']:,.0f} images/s")
    return " ".join(parts)


class Profiler(Callback):
    """torch's profiler over a few steps after warm-up; the trace lands beside TensorBoard's event files.

    Args:
        steps: How many steps to record.
        folder: Where the Chrome trace goes.
    """

    warmup = 5

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps = steps
        self._folder = folder
        self._profiler: Any = None

    def on_fit_start(self, run: RunView) -> None:
        """Starts waiting for the steps to record."""
        from torch import profiler

        self._profiler = profiler.profile(
            schedule=profiler.schedule(wait=self.warmup - 1, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=profiler.tensorboard_trace_handler(str(self._folder), f"rank_{run.runtime.world.rank}"),
            record_shapes=True,
        )
        self._profiler.start()

    def on_step_end(self, run: RunView) -> None:
        """Counts a step."""
        self._profiler.step()

    def on_fit_end(self, run: RunView) -> None:
        """Writes what was recorded."""
        self._profiler.stop()


def default_callbacks(trainer_config: Any, run_dir: Path, *, is_main: bool) -> list[Callback]:
    """The callbacks that the configuration asks for on this rank."""
    if not is_main:
        return []
    found: list[Callback] = []
    mode = trainer_config.progress
    if mode == "bar" or (mode == "auto" and sys.stderr.isatty()):
        found.append(ProgressBar())
    elif mode != "off":
        found.append(PlainProgress())
    if trainer_config.profile_steps:
        found.append(Profiler(trainer_config.profile_steps, run_dir / "tensorboard"))
    return found
