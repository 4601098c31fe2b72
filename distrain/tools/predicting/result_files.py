"""The files of a prediction: JSON, JSON Lines, CSV and Parquet, written row by row, so that any number of rows fits."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from distrain.errors import ConfigError

#: The prediction for an image: its ``path``, and the entries that the task makes from the model's output, or ``error``:
#: why the file can't be decoded. ``mask``, of a task that makes one, is the class of each pixel, uint8 [H, W]; in a
#: result file, the path of the file that holds it.
Prediction = dict[str, Any]
#: Gives all rows from the first on; called once more for formats whose columns must be known before the first row.
Rows = Callable[[], Iterable[Prediction]]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
#: Name of the entry that says why there is no prediction; the last column of a table.
ERROR = "error"
#: Rows of a Parquet file that are in memory at a time.
_ROWS = 1 << 14


def check_suffix(setting: str) -> None:
    """Refuses the name of a result file whose ending names no format that can be written.

    Raises:
        ConfigError: There is no such format, or its library is missing.
    """
    suffix = Path(setting).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError("output", setting, "the ending must name the format", SUFFIXES)
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - only whether it is there
        except ImportError as error:
            problem = "Parquet needs pyarrow; run pip install 'distrain[table]', or write .csv or .jsonl"
            raise ConfigError("output", setting, problem) from error


def write(path: Path, suffix: str, rows: Rows) -> None:
    """Writes a result file.

    Args:
        path: The file.
        suffix: One of :data:`SUFFIXES`.
        rows: The predictions.

    Raises:
        OSError: The file can't be written.
    """
    if suffix == ".parquet":
        _write_parquet(path, rows)
        return
    # As bytes of their own where a path is not UTF-8; JSON escapes them.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        if suffix == ".csv":
            _write_csv(file, rows)
        else:
            file.writelines(_json_lines(rows()) if suffix == ".jsonl" else _json_list(rows()))


def to_json(predictions: Sequence[Prediction]) -> str:
    """JSON: a list with an object per image."""
    return "".join(_json_list(predictions))


def to_csv(predictions: Sequence[Prediction]) -> str:
    """CSV with a header; see :func:`_cells` for its columns."""
    text = io.StringIO(newline="")
    _write_csv(text, lambda: predictions)
    return text.getvalue()


def _json_lines(rows: Iterable[Prediction]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in rows)


def _json_list(rows: Iterable[Prediction]) -> Iterator[str]:
    """What ``json.dumps(list, indent=2)`` gives, row by row."""
    before = "[\n  "
    for row in rows:
        yield before + json.dumps(row, indent=2).replace("\n", "\n  ")
        before = ",\n  "
    yield "[]\n" if before.startswith("[") else "\n]\n"


def _write_csv(file: IO[str], rows: Rows) -> None:
    columns = _columns(map(_cells, rows()))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _joined(value) for name, value in _cells(row).items()} for row in rows())


def _joined(value: Any) -> Any:
    return ";".join(map(str, value)) if isinstance(value, list) else value


def _cells(prediction: Prediction) -> dict[str, Any]:
    """The cells of a prediction, by column.

    Columns of the second ranked answer end with ``_2``, of the third with ``_3``, and so on. A value by name, such as
    the probability of a label, has a column of its own.
    """
    cells: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{inner}": number for inner, number in value.items()}
        elif name != "top":
            cells[name] = value
    for rank, answer in enumerate(prediction.get("top", ())[1:], start=2):
        cells |= {f"{name}_{rank}": value for name, value in answer.items()}
    return cells


def _columns(rows: Iterable[dict[str, Any]]) -> dict[str, set[type]]:
    """The types that occur in each column; the columns in the order of their first occurrence, the error last."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, set()).add(type(value))
    if ERROR in found:
        found[ERROR] = found.pop(ERROR)
    return found


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
    columns = _columns(map(_cells, rows()))
    fields = [
        pa.field(name, pa.float64() if types == {int, float} else known[next(iter(types))])
        for name, types in columns.items()
    ]
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in _chunks(map(_cells, rows()), _ROWS):
            arrays = [pa.array([_utf8(row.get(field.name)) for row in chunk], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _utf8(value: Any) -> Any:
    """A value as Parquet takes it: bytes of a path that are not UTF-8 are shown by their numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return value


def _chunks(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
