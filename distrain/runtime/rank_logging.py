"""Where a rank's log lines go: a file for each rank, and the terminal for rank 0."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm
from typing_extensions import override

#: For ``extra=`` of a log call: the line goes to the rank's file and not to the terminal.
FILE_ONLY = {"file_only": True}


class RankLogging:
    """Handlers of the ``distrain`` logger for the duration of a run. Nothing changes until :meth:`start`."""

    def __init__(self) -> None:
        self._handlers: list[logging.Handler] = []
        self._previous_propagate: bool | None = None

    def start(self, rank: int, log_file: Path | None) -> None:
        """Adds the handlers.

        Args:
            rank: This rank; rank 0 also logs to the terminal.
            log_file: This rank's log file; ``None`` for no file.
        """
        logger = logging.getLogger("distrain")
        logger.setLevel(logging.INFO)
        self._previous_propagate, logger.propagate = logger.propagate, False
        if log_file is not None:
            to_file = logging.FileHandler(log_file)
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            self._handlers.append(to_file)
        if rank == 0:
            to_terminal = _ProgressBarHandler()
            to_terminal.setFormatter(logging.Formatter("%(message)s"))
            to_terminal.addFilter(lambda record: not getattr(record, "file_only", False))
            self._handlers.append(to_terminal)
        for handler in self._handlers:
            logger.addHandler(handler)

    def flush(self) -> None:
        """Writes out buffered lines."""
        for handler in self._handlers:
            handler.flush()

    def stop(self) -> None:
        """Removes the handlers and restores the logger."""
        logger = logging.getLogger("distrain")
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        if self._previous_propagate is not None:
            logger.propagate, self._previous_propagate = self._previous_propagate, None


class _ProgressBarHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
