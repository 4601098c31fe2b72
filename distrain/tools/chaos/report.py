"""The results of a campaign, as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from distrain.files.escaping import Lines
from distrain.tools.chaos.disturbed_run import Recovery

_HEADINGS = (
    "fault", "training", "faults", "recovered", "identical", "to end s", "(max)", "to resume s", "(max)",
)  # fmt: skip


def table(recoveries: Sequence[Recovery]) -> Lines:
    """One line per kind of fault and training, and one line for all; times as median and maximum in seconds."""
    groups: dict[tuple[str, str], list[Recovery]] = {}
    for recovery in sorted(recoveries, key=lambda recovery: recovery.fault.kind):
        groups.setdefault((recovery.fault.kind, recovery.training), []).append(recovery)
    lines = [_HEADINGS, *(_row(*names, group) for names, group in groups.items()), _row("all", "", recoveries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return Lines.of(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _row(kind: str, training: str, group: Sequence[Recovery]) -> tuple[str, ...]:
    return (
        kind,
        training,
        str(len(group)),
        str(sum(recovery.recovered for recovery in group)),
        str(sum(recovery.identical for recovery in group)),
        *_median_and_maximum([recovery.notice_seconds for recovery in group]),
        *_median_and_maximum([recovery.go_on_seconds for recovery in group]),
    )


def _median_and_maximum(times: Sequence[float | None]) -> tuple[str, str]:
    known = [seconds for seconds in times if seconds is not None]
    return (f"{statistics.median(known):.1f}", f"{max(known):.1f}") if known else ("–", "–")


def content(recoveries: Sequence[Recovery], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything known about the recoveries, as plain data."""
    return {
        "settings": settings,
        "faults": len(recoveries),
        "recovered": sum(recovery.recovered for recovery in recoveries),
        "identical": sum(recovery.identical for recovery in recoveries),
        "recoveries": [dataclasses.asdict(recovery) | {"recovered": recovery.recovered} for recovery in recoveries],
    }
