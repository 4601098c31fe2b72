"""``metrics.jsonl``, which every run has."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import override

from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder
from distrain.files.untrusted import UnreadableFile, open_regular
from distrain.files.writing import flush_and_sync
from distrain.reporting.loggers.base import Scalars, is_kept
from distrain.reporting.loggers.file_logger import FileLogger

log = logging.getLogger(__name__)


class MetricsFile(FileLogger):
    """Writes ``metrics.jsonl``: one JSON object per logged step or epoch; NaN and infinities become ``null``.

    Args:
        path: The file; rows are appended.

    Attributes:
        NAME: Its name in a run's folder.
    """

    NAME = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._folder = path, ContainedFolder(path.parent)
        self._file = AppendedFile(self._folder, path.name, self.may_create)

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        # JSON has no NaN, and other parsers reject the `NaN` that Python writes by default.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **finite}
        self._file.hold(f"{json.dumps(row, allow_nan=False)}\n".encode())
        self.flush()

    @override
    def write_values(self) -> None:
        self._file.flush()

    @override
    def close_files(self) -> None:
        self._file.close()

    @override
    def remove_after(self, step: int, *, mid_epoch: bool) -> None:
        name, folder = self._path.name, self._folder
        if not folder.exists(name):
            return
        new_name = f".{name}.new"
        invalid = 0
        with folder.open_file(name, "rb") as old, folder.create(new_name) as new:
            for line in old:
                row = _step_and_kind(line)
                if row is None:
                    invalid += 1
                elif is_kept(*row, step, mid_epoch=mid_epoch):
                    new.write(line)
            unchanged = new.tell() == old.tell()
            flush_and_sync(new)
        # The file is replaced atomically, and only if a row was removed.
        if unchanged:
            folder.unlink(new_name)
        else:
            folder.rename(new_name, name)
        if invalid:
            log.warning("removed %d lines from %s that are truncated or not valid rows", invalid, self._path)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete, valid rows of a ``metrics.jsonl``, in order; none if there is no such file.

    Raises:
        OSError: It can't be read.
    """
    try:
        with open_regular(path) as file:
            for line in file:
                if _step_and_kind(line) is not None:
                    yield json.loads(line)
    except FileNotFoundError:
        return
    except UnreadableFile as error:
        raise OSError(str(error)) from error


def _step_and_kind(line: bytes) -> tuple[int, str] | None:
    """Step and kind of a line of ``metrics.jsonl``; ``None`` if it is not a complete, valid row."""
    try:
        row = json.loads(line)
        return (int(row["step"]), str(row["kind"])) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
