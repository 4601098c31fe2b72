"""Stacks of a process that crashes below Python, for example by a segmentation fault."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import IO

from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import losing_on_disk_errors

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 24


class CrashDump:
    """A file to which Python writes the stacks of all threads if a fatal signal ends the process.

    Without the file, if it can't be opened, Python writes the stacks to standard error, where it can.

    Args:
        run_dir: The run's folder.
        rank: This rank. The previous content of its file is deleted.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._folder, self._name = ContainedFolder(run_dir), _file_name(rank)
        self._had_handler = faulthandler.is_enabled()
        self._file: IO[bytes] | None = None
        with losing_on_disk_errors("The file for the stacks of a crash"):
            self._file = self._folder.create(self._name)
        if self._file is not None:
            faulthandler.enable(self._file)

    def close(self, *, keep_file: bool = False) -> None:
        """Stops recording and removes the file, which is empty unless the process crashed.

        Args:
            keep_file: Leave it, because another start of the run uses it now.
        """
        if self._file is None:
            return
        faulthandler.disable()
        if self._had_handler and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        file, self._file = self._file, None
        # An empty file that stays does no harm, and the run may be ending because of its disk.
        with contextlib.suppress(OSError):
            # The folder may have been removed, and another one be in its place.
            own = os.fstat(file.fileno())
            is_own = os.path.samestat(own, self._folder.status(self._name))
            if is_own and not keep_file and not own.st_size:
                self._folder.unlink(self._name)
        with contextlib.suppress(OSError):
            file.close()


def crash_dump_path(run_dir: Path, rank: int) -> Path:
    """A rank's file in the run folder."""
    return run_dir / _file_name(rank)


def read_crash_dump(run_dir: Path | None, rank: int) -> str:
    """Returns what a process that has ended wrote when it crashed; removes an empty file.

    Returns:
        The stacks, or an empty string if the process did not crash or the file can't be read.
    """
    if run_dir is None:
        return ""
    path, folder, name = crash_dump_path(run_dir, rank), ContainedFolder(run_dir), _file_name(rank)
    try:
        with folder.open_file(name, "rb") as file:
            content = file.read(_MAX_BYTES)
        if content:
            return content.decode(errors="replace")
        folder.unlink(name)
    except FileNotFoundError:
        return ""
    except OSError as error:
        log.warning("%s can't be read: %s", path, error.strerror)
    return ""


def _file_name(rank: int) -> str:
    return f"logs/rank_{rank}.fault"
