"""Writes result files: checks beforehand that they can be written, and leaves them complete or absent."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from distrain.data.build_folder import publish
from distrain.errors import ConfigError

_KEY = "output"


def check_writable(path: Path) -> None:
    """Checks that a file can be written at a path.

    Raises:
        ConfigError: Its folder is missing or read-only, or the path is not a plain file.
    """
    if not path.parent.is_dir():
        raise ConfigError(_KEY, path, f"there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(_KEY, path, f"the folder {path.parent} is read-only")
    if path.exists() and not path.is_file():
        raise ConfigError(_KEY, path, "is not a plain file; - writes to the standard output")


def check_new_folder(path: Path) -> None:
    """Checks that a folder can be made at a path.

    Raises:
        ConfigError: Its parent is missing or read-only, or there is something at the path.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError(_KEY, path, "is there already; name a folder that is new")
    check_writable(path)


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Writes a temporary file or folder and moves it to its place when it is complete.

    A symbolic link at the path is replaced, never followed: a run's folder may hold one that points elsewhere.

    Args:
        path: Path of the file, and an existing file is replaced; or of a folder, which must not exist.
        make: Writes the file or folder at the path that it is given.

    Raises:
        ConfigError: The file can't be written, for example because the disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".distrain-", dir=path.parent) as folder:
            built = Path(folder, path.name)
            make(built)
            publish(built, path)
    except OSError as error:
        raise ConfigError(_KEY, path, f"can't be written ({error.strerror or error})") from error


def write_text(path: Path | None, text: str) -> None:
    """Writes text as UTF-8 to a file, or to the standard output where ``path`` is ``None``.

    Surrogate escapes, which stand for bytes of paths that are not UTF-8, become these bytes again.
    """
    content = text.encode("utf-8", "surrogateescape")
    if path is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write(path, lambda built: built.write_bytes(content))
