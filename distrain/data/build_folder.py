"""Creates files that several processes need: one of them does it, and files appear completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distrain.errors import ConfigError
from distrain.files import locking
from distrain.files.contained_folder import OPEN_FLAGS
from distrain.files.writing import sync_path

log = logging.getLogger(__name__)
_BUILD = ".build-"
_LOCK = ".lock"


@contextlib.contextmanager
def locked_build_folder(key: str, folder: Path) -> Iterator[Path]:
    """Locks a folder and yields an empty temporary folder inside of it, which is removed at the end.

    Files are created in the temporary folder and moved to their final place by :func:`publish`. A process that had to
    wait for the lock must check whether the work is already done. The operating system releases the lock when its
    process ends for any reason; a temporary folder that a killed process left behind is removed by the next one.

    Args:
        key: The configuration key that names ``folder``, for the error message.
        folder: Folder to lock; created if it is missing.

    Raises:
        ConfigError: The folder can't be written or locked, or what is built in it can't be (a full disk).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, which others can make in a folder for temporary files.
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o666)
    except OSError as error:
        raise ConfigError(key, folder, f"can't be written ({error.strerror})") from error
    try:
        _lock(key, folder, lock)
        for stale in folder.glob(f"{_BUILD}*"):
            log.warning("removing %s, which a killed process left behind", stale)
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_BUILD, dir=folder, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise ConfigError(key, folder, f"{error.filename or folder}: {error.strerror or error}") from error
    finally:
        os.close(lock)


def is_build_folder(folder: Path) -> bool:
    """Whether :func:`locked_build_folder` was used in this folder before."""
    return (folder / _LOCK).is_file()


def _lock(key: str, folder: Path, lock: int) -> None:
    try:
        try:
            locking.lock(lock, wait=False)
        except BlockingIOError:
            log.info("waiting for another process that is writing to %s", folder)
            locking.lock(lock, wait=True)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise ConfigError(key, folder, "is on a file system without locks; choose a local folder") from error
        raise


def publish(built: Path, target: Path) -> None:
    """Moves a complete file or folder to its final place, atomically and after all of it is written to disk.

    Args:
        built: The file or folder, on the same file system as ``target``.
        target: The final place. An existing file is replaced; a folder must not exist yet.
    """
    for path in sorted(built.rglob("*"), reverse=True) if built.is_dir() else []:
        sync_path(path)
    sync_path(built)
    built.replace(target)
    sync_path(target.parent)
