"""Loggers: where metrics are written. The base class discards everything; ranks that must not write use it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.registry import choice, register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import flush_and_sync
from distrain.reporting import event_files
from distrain.runtime.run_owner import RunOwner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.reporting.event_writer import EventWriter

log = logging.getLogger(__name__)

Scalars = Mapping[str, float]

#: Prefixes of TensorBoard tags that are written only at the end of a run, and so are removed when it is resumed.
_END_OF_RUN_TAGS = ("final/", "_hparams_/")


@register("logger", "none", LoggerConfig)
class Logger:
    """Discards everything it is given; the base class of all loggers.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.

    Attributes:
        accepts_figures: Whether it stores figures; if not, the caller need not draw them.
        owner: This start as the owner of the run's folder; ``None`` outside a run.
    """

    accepts_figures: bool = False
    owner: RunOwner | None = None

    def __init__(self, config: LoggerConfig | None = None, run_dir: Path | None = None) -> None:
        self.config = config

    def may_create(self) -> bool:
        """Whether the run's folder belongs to this start, so that a file that was removed may be made anew."""
        return self.owner is None or self.owner.may_write

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Logs named numbers.

        Args:
            step: Number of updates so far.
            values: Values by name; related values are named ``group/name``.
            kind: ``step``, or ``epoch`` for values that describe a whole epoch.
        """

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Logs a figure."""

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Logs the run's configuration together with its final metrics."""

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Removes what was logged after a step and at the end of the run, since the run is resumed from that step.

        Args:
            step: Number of updates in the checkpoint that the run is resumed from. What was logged at this step is
                kept, since logging comes before saving.
            mid_epoch: Whether the checkpoint was saved before the end of its epoch. If so, the values of that epoch are
                removed too, since they will be logged again.
        """

    def flush(self) -> None:
        """Writes buffered values; called before a checkpoint is saved, which must not be newer than the logs."""

    def close(self) -> None:
        """Flushes and closes; nothing may be logged afterwards."""


class InMemoryLogger(Logger):
    """Stores everything in lists, for tests and notebooks.

    Attributes:
        rows: Logged numbers, in order, each with ``kind`` and ``step``.
        figures: Step and name of each figure.
        final: The final metrics.
    """

    accepts_figures = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.figures: list[tuple[int, str]] = []
        self.final: dict[str, float] = {}

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        self.rows.append({"kind": kind, "step": step, **values})

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self.figures.append((step, name))

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self.final = dict(metrics)


class MetricsFile(Logger):
    """Writes ``metrics.jsonl``: one JSON object per logged step or epoch; NaN and infinities become ``null``.

    Args:
        path: The file; rows are appended.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._folder = path, ContainedFolder(path.parent)
        self._file = AppendedFile(self._folder, path.name, self.may_create)
        self._rewind: tuple[int, bool] | None = None

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        # JSON has no NaN, and other parsers reject the `NaN` that Python writes by default.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite}
        self._file.hold(f"{json.dumps(row, allow_nan=False)}\n".encode())
        self.flush()

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self._rewind = step, mid_epoch
        self.flush()

    @override
    def flush(self) -> None:
        # Rows that are logged before the removal succeeds wait, so that no row is removed by mistake.
        if self._rewind is not None:
            self._remove_rows(*self._rewind)
            self._rewind = None
        self._file.flush()

    def _remove_rows(self, step: int, mid_epoch: bool) -> None:
        name, folder = self._path.name, self._folder
        if not folder.exists(name):
            return
        new_name = f".{name}.new"
        invalid = 0
        with folder.open_file(name, "rb") as old, folder.create(new_name) as new:
            for line in old:
                row = _step_and_kind(line)
                if row is None:
                    invalid += 1
                elif _is_valid_after_rewind(row, step, mid_epoch=mid_epoch):
                    new.write(line)
            unchanged = new.tell() == old.tell()
            flush_and_sync(new)
        # The file is replaced atomically, and only if a row was removed.
        if unchanged:
            folder.unlink(new_name)
        else:
            folder.rename(new_name, name)
        if invalid:
            log.warning("removed %d lines from %s that are truncated or not valid rows", invalid, self._path)

    @override
    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _step_and_kind(line: bytes) -> tuple[int, str] | None:
    """Step and kind of a line of ``metrics.jsonl``; ``None`` if it is not a complete, valid row."""
    try:
        row = json.loads(line)
        return (int(row["step"]), str(row["kind"])) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_valid_after_rewind(row: tuple[int, str], step: int, *, mid_epoch: bool) -> bool:
    """Whether a row was logged up to a step; see :meth:`Logger.rewind`."""
    row_step, kind = row
    return row_step < step or (row_step == step and not (kind == "epoch" and mid_epoch))


