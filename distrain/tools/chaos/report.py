"""What a campaign came to: a table for people, and JSON for machines."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from distrain.tools.chaos.disturbed import Recovery

_HEADINGS = ("fault", "training", "faults", "recovered", "identical", "notice s", "(most)", "go on s", "(most)")


def table(recoveries: Sequence[Recovery]) -> str:
    """A line for each kind of fault and training, and one for all; seconds as median and maximum."""
    groups: dict[tuple[str, str], list[Recovery]] = {}
    for each in sorted(recoveries, key=lambda each: each.fault.kind):
        groups.setdefault((each.fault.kind, each.training), []).append(each)
    lines = [_HEADINGS, *(_row(*names, group) for names, group in groups.items()), _row("all", "", recoveries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join(
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
        str(sum(each.recovered for each in group)),
        str(sum(each.identical for each in group)),
        *_seconds([each.notice_seconds for each in group]),
        *_seconds([each.go_on_seconds for each in group]),
    )


def _seconds(found: Sequence[float | None]) -> tuple[str, str]:
    known = [seconds for seconds in found if seconds is not None]
    return (f"{statistics.median(known):.1f}", f"{max(known):.1f}") if known else ("–", "–")


def content(recoveries: Sequence[Recovery], settings: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as plain data."""
    return {
        "settings": settings,
        "faults": len(recoveries),
        "recovered": sum(each.recovered for each in recoveries),
        "identical": sum(each.identical for each in recoveries),
        "recoveries": [dataclasses.asdict(each) | {"recovered": each.recovered} for each in recoveries],
    }
