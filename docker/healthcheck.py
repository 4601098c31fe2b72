"""Healthy if a rank runs and a log or metrics file below /runs was written within the last 30 minutes.

``HEALTH_MINUTES`` changes that time; it must be longer than the time between two logged steps or epochs.
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


def count_ranks(proc: Path = PROC) -> int:
    """Number of processes that run one of distrain's commands, not counting torchrun."""
    count = 0
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # The process has ended meanwhile.
            continue
        command = b"distrain" in words or any(word.startswith(b"/app/launch/") for word in words)
        count += command and b"torchrun" not in b" ".join(words[:2])
    return count


def write_times(runs: Path = RUNS) -> Iterator[float]:
    """Last write times of the files that a training writes, in seconds since 1970."""
    for pattern in WATCHED:
        for path in runs.rglob(pattern):
            yield path.stat().st_mtime


def problem(now: float, proc: Path = PROC, runs: Path = RUNS) -> str | None:
    """Says why the container is unhealthy; ``None`` if it is healthy."""
    if not count_ranks(proc):
        return "no rank runs"
    minutes = float(os.environ.get("HEALTH_MINUTES", "30"))
    newest = max(write_times(runs), default=0.0)
    if now - newest > 60 * minutes:
        return f"nothing was logged for {minutes:g} minutes"
    return None


if __name__ == "__main__":
    reason = problem(time.time())
    if reason is not None:
        print(reason)
        sys.exit(1)