@dataclass
class TensorBoardConfig(LoggerConfig):
    """Keys of ``logger=tensorboard``."""

    flush_seconds: int = setting(
        "Seconds between two writes of logged values; a checkpoint writes them too.", at_least=1
    )


@register("logger", "tensorboard", TensorBoardConfig)
class TensorBoardLogger(Logger):
    """Writes TensorBoard event files to ``run_dir/tensorboard``; only one rank may use it.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
    """

    accepts_figures = True

    def __init__(self, config: TensorBoardConfig, run_dir: Path) -> None:
        super().__init__(config)
        self._folder = run_dir / "tensorboard"
        self._flush_seconds = config.flush_seconds
        self._last_flush = -math.inf
        self._opened: EventWriter | None = None
        self._purge_step: int | None = None
        self._rewind: tuple[int, bool] | None = None

    @property
    def _writer(self) -> EventWriter:
        if self._opened is None:
            # Imported only when there is something to write, since the import is slow.
            from distrain.reporting.event_writer import EventWriter

            # A running TensorBoard still has the removed events in memory; a purge step makes it discard them.
            self._opened = EventWriter(self._folder, self._purge_step, self.may_create)
        return self._opened

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self.close()
        # Set at the first start too: TensorBoard recognises a restart only from the second such event on.
        self._purge_step = step + 1 if step else 0
        self._rewind = step, mid_epoch
        self.flush()

    def _remove_events(self, step: int, mid_epoch: bool) -> None:
        # Events are removed from the files. The usual way, a purge step in a new file, leaves that to the reader, and
        # TensorBoard's fast loader goes by each curve's own steps.
        def is_valid(event_step: int, value: Any) -> bool:
            if value.tag.startswith(_END_OF_RUN_TAGS) or event_step > step:
                return False
            is_end_of_epoch = value.HasField("image") or (mid_epoch and value.tag.partition("/")[0] == "epoch")
            return event_step < step or not is_end_of_epoch

        event_files.remove_events(self._folder, is_valid)

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._writer.add_figure(name, figure, step)
        self.flush()

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        # SummaryWriter.add_hparams would put them into an event file of a separate folder.
        from torch.utils.tensorboard.summary import hparams

        flat = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in parameters.items()
        }
        for summary in hparams(flat, dict(metrics)):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, 0)
        self.flush()

    @override
    def flush(self) -> None:
        # Until this succeeds, every call tries again.
        self._last_flush = -math.inf
        if self._rewind is not None:
            self._remove_events(*self._rewind)
            self._rewind = None
        if self._opened is not None:
            self._opened.flush()
        self._last_flush = time.monotonic()

    @override
    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()


class Loggers(Logger):
    """Passes everything on to several loggers; the run continues if one of them can't write (a full disk, say).

    What such a logger can't write it keeps for later, as far as it can. An error is logged at its first failed call,
    and again if it fails after a call that succeeded.

    Args:
        loggers: Where to pass calls on to.
        owner: This start as the owner of the run's folder. Every call checks it, and raises ``TakenOver`` instead of
            writing into a folder that another start of the run has taken.
    """

    def __init__(self, loggers: Sequence[Logger], owner: RunOwner | None = None) -> None:
        super().__init__()
        self.owner = owner
        self._loggers = list(loggers)
        self.accepts_figures = any(logger.accepts_figures for logger in self._loggers)
        self._failing: set[Logger] = set()

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        self._call_each(lambda logger: logger.scalars(step, values, kind=kind))

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._call_each(lambda logger: logger.figure(step, name, figure))

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self._call_each(lambda logger: logger.hyperparameters(parameters, metrics))

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self._call_each(lambda logger: logger.rewind(step, mid_epoch=mid_epoch))

    @override
    def flush(self) -> None:
        self._call_each(lambda logger: logger.flush())

    @override
    def close(self) -> None:
        self._call_each(lambda logger: logger.close())

    def _call_each(self, call: Callable[[Logger], None]) -> None:
        if self.owner is not None:
            self.owner.check()
        for logger in self._loggers:
            logger.owner = self.owner
            try:
                call(logger)
            except OSError as error:
                if logger not in self._failing:
                    log.error("METRICS NOT WRITTEN: %s can't write (%s). The run goes on", type(logger).__name__, error)
                self._failing.add(logger)
            else:
                self._failing.discard(logger)


def build(config: Config, run_dir: Path, owner: RunOwner | None = None) -> Logger:
    """Builds the loggers of the rank that writes: ``metrics.jsonl`` and the configured logger.

    Args:
        config: The run's configuration.
        run_dir: The run's folder.
        owner: This start as the owner of the folder.
    """
    configured: Logger = choice("logger", config.logger.name).target(config.logger, run_dir)
    return Loggers([MetricsFile(run_dir / "metrics.jsonl"), configured], owner)
