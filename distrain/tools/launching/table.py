"""Formats the results of a sweep as a table for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from distrain.files.escaping import Lines
from distrain.tools.launching.jobs import DONE, JobResult

#: Columns of the CSV file from ``summary.json``; dotted paths name parts of a value.
_CSV_COLUMNS = (
    "val_accuracy",
    "test_accuracy",
    "test_loss",
    "train_loss",
    "epochs",
    "steps",
    "images_per_second",
    "step_ms.mean",
    "step_ms.p95",
    "bytes_sent_per_step",
    "bytes_uncompressed_per_step",
    "peak_memory_mb",
)
_TEXT_COLUMNS = (
    "val_accuracy",
    "test_accuracy",
    "test_loss",
    "images_per_second",
    "step_ms.mean",
    "bytes_sent_per_step",
)


def summary_value(result: JobResult, path: str) -> Any:
    """Returns a value of the job's summary by its dotted path, or ``None``."""
    value: Any = result.summary
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def summary_number(result: JobResult, path: str) -> float | None:
    """Returns a value of the job's summary by its dotted path if it is a finite number, or ``None``."""
    value = summary_value(result, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ranked(results: Iterable[JobResult], metric: str) -> list[JobResult]:
    """Sorts results by a metric, best first: the lowest for losses and errors, the highest for other metrics.

    Results without the metric come last, in their order.
    """
    sign = 1 if metric.rpartition(".")[2].endswith(("loss", "mse", "mae")) else -1

    def key(result: JobResult) -> tuple[bool, float]:
        number = summary_number(result, metric)
        return (number is None, 0.0 if number is None else sign * number)

    return sorted(results, key=key)


def swept_keys(results: Iterable[JobResult]) -> list[str]:
    """Returns the keys in which the jobs differ, in the order in which the user typed them."""
    return list(dict.fromkeys(key for result in results for key in result.job.swept))


def to_csv(results: Sequence[JobResult]) -> str:
    """Returns one row per job, in their order."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    keys = swept_keys(results)
    writer.writerow(["job", *keys, "status", *_CSV_COLUMNS, "seconds", "reason", "folder"])
    for result in results:
        swept = [result.job.swept.get(key, "") for key in keys]
        cells = [summary_value(result, path) for path in _CSV_COLUMNS]
        seconds = f"{result.seconds:.1f}"
        writer.writerow([result.job.name, *swept, result.status, *cells, seconds, result.reason, result.job.folder])
    return text.getvalue()


def to_text(results: Sequence[JobResult], metric: str) -> Lines:
    """Returns a table of the finished jobs, best first, and below it one line for each other job."""
    keys = swept_keys(results)
    columns = [metric, *(path for path in _TEXT_COLUMNS if path != metric)]
    rows = [["job", *keys, *columns, "seconds"]]
    for result in ranked((result for result in results if result.status == DONE), metric):
        swept = [result.job.swept.get(key, "") for key in keys]
        cells = [_format_cell(summary_value(result, path)) for path in columns]
        rows.append([result.job.name.partition("_")[0], *swept, *cells, f"{result.seconds:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left_aligned = 1 + len(keys)
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    unfinished = [result for result in results if result.status != DONE]
    lines += [f"{result.job.name}: {result.status}: {result.reason}" for result in unfinished]
    done = len(results) - len(unfinished)
    lines.append(f"{done} of {len(results)} jobs are done" + (f", {len(unfinished)} not" if unfinished else ""))
    return Lines.of(lines)


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
