"""Files that several processes may want to make at the same time: locks, and folders complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distrain.errors import ConfigError

_log = logging.getLogger(__name__)
_BUILD = ".build-"
_LOCK = ".lock"


@contextlib.contextmanager
def locked_build_folder(key: str, folder: Path) -> Iterator[Path]:
    """Holds a folder's lock and gives an empty folder inside of it to build in, removed at the end.

    The lock ends with its process, however that dies; what a killed process left half-built is removed by the next
    one. Those who waited find out for themselves whether the work is done. What is built becomes visible by
    :func:`publish`.

    Args:
        key: The configuration key that names ``folder``, for the error.
        folder: Made where it is missing.

    Raises:
        ConfigError: The folder can't be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(key, folder, f"can't be written ({error.strerror})") from error
    try:
        _lock(key, folder, lock)
        for stale in folder.glob(f"{_BUILD}*"):
            _log.warning("removing %s, left by a process that was stopped", stale)
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_BUILD, dir=folder, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    finally:
        os.close(lock)


def is_build_folder(folder: Path) -> bool:
    """Whether :func:`locked_build_folder` has worked there before."""
    return (folder / _LOCK).is_file()


def _lock(key: str, folder: Path, lock: int) -> None:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that works in %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise ConfigError(key, folder, "lies on a file system without locks; choose a local folder") from error
        raise


def publish(built: Path, target: Path) -> None:
    """Makes a file or folder visible under its name, at once and only when all of it is on the disk.

    Args:
        built: On the same file system.
        target: A file that is there is replaced; a folder must not be there.
    """
    for path in sorted(built.rglob("*"), reverse=True) if built.is_dir() else []:
        _synchronise(path)
    _synchronise(built)
    built.replace(target)
    _synchronise(target.parent)


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
