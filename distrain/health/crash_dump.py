"""The last words of a process that crashes below Python, such as by a segmentation fault."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import IO


class CrashDump:
    """Where Python writes all threads' stacks when a fatal signal ends the process; without one nothing is left of it.

    Args:
        path: The file. An old one is emptied.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._had_handler = faulthandler.is_enabled()
        self._file: IO[str] | None = path.open("w")
        faulthandler.enable(self._file)

    def close(self) -> None:
        """Stops recording and removes the file if it is empty, as it is unless the process crashed."""
        if self._file is None:
            return
        faulthandler.disable()
        if self._had_handler and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        self._file.close()
        self._file = None
        if self._path.is_file() and not self._path.stat().st_size:
            self._path.unlink(missing_ok=True)


def crash_dump_path(folder: Path, rank: int) -> Path:
    """The file of a rank, below the run folder."""
    return folder / "logs" / f"rank_{rank}.fault"


def read_crash_dump(folder: Path | None, rank: int) -> str:
    """What a rank that is gone has left; nothing unless it crashed, and its empty file is then removed."""
    path = crash_dump_path(folder, rank) if folder is not None else Path()
    if not path.is_file():
        return ""
    if not path.stat().st_size:
        path.unlink(missing_ok=True)
        return ""
    return path.read_text(errors="replace")
