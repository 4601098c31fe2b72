"""Writing files: plain data as JSON or YAML, and syncing to the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml


def to_json(content: Mapping[str, Any]) -> str:
    """Plain data as indented JSON. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_without_nonfinite(content), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data as JSON; see :func:`to_json`."""
    path.write_text(to_json(content))


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Like :func:`write_json`, but atomic: readers see the old file or the new one, even if several processes write."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(temporary, content)
    temporary.replace(path)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data as YAML and keeps the order of the keys."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def flush_and_sync(file: IO[bytes]) -> None:
    """Writes a file's buffer out and syncs its content to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Syncs a file's content, or a folder's entries, to the disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
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
