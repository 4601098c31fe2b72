"""``logger=csv``: a table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.registry import register
from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import flush_and_sync
from distrain.reporting.loggers.base import Scalars, is_kept
from distrain.reporting.loggers.file_logger import FileLogger

_NAME = "metrics.csv"
_FIRST = ("kind", "step", "time")


@register("logger", "csv", LoggerConfig)
class CsvLogger(FileLogger):
    """Writes ``metrics.csv`` into the run's folder: a row for each logged step or epoch, a column for each number.

    A number that is first logged later in the run adds a column, for which the file is written anew. Cells of numbers
    that a row doesn't have are empty.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
    """

    def __init__(self, config: LoggerConfig, run_dir: Path) -> None:
        super().__init__(config)
        self._path, self._folder = run_dir / _NAME, ContainedFolder(run_dir)
        self._file = AppendedFile(self._folder, _NAME, self.may_create)
        #: Those of the file; empty: it has not been looked at, or there is none.
        self._columns: list[str] = []
        #: Rows that are not in the file, and not held by it either.
        self._waiting: list[dict[str, object]] = []

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        self._waiting.append({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        self.flush()

    @override
    def remove_after(self, step: int, *, mid_epoch: bool) -> None:
        def stays(row: dict[str, str]) -> bool:
            number = row.get("step", "")
            return number.isdecimal() and is_kept(int(number), row.get("kind", ""), step, mid_epoch=mid_epoch)

        self._rewrite(keep=stays)

    @override
    def write_values(self) -> None:
        added = list(dict.fromkeys(name for row in self._waiting for name in row))
        if any(name not in self._columns for name in added):
            self._rewrite(added)
        self._file.hold(_lines([row.get(name, "") for name in self._columns] for row in self._waiting))
        self._waiting = []
        self._file.flush()

    @override
    def close_files(self) -> None:
        self._file.close()

    def _rewrite(self, added: Sequence[str] = (), keep: Callable[[dict[str, str]], bool] = lambda row: True) -> None:
        """Writes the file anew, with further columns, and without the rows that are not to be kept."""
        self._file.close()
        old = self._read() if self._folder.exists(_NAME) else []
        if not old and not added:
            return
        names = old[0] if old else []
        columns = [*names, *(name for name in (*_FIRST, *added) if name not in names)]
        rows = [row for row in old[1:] if len(row) == len(names) and keep(dict(zip(names, row, strict=True)))]
        filler = [""] * (len(columns) - len(names))
        new_name = f".{_NAME}.new"
        with self._folder.create(new_name) as new:
            new.write(_lines([columns, *([*row, *filler] for row in rows)]))
            flush_and_sync(new)
        self._folder.rename(new_name, _NAME)
        self._columns = columns

    def _read(self) -> list[list[str]]:
        """The rows of the file, the names of its columns first; a last row that was cut off is left out."""
        with self._folder.open_file(_NAME, "rb") as file:
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1].decode(errors="replace")
        return list(csv.reader(io.StringIO(complete, newline="")))


def _lines(rows: Sequence[Sequence[object]] | Iterator[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
