"""Reads tables, a file of CSV, TSV or Parquet, into columns of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError
from distrain.files.untrusted import open_regular

#: What separates the cells of a row, where it isn't a comma. The header tells which one it is.
_SEPARATORS = (",", ";", "\t")
#: Rows that are taken apart at once.
_CHUNK_ROWS = 10_000
#: Most characters of a cell.
_LONGEST_CELL = 1 << 20
#: Most columns that a message names.
_NAMED = 20


@dataclass(frozen=True)
class Table:
    """Some columns of a table.

    Attributes:
        path: The file.
        rows: Number of each row, as a spreadsheet counts them: the header is row 1.
        columns: Text of the cells of each column that was asked for, without spaces around it.
    """

    path: Path
    rows: Sequence[int]
    columns: dict[str, list[str]]

    def wrong(self, index: int, column: str, problem: str) -> ConfigError:
        """The error for a cell.

        Args:
            index: Index of the row in ``rows``.
            column: Name of the column.
            problem: What is wrong; it follows the cell's place.
        """
        return ConfigError("data.root", self.path, f"row {self.rows[index]}, column {column}: {problem}")


def read_table(path: Path, needed: Sequence[str], keys: dict[str, str], optional: Sequence[str] = ()) -> Table:
    """Reads some columns of a table.

    Args:
        path: The file; its suffix says which format it has.
        needed: Names of columns that it must have.
        keys: For each of them the configuration key that names it.
        optional: Names of columns that it may have.

    Raises:
        ConfigError: The file can't be read or has no such columns, or a row has another number of cells than the
            header.
    """
    if not path.is_file():
        what = "is a folder; name the table in it" if path.is_dir() else "there is no such table (.csv, .tsv, .parquet)"
        raise ConfigError("data.root", path, what)
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path, needed, keys, optional)
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ConfigError("data.root", path, "is a spreadsheet; save it as CSV")
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would become a part of the first name.
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problem = f"line {line} is not UTF-8 ({error.reason}); iconv -f WINDOWS-1252 -t UTF-8, for example, converts it"
        raise ConfigError("data.root", path, problem) from error
    except ValueError as error:
        raise ConfigError("data.root", path, str(error)) from error
    return _read_text(path, text, needed, keys, optional)


def _read_text(path: Path, text: str, needed: Sequence[str], keys: dict[str, str], optional: Sequence[str]) -> Table:
    csv.field_size_limit(_LONGEST_CELL)
    first_line = text.partition("\n")[0].partition("\r")[0]
    if not first_line.strip():
        raise ConfigError("data.root", path, "begins with an empty line; the first row holds the columns' names")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(first_line, needed), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        return _take_columns(path, header, _wanted(path, header, needed, keys, optional), reader)
    except csv.Error as error:
        raise ConfigError("data.root", path, f"line {reader.line_num}: {error}") from error


def _separator(line: str, needed: Sequence[str]) -> str:
    """The separator with which the header has the most of the needed columns."""
    found = dict.fromkeys(_SEPARATORS, 0)
    for separator in found:
        names = {name.strip() for name in next(csv.reader([line], delimiter=separator), [])}
        found[separator] = 2 * len(names & set(needed)) + (len(names) > 1)
    return max(found, key=lambda separator: found[separator])


def _wanted(
    path: Path, header: Sequence[str], needed: Sequence[str], keys: dict[str, str], optional: Sequence[str]
) -> list[str]:
    """The columns to read.

    Raises:
        ConfigError: A needed column is missing, or there are two of the same name.
    """
    for name in needed:
        if name not in header:
            raise ConfigError(keys[name], name, f"{path} has no such column", header[:_NAMED])
    wanted = list(dict.fromkeys([*needed, *(name for name in optional if name in header)]))
    for name in wanted:
        if header.count(name) > 1:
            raise ConfigError("data.root", path, f"the header has two columns {name}")
    return wanted


def _take_columns(path: Path, header: Sequence[str], wanted: Sequence[str], reader: Iterator[list[str]]) -> Table:
    places = {name: header.index(name) for name in wanted}
    columns: dict[str, list[str]] = {name: [] for name in wanted}
    rows: list[int] = []
    first = 2
    while chunk := list(islice(reader, _CHUNK_ROWS)):
        numbers: Sequence[int] = range(first, first + len(chunk))
        first += len(chunk)
        if set(map(len, chunk)) != {len(header)}:
            # Only a row of one empty cell, or of none, is a blank line.
            kept = [(number, row) for number, row in zip(numbers, chunk, strict=True) if any(map(str.strip, row))]
            for number, row in kept:
                if len(row) != len(header):
                    problem = f"row {number} has {len(row)} cells, and the header {len(header)}"
                    raise ConfigError("data.root", path, f"{problem}; a cell with a separator in it needs quotes")
            numbers, chunk = [number for number, _ in kept], [row for _, row in kept]
        rows.extend(numbers)
        for name, place in places.items():
            columns[name].extend(map(str.strip, map(itemgetter(place), chunk)))
    if not rows:
        raise ConfigError("data.root", path, "has no rows below the header")
    return Table(path, rows, columns)


def _read_parquet(path: Path, needed: Sequence[str], keys: dict[str, str], optional: Sequence[str]) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        problem = "Parquet needs pyarrow; run pip install 'distrain[table]', or save the table as CSV"
        raise ConfigError("data.root", path, problem) from error
    try:
        file = parquet.ParquetFile(path)
        header = list(file.schema_arrow.names)
        wanted = _wanted(path, header, needed, keys, optional)
        columns = {name: [_to_text(value) for value in file.read([name])[name].to_pylist()] for name in wanted}
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("data.root", path, f"is no Parquet file, or a damaged one ({error})") from error
    count = len(columns[wanted[0]])
    if not count:
        raise ConfigError("data.root", path, "has no rows")
    return Table(path, range(1, count + 1), columns)


def _to_text(value: Any) -> str:
    """A cell of Parquet as in CSV: nothing for null, and 0 or 1 for a truth value."""
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value).strip()
