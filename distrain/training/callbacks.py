"""Callbacks, which the trainer calls at fixed points: the base class, progress as lines, status, the profiler."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

from typing_extensions import override

from distrain.checkpoint.progress import Progress
from distrain.config.schema import Config, TrainerConfig
from distrain.files.contained_folder import ContainedFolder
from distrain.files.escaping import escaped
from distrain.files.live_text import is_live
from distrain.files.terminal import FILE_ONLY, TERMINAL
from distrain.files.writing import losing_on_disk_errors
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Task
from distrain.training import averaging
from distrain.training.report import Report

log = logging.getLogger(__name__)

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


class RunView(Protocol):
    """The trainer as callbacks see it; they must not change it."""

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
        """The strategy, which holds the model."""

    @property
    def progress(self) -> Progress:
        """The run's position: steps, epochs, samples."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""

    @property
    def report(self) -> Report:
        """Sums and times of the steps so far."""


@dataclass
class RunEnd:
    """How a run ended.

    Attributes:
        status: ``finished``; ``stopped``: on request, with everything saved; or ``failed``.
        reason: Why it was stopped, or what failed; empty if it finished.
        summary: What ``summary.json`` holds; empty unless it finished.
    """

    status: str
    reason: str = ""
    summary: dict[str, Any] = field(default_factory=dict)


class Callback:
    """Base class whose methods do nothing. The trainer calls them on every rank that has the callback.

    An error that a method raises fails the run, on all ranks; see :mod:`distrain.training.callback_list`.

    Attributes:
        only_on_main: Whether only rank 0 has it, as for what prints or draws; else every rank that trains has one.
    """

    only_on_main: ClassVar[bool] = False

    def on_fit_start(self, run: RunView) -> None:
        """Called before the first step."""

    def on_step_end(self, run: RunView) -> None:
        """Called after each step; must be fast."""

    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        """Called after metrics of the last steps were summed over the ranks; ``values`` are as in ``metrics.jsonl``."""

    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        """Called after the evaluation at the end of an epoch, before it is saved; ``values`` as in the file."""

    def on_fit_end(self, run: RunView) -> None:
        """Called after the last step and before the test, also if the run fails."""

    def on_end(self, run: RunView, end: RunEnd) -> None:
        """Called when all is written, or the run has failed; what it raises is only logged."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to hold of the callback: plain data and tensors, by name. Called on rank 0."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state_dict` returned, when a run is resumed; called on every rank, before the first step.

        It is not called if the checkpoint holds nothing of the callback.
        """


class EpochLog(Callback):
    """Logs one line per epoch.

    Args:
        on_terminal: Whether the line also goes to the terminal, not only to the rank's log file.
    """

    def __init__(self, *, on_terminal: bool) -> None:
        self._extra = None if on_terminal else FILE_ONLY

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        log.info("%s", _epoch_line(run, values), extra=self._extra)


class StatusValues(Callback):
    """Adds to ``status.json`` how far the training is, and what was logged last."""

    @override
    def on_fit_start(self, run: RunView) -> None:
        if run.runtime.status is not None:
            trainer = run.config.trainer
            run.runtime.status.begin_training(
                run.progress.step, run.total_steps, trainer.epochs, compiles=bool(trainer.compile)
            )

    @override
    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        if run.runtime.status is not None:
            run.runtime.status.note_step(values)

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        if run.runtime.status is not None:
            run.runtime.status.note_epoch(values)


class PlainProgress(Callback):
    """The same values as plain lines, for files and pipes, while an epoch is long.

    Args:
        every_seconds: Shortest time between two lines, and between the end of an epoch and the next line.
        stream: Where to write; by default standard error.
    """

    def __init__(self, every_seconds: float = 10, stream: TextIO | None = None) -> None:
        self._every = every_seconds
        self._stream = stream
        self._last = 0.0

    @override
    def on_fit_start(self, run: RunView) -> None:
        self._last = run.report.seconds()

    @override
    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        now = run.report.seconds()
        if now - self._last < self._every:
            return
        self._last = now
        metrics = listed_metrics(run.task.metrics, values, "train/", 3)
        print(
            f"step {run.progress.step}/{run.total_steps}: loss {values['train/loss']:.4f}, {metrics}, "
            f"{values['speed/images_per_second']:,.0f} images/s, "
            f"communication {values['time/communication']:.0%}{sent_bytes(values)}",
            file=self._stream or TERMINAL,
            flush=True,
        )

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        self._last = run.report.seconds()


