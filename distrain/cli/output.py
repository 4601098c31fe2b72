"""Result files: refused before the work begins if they can't be written, and complete or absent after it."""

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
    """Finds out whether a file can be written there.

    Raises:
        ConfigError: Its folder is missing or read-only, or something else than a file has the name.
    """
    if not path.parent.is_dir():
        raise ConfigError(_KEY, path, f"there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(_KEY, path, f"the folder {path.parent} is read-only")
    if path.exists() and not path.is_file():
        raise ConfigError(_KEY, path, "is not a plain file; - writes to the standard output")


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Lets ``make`` write a file and puts it in its place when it is complete.

    The name itself is replaced: a link that a run's folder holds under it is never followed.

    Args:
        path: Where the file goes; what is there is replaced.
        make: Writes the file at the path it is given.

    Raises:
        ConfigError: The file can't be written (no space left, say).
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

    Paths in it that are no UTF-8 become the bytes they are.
    """
    content = text.encode("utf-8", "surrogateescape")
    if path is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write(path, lambda built: built.write_bytes(content))
