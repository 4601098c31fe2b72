"""Where a rank's log lines go: a file for each rank, and the terminal for rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm
from typing_extensions import override

from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder
from distrain.files.escaping import EscapingFormatter
from distrain.files.terminal import TERMINAL, print_to_stderr
from distrain.runtime.run_owner import RunOwner


class RankLogging:
    """Handlers of the ``distrain`` logger for the duration of a run. Nothing changes until :meth:`start`."""

    def __init__(self) -> None:
        self._handlers: list[logging.Handler] = []
        self._previous_propagate: bool | None = None

    def start(self, rank: int) -> None:
        """Lets rank 0 log to the terminal, and the other ranks nowhere for now."""
        logger = logging.getLogger("distrain")
        logger.setLevel(logging.INFO)
        self._previous_propagate, logger.propagate = logger.propagate, False
        # Without any handler, Python would print warnings and errors to standard error.
        to_terminal = _ProgressBarHandler() if rank == 0 else logging.NullHandler()
        to_terminal.addFilter(lambda record: not getattr(record, "file_only", False))
        self._add(to_terminal, "%(message)s")

    def add_file(self, run_dir: Path, rank: int, owner: Callable[[], RunOwner | None] = lambda: None) -> None:
        """Adds this rank's log file.

        Args:
            run_dir: The run's folder.
            rank: This rank.
            owner: Returns who owns the run's folder, once that is known.
        """
        self._add(_LogFile(run_dir, rank, owner), "%(asctime)s %(levelname)s %(name)s: %(message)s")

    def _add(self, handler: logging.Handler, line_format: str) -> None:
        handler.setFormatter(EscapingFormatter(line_format))
        self._handlers.append(handler)
        logging.getLogger("distrain").addHandler(handler)

    def flush(self) -> None:
        """Writes out what waits for a disk that couldn't be written."""
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


class _LogFile(logging.Handler):
    """A rank's log file. An error of the disk is said once on the terminal; lines wait until it can be written again.

    Args:
        run_dir: The run's folder.
        rank: This rank.
        owner: As for :meth:`RankLogging.add_file`.
    """

    def __init__(self, run_dir: Path, rank: int, owner: Callable[[], RunOwner | None]) -> None:
        super().__init__()
        self._rank, self._owner = rank, owner
        self._file = AppendedFile(
            ContainedFolder(run_dir), f"logs/rank_{rank}.log", lambda: (mine := owner()) is None or mine.may_write
        )
        self._fails = False
        self._try(self._file.open)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        line = f"{_text(self, record)}\n".encode(errors="backslashreplace")
        self._try(lambda: self._file.append(line))

    @override
    def flush(self) -> None:
        self._locked(self._file.flush)

    @override
    def close(self) -> None:
        self._locked(self._file.close)
        super().close()

    def _locked(self, write: Callable[[], None]) -> None:
        # Logging itself holds this lock for `emit` alone.
        self.acquire()
        try:
            self._try(write)
        finally:
            self.release()

    def _try(self, write: Callable[[], None]) -> None:
        owner = self._owner()
        if owner is not None and owner.is_taken:
            self._file.discard()
            return
        try:
            write()
        except OSError as error:
            if not self._fails:
                print_to_stderr(
                    f"distrain: rank {self._rank} can't write its log {self._file.path}: {error.strerror}. "
                    "The run goes on"
                )
            self._fails = True
        else:
            self._fails = False


class _ProgressBarHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        text = _text(self, record)
        tqdm.write(text, file=TERMINAL)


def _text(handler: logging.Handler, record: logging.LogRecord) -> str:
    """The record as the handler formats it; an error in it is no reason to end a training."""
    try:
        return handler.format(record)
    except Exception as error:
        return f"a log line can't be formatted ({type(error).__name__}): {record.msg!r}"