def sent_bytes(values: Mapping[str, float]) -> str:
    """Text on the bytes that a rank sends per step, and the ratio of uncompressed to compressed bytes."""
    size = values["speed/bytes_sent_per_step"]
    if not size:
        return ""
    unit, factor = next((unit, factor) for unit, factor in _UNITS if size >= factor or factor == 1)
    ratio = values["speed/compression_ratio"]
    return f", sent {size / factor:.3g} {unit}" + (
        f" ({ratio:,.{0 if ratio >= 100 else 1}f}x less)" if ratio >= 1.05 else ""
    )


def listed_metrics(names: Iterable[str], values: Mapping[str, float], prefix: str, digits: int) -> str:
    """Metrics with their names, in one line."""
    return ", ".join(f"{escaped(name)} {values[prefix + name]:.{digits}f}" for name in names)


def _epoch_line(run: RunView, values: Mapping[str, float]) -> str:
    parts = [f"epoch {run.progress.epoch}/{run.config.trainer.epochs}:"]
    parts.append(
        f"loss {values['epoch/train_loss']:.4f}, {listed_metrics(run.task.metrics, values, 'epoch/train_', 4)}"
    )
    if "epoch/val_loss" in values:
        of_averages = [f"{average}_{run.task.score}" for average in averaging.names(run.config.trainer)]
        metrics = listed_metrics([*run.task.validated, *of_averages], values, "epoch/val_", 4)
        parts.append(f"| validation: loss {values['epoch/val_loss']:.4f}, {metrics}")
    if speed := values.get("epoch/images_per_second"):
        parts.append(f"| {speed:,.0f} images/s")
    return " ".join(parts)


class Profiler(Callback):
    """Records a few steps after warm-up by torch's profiler.

    Args:
        steps: Number of steps to record.
        folder: Folder for the trace, which Chrome and TensorBoard can show.
    """

    warmup = 5

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps = steps
        self._folder = folder
        self._profiler: Any = None

    @override
    def on_fit_start(self, run: RunView) -> None:
        from torch import profiler

        self._profiler = profiler.profile(
            schedule=profiler.schedule(wait=self.warmup - 1, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=lambda profile: self._write(profile, run.runtime.world.rank),
            record_shapes=True,
        )
        self._profiler.start()

    @override
    def on_step_end(self, run: RunView) -> None:
        with losing_on_disk_errors("The profile"):
            self._profiler.step()

    @override
    def on_fit_end(self, run: RunView) -> None:
        with losing_on_disk_errors("The profile"):
            self._profiler.stop()

    def _write(self, profile: Any, rank: int) -> None:
        # TensorBoard looks for this name. The profiler opens a path itself, which could lead through a link.
        folder, name = ContainedFolder(self._folder.parent), f"rank_{rank}.{time.time_ns()}.pt.trace.json"
        with tempfile.TemporaryDirectory() as temporary:
            profile.export_chrome_trace(str(Path(temporary, name)))
            folder.make_folder(self._folder.name)
            with Path(temporary, name).open("rb") as source, folder.create(f"{self._folder.name}/{name}") as target:
                shutil.copyfileobj(source, target)


def default_callbacks(trainer_config: TrainerConfig, run_dir: Path, *, is_main: bool) -> list[Callback]:
    """The configured callbacks of this rank; only rank 0 has any. A live line is added by who shows it."""
    if not is_main:
        return []
    mode = trainer_config.progress
    lines = mode == "lines" or (mode == "auto" and not is_live(TERMINAL))
    callbacks: list[Callback] = [StatusValues(), EpochLog(on_terminal=lines)]
    if lines:
        callbacks.append(PlainProgress())
    if trainer_config.profile_steps:
        callbacks.append(Profiler(trainer_config.profile_steps, run_dir / "tensorboard"))
    return callbacks
