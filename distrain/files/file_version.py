"""Tells whether a file has been written since it was looked at, whatever the clock does meanwhile."""

from __future__ import annotations

from pathlib import Path


def file_version(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is written or replaced; ``None`` if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
