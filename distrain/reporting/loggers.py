"""Where metrics go. The base class does nothing and so is the logger of ranks that must not write."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.config.registry import choice, register
from distrain.config.schema import Config, LoggerConfig, setting
from distrain.reporting import event_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

Scalars = Mapping[str, float]

#: What the end of a run writes, whatever the step: no run that goes on has ended.
_OF_AN_END = ("final/", "_hparams_/")


@register("logger", "none", LoggerConfig)
class Logger:
    """Takes everything and does nothing.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.

    Attributes:
        accepts_figures: Whether drawing pictures for it is worth the time.
    """

    accepts_figures: bool = False

    def __init__(self, config: LoggerConfig | None = None, run_dir: Path | None = None) -> None:
        self.config = config

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Takes named numbers at a step.

        Args:
            step: Updates done so far.
            values: By name; ``group/name`` where they belong together.
            kind: ``step`` or ``epoch``.
        """

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Takes a picture."""

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Takes the run's configuration with what it came to."""

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Forgets what comes after a step, and what an end of the run has left: the run goes on from there.

        Args:
            step: Updates done; what was logged at it stays, since logging comes before saving.
            mid_epoch: The epoch that this step is in was not over, so that what was said at its end comes again.
        """

    def flush(self) -> None:
        """Writes what is still in memory; what was logged before a checkpoint must not be less durable."""

    def close(self) -> None:
        """Flushes, and takes nothing more."""


class InMemoryLogger(Logger):
    """Keeps everything in lists; for tests and notebooks."""

    accepts_figures = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.figures: list[tuple[int, str]] = []
        self.final: dict[str, float] = {}

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Appends a row."""
        self.rows.append({"kind": kind, "step": step, **values})

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Notes the picture's name."""
        self.figures.append((step, name))

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Keeps the metrics."""
        self.final = dict(metrics)


class MetricsFile(Logger):
    """``metrics.jsonl``: one JSON object a logged step or epoch; a number that is not finite is ``null``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = path.open("a", buffering=1)

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Writes one line."""
        # JSON has no NaN; what Python would write in its place no other reader takes.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Writes the file anew, in one step, if a row is too many or was cut short."""
        self._file.close()
        new = self._path.with_name(f".{self._path.name}.new")
        strange = 0
        with self._path.open("rb") as old, new.open("wb") as kept:
            for line in old:
                row = _row(line)
                if row is None:
                    strange += 1
                elif _belongs(row, step, mid_epoch=mid_epoch):
                    kept.write(line)
            unchanged = kept.tell() == old.tell()
            kept.flush()
            os.fsync(kept.fileno())
        if unchanged:
            new.unlink()
        else:
            new.replace(self._path)
        if strange:
            log.warning("left %d lines out of %s that are no rows of it, or were cut short", strange, self._path)
        self._file = self._path.open("a", buffering=1)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _row(line: bytes) -> tuple[int, str] | None:
    """Step and kind of a row; ``None`` where it is none."""
    try:
        row = json.loads(line)
        return (int(row["step"]), str(row["kind"])) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _belongs(row: tuple[int, str], step: int, *, mid_epoch: bool) -> bool:
    """Whether a row is of the course that ends at a step."""
    at, kind = row
    return at < step or (at == step and not (kind == "epoch" and mid_epoch))


@dataclass
class TensorBoardConfig(LoggerConfig):
    """Keys of ``logger=tensorboard``."""

    flush_seconds: int = setting("Longest time that a value stays in memory.", at_least=1)


@register("logger", "tensorboard", TensorBoardConfig)
class TensorBoardLogger(Logger):
    """Event files below ``run_dir/tensorboard``, written by one rank."""

    accepts_figures = True

    def __init__(self, config: TensorBoardConfig, run_dir: Path) -> None:
        super().__init__(config)
        self._folder = run_dir / "tensorboard"
        self._flush_seconds = config.flush_seconds
        self._opened: SummaryWriter | None = None
        self._purges_from: int | None = None

    @property
    def _writer(self) -> SummaryWriter:
        if self._opened is None:
            # Imported when there is something to write, which the first step need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            # A TensorBoard that is watching holds what the files don't say any more; a purge step tells it.
            self._opened = SummaryWriter(
                str(self._folder), purge_step=self._purges_from, flush_secs=self._flush_seconds
            )
        return self._opened

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Takes what is too many out of the event files.

        That alone makes any reader's picture right. A purge step in a new file, the usual way, leaves it to readers, of
        which TensorBoard's faster one goes by each curve's own steps.
        """

        def belongs(at: int, value: Any) -> bool:
            if value.tag.startswith(_OF_AN_END) or at > step:
                return False
            said_at_end = value.HasField("image") or (mid_epoch and value.tag.partition("/")[0] == "epoch")
            return at < step or not said_at_end

        self.close()
        event_files.remove_events(self._folder, belongs)
        # At the first start too: a reader takes only a second one for a restart.
        self._purges_from = step + 1 if step else 0

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Adds one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Adds a picture."""
        self._writer.add_figure(name, figure, step)

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Fills the HParams page with this run, in the run's own event file."""
        from torch.utils.tensorboard.summary import hparams

        flat = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in parameters.items()
        }
        for summary in hparams(flat, dict(metrics)):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, 0)

    def flush(self) -> None:
        """Writes what is still in memory."""
        if self._opened is not None:
            self._opened.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class Loggers(Logger):
    """Several loggers as one; where nothing can be written (a full disk), the run goes on without what was logged.

    That is said when it begins.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        super().__init__()
        self._loggers = list(loggers)
        self.accepts_figures = any(logger.accepts_figures for logger in self._loggers)
        self._failing: set[Logger] = set()

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Hands the values to each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.scalars(step, values, kind=kind)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Hands the picture to each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.figure(step, name, figure)

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Hands the configuration to each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.hyperparameters(parameters, metrics)

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Tells each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.rewind(step, mid_epoch=mid_epoch)

    def flush(self) -> None:
        """Flushes each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.flush()

    @contextlib.contextmanager
    def _going_on(self, logger: Logger) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if logger not in self._failing:
                log.error("METRICS ARE LOST: %s can't write (%s). The run goes on", type(logger).__name__, error)
            self._failing.add(logger)
        else:
            self._failing.discard(logger)

    def close(self) -> None:
        """Closes each."""
        for logger in self._loggers:
            with self._going_on(logger):
                logger.close()


def build(config: Config, run_dir: Path) -> Logger:
    """The loggers of the rank that writes."""
    chosen: Logger = choice("logger", config.logger.name).target(config.logger, run_dir)
    return Loggers([MetricsFile(run_dir / "metrics.jsonl"), chosen])
