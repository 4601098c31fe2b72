"""Simulates full disks: by a small file system (root only), or by a limit on the size of files."""

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

from typing_extensions import override

_LIMIT = resource.RLIMIT_FSIZE

#: The operating system's messages when nothing more can be written.
FULL_MESSAGES = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


class Disk(ABC):
    """The storage of a run's folder, which can be filled."""

    #: How it is filled, for reports.
    description: str

    @abstractmethod
    def fill(self, pids: Iterable[int]) -> None:
        """Makes these processes' writes fail. Called repeatedly for as long as the disk has to stay full."""

    @abstractmethod
    def clear(self) -> None:
        """Makes writing possible again."""

    @abstractmethod
    def remove(self, *, keep: bool) -> None:
        """Releases the storage.

        Args:
            keep: Keep the content of the run's folder.
        """


class SmallDisk(Disk):
    """A file system in memory, mounted as the run's folder.

    Args:
        folder: The run's folder; created if missing.
        size: Size in bytes.

    Raises:
        OSError: The file system can't be mounted.
    """

    description = "a small file system, filled"

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

    @override
    def fill(self, pids: Iterable[int]) -> None:
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))

    @override
    def clear(self) -> None:
        self._filler.unlink(missing_ok=True)

    @override
    def remove(self, *, keep: bool) -> None:
        copy = self._folder.with_name(f"{self._folder.name}.copy")
        if keep:
            shutil.copytree(self._folder, copy)
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
        if keep:
            self._folder.rmdir()
            copy.rename(self._folder)


class FileSizeLimit(Disk):
    """Limits files to half the size of the largest file of the run's checkpoints.

    A write beyond the limit raises ``OSError`` (EFBIG) in Python, as a write to a full disk raises ENOSPC.

    Args:
        checkpoints: The run's folder of checkpoints.
    """

    description = "a limit on the size of files"

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        self._original_limits: dict[int, tuple[int, int]] = {}

    @override
    def fill(self, pids: Iterable[int]) -> None:
        sizes = [file.stat().st_size for file in self._checkpoints.glob("step_*/*")]
        if not sizes:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                soft, hard = resource.prlimit(pid, _LIMIT)
                self._original_limits.setdefault(pid, (soft, hard))
                resource.prlimit(pid, _LIMIT, (max(sizes) // 2, hard))

    @override
    def clear(self) -> None:
        for pid, limits in self._original_limits.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, _LIMIT, limits)
        self._original_limits.clear()

    @override
    def remove(self, *, keep: bool) -> None:
        pass


def make_disk(folder: Path, size: int) -> Disk:
    """Makes a disk for a run's folder: a small file system if this process may mount one, else a limit on files."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            return SmallDisk(folder, size)
    return FileSizeLimit(folder / "checkpoints")
