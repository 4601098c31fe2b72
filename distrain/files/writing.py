"""Writing files: plain data as JSON or YAML, and syncing to the disk."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

log = logging.getLogger(__name__)


def to_json(content: Mapping[str, Any]) -> str:
    """Plain data as indented JSON. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_without_nonfinite(content), indent=2, allow_nan=False) + "\n"


def to_yaml(content: Mapping[str, Any]) -> str:
    """Plain data as YAML, with the keys in their order."""
    return str(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


@contextlib.contextmanager
def losing_on_disk_errors(what: str) -> Iterator[None]:
    """Runs a block that writes something a run can do without; an error of the disk is logged, and the run goes on.

    Args:
        what: What is lost, at the beginning of a sentence.
    """
    try:
        yield
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        log.error("%s can't be written (%s%s). The run goes on", what, path, error.strerror or error)


def flush_and_sync(file: IO[bytes]) -> None:
    """Writes a file's buffer out and syncs its content to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Syncs a file's content, or a folder's entries, to the disk, so that it survives a crash of the machine."""
    flags = os.O_RDONLY
    if not hasattr(os, "O_DIRECTORY"):
        # Windows opens no folders, and syncs a file only for who may write it.
        if path.is_dir():
            return
        flags = os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
