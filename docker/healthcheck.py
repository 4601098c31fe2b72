"""Healthy as long as a rank runs and some run's log or metrics below /runs has grown within the last half hour.

``HEALTH_MINUTES`` says otherwise how long; it must be longer than the time between two logged steps or epochs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

RUNS = Path("/runs")
PROC = Path("/proc")
WATCHED = ("metrics.jsonl", "rank_*.log")


def ranks(proc: Path = PROC) -> int:
    """Processes that run one of distrain's scripts, without the torchrun above them."""
    found = 0
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        found += any(word.startswith(b"/app/launch/") for word in words) and b"torchrun" not in b" ".join(words[:2])
    return found


def signs_of_life(runs: Path = RUNS) -> Iterator[float]:
    """When files that a training writes were last written, in seconds since 1970."""
    for pattern in WATCHED:
        for path in runs.rglob(pattern):
            yield path.stat().st_mtime


def problem(now: float, proc: Path = PROC, runs: Path = RUNS) -> str | None:
    """What is wrong, if anything is."""
    if not ranks(proc):
        return "no rank runs"
    minutes = float(os.environ.get("HEALTH_MINUTES", "30"))
    newest = max(signs_of_life(runs), default=0.0)
    if now - newest > 60 * minutes:
        return f"nothing was logged for {minutes:g} minutes"
    return None


if __name__ == "__main__":
    found = problem(time.time())
    if found is not None:
        print(found)
        sys.exit(1)
