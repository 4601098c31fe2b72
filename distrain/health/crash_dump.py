"""Stacks of a process that crashes below Python, for example by a segmentation fault."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import IO


class CrashDump:
    """A file to which Python writes the stacks of all threads if a fatal signal ends the process.

    Args:
        path: The file. Its previous content is deleted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._had_handler = faulthandler.is_enabled()
        self._file: IO[str] | None = path.open("w")
        faulthandler.enable(self._file)

    def close(self) -> None:
        """Stops recording and removes the file, which is empty unless the process crashed."""
        if self._file is None:
            return
        faulthandler.disable()
        if self._had_handler and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        self._file.close()
        self._file = None
        if self._path.is_file() and not self._path.stat().st_size:
            self._path.unlink(missing_ok=True)


def crash_dump_path(run_dir: Path, rank: int) -> Path:
    """A rank's file in the run folder."""
    return run_dir / "logs" / f"rank_{rank}.fault"


def read_crash_dump(run_dir: Path | None, rank: int) -> str:
    """Returns what a process that has ended wrote when it crashed; removes an empty file.

    Returns:
        The stacks, or an empty string if the process did not crash.
    """
    if run_dir is None:
        return ""
    path = crash_dump_path(run_dir, rank)
    if not path.is_file():
        return ""
    if not path.stat().st_size:
        path.unlink(missing_ok=True)
        return ""
    return path.read_text(errors="replace")
