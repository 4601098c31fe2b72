"""What the jobs of a sweep came to, as a table for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from distrain.files.untrusted import printable
from distrain.tools.launching.jobs import DONE, Result

#: Numbers of ``summary.json`` in the CSV file, under these names or, for parts of one, these paths.
_NUMBERS = (
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
_SHOWN = ("val_accuracy", "test_accuracy", "test_loss", "images_per_second", "step_ms.mean", "bytes_sent_per_step")


def value(result: Result, path: str) -> Any:
    """A value of the job's summary by its dotted path; ``None`` where there is none."""
    found: Any = result.summary
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def number(result: Result, path: str) -> float | None:
    """The same where it is a finite number."""
    found = value(result, path)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def ranked(results: Iterable[Result], metric: str) -> list[Result]:
    """The best first (a loss: the lowest; anything else: the highest), those without the number last, in order."""
    sign = 1 if metric.rpartition(".")[2].endswith("loss") else -1

    def key(result: Result) -> tuple[bool, float]:
        found = number(result, metric)
        return (found is None, 0.0 if found is None else sign * found)

    return sorted(results, key=key)


def keys(results: Iterable[Result]) -> list[str]:
    """What the jobs differ in, in the order in which it was typed."""
    return list(dict.fromkeys(key for result in results for key in result.job.chosen))


def to_csv(results: Sequence[Result]) -> str:
    """One row a job, in their order."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    differ = keys(results)
    writer.writerow(["job", *differ, "status", *_NUMBERS, "seconds", "reason", "folder"])
    for one in results:
        cells = [value(one, path) for path in _NUMBERS]
        own = [one.job.chosen.get(key, "") for key in differ]
        seconds = f"{one.seconds:.1f}"
        writer.writerow([one.job.name, *own, one.status, *cells, seconds, one.reason, one.job.folder])
    return text.getvalue()


def to_text(results: Sequence[Result], metric: str) -> str:
    """The jobs as people read them, the best first; below it, one line for each that is not done."""
    differ = keys(results)
    shown = [metric, *(path for path in _SHOWN if path != metric)]
    rows = [["job", *differ, *shown, "seconds"]]
    for one in ranked((result for result in results if result.status == DONE), metric):
        cells = [_short(value(one, path)) for path in shown]
        own = [printable(one.job.chosen.get(key, "")) for key in differ]
        rows.append([one.job.name.partition("_")[0], *own, *cells, f"{one.seconds:.1f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = 1 + len(differ)
    found = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        found.append("  ".join(cells).rstrip())
    missing = [result for result in results if result.status != DONE]
    found += [f"{printable(one.job.name)}: {one.status}: {printable(one.reason)}" for one in missing]
    done = len(results) - len(missing)
    found.append(f"{done} of {len(results)} jobs are done" + (f", {len(missing)} not" if missing else ""))
    return "\n".join(found)


def _short(found: Any) -> str:
    if isinstance(found, float):
        return f"{found:.4f}" if abs(found) < 10 else f"{found:,.1f}"
    return "-" if found is None else f"{found:,}" if isinstance(found, int) else str(found)
