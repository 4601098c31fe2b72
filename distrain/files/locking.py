"""Locks a file for this process; the system releases the lock when the process ends for any reason."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

_POLL_SECONDS = 0.2


def lock(descriptor: int, *, wait: bool) -> None:
    """Locks an open file.

    Args:
        descriptor: The file, opened for reading and writing.
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is false.
        OSError: The file system has no locks.
    """
    if sys.platform == "win32":
        _lock_on_windows(descriptor, wait=wait)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_on_windows(descriptor: int, *, wait: bool) -> None:
    msvcrt: Any = importlib.import_module("msvcrt")
    while True:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            # One byte, which need not exist. Asked again and again: msvcrt itself gives up waiting after 10 seconds.
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError as error:
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from error
        time.sleep(_POLL_SECONDS)
