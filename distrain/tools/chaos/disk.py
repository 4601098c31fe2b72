"""Disks that can be filled: a small file system of its own (root), or a limit on the size of files (everybody)."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

_LIMIT = resource.RLIMIT_FSIZE


class Disk(ABC):
    """What a run's folder lies on."""

    #: How it is filled.
    means: str

    @abstractmethod
    def fill(self, pids: Iterable[int]) -> None:
        """Makes writing fail for these processes; called again and again while it is to stay full."""

    @abstractmethod
    def clear(self) -> None:
        """Makes writing possible again."""

    @abstractmethod
    def remove(self, *, keep: bool) -> None:
        """Gives back what was taken; the run's folder stays if asked to."""


class SmallDisk(Disk):
    """A file system in memory, mounted as the run's folder.

    Args:
        folder: The run's folder; made if it is not there.
        size: Bytes.

    Raises:
        OSError: It can't be mounted.
    """

    means = "a small file system, filled"

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._filler = folder / ".filler"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "distrain-chaos", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(errno.EPERM, done.stderr.strip())

    def fill(self, pids: Iterable[int]) -> None:
        """Takes all the space that is left."""
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))

    def clear(self) -> None:
        """Gives the space back."""
        self._filler.unlink(missing_ok=True)

    def remove(self, *, keep: bool) -> None:
        """Unmounts; what lies on it is copied first, or gone."""
        copy = self._folder.with_name(f"{self._folder.name}.copy")
        if keep:
            shutil.copytree(self._folder, copy)
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
        if keep:
            self._folder.rmdir()
            copy.rename(self._folder)


class LimitedFiles(Disk):
    """No file of the run may grow beyond half of the largest one of its newest checkpoint.

    Args:
        checkpoints: The run's folder of checkpoints.
    """

    means = "a limit on the size of files"

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        self._before: dict[int, tuple[int, int]] = {}

    def fill(self, pids: Iterable[int]) -> None:
        """Lowers the limit of each process; Python then gets an ``OSError`` (EFBIG), as from a full disk."""
        files = [file.stat().st_size for file in self._checkpoints.glob("step_*/*")]
        if not files:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                soft, hard = resource.prlimit(pid, _LIMIT)
                self._before.setdefault(pid, (soft, hard))
                resource.prlimit(pid, _LIMIT, (max(files) // 2, hard))

    def clear(self) -> None:
        """Gives each process the limit it had."""
        for pid, limits in self._before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, _LIMIT, limits)
        self._before.clear()

    def remove(self, *, keep: bool) -> None:
        """There is nothing to give back."""


def make(folder: Path, size: int) -> Disk:
    """A disk for a run's folder: a small file system where we may mount one."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            return SmallDisk(folder, size)
    return LimitedFiles(folder / "checkpoints")


#: What the operating system says when nothing more can be written.
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))
