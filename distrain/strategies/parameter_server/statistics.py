"""What a run with a parameter server reports: each worker's steps and staleness, lost workers, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def merge_statistics(by_server: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One worker's statistics over all servers; steps and samples are those that the first server counted."""
    return {
        **by_server[0],
        "staleness": _sum_histograms(
            [{int(updates): count for updates, count in server["staleness"].items()} for server in by_server]
        ),
        "lead": max(server["lead"] for server in by_server),
        "pushed": sum(server["pushed"] for server in by_server),
        "pulled": sum(server["pulled"] for server in by_server),
        "lost": next((server["lost"] for server in by_server if server["lost"] is not None), None),
    }


def report_statistics(by_server: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``summary.json`` says of servers and workers.

    Args:
        by_server: What each server counted.
        workers: :func:`merge_statistics` of each worker.
    """
    return {
        "updates": by_server[0]["updates"],
        "samples": sum(worker["samples"] for worker in workers),
        "workers": [
            {
                **{key: worker[key] for key in ("rank", "host", "steps", "samples")},
                "staleness": _summarise_staleness(worker["staleness"]),
                "steps_ahead_max": worker["lead"],
            }
            for worker in workers
        ],
        "staleness": _summarise_staleness(_sum_histograms([worker["staleness"] for worker in workers])),
        "lost_workers": [
            {"rank": worker["rank"], "host": worker["host"], "after_steps": worker["steps"], "reason": worker["lost"]}
            for worker in workers
            if worker["lost"] is not None
        ],
        "shards": [{"tensors": server["tensors"], "bytes": server["bytes"]} for server in by_server],
        "bytes_pushed": sum(worker["pushed"] for worker in workers),
        "bytes_pulled": sum(worker["pulled"] for worker in workers),
    }


def _sum_histograms(histograms: Sequence[Mapping[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(sorted(total.items()))


def _summarise_staleness(histogram: Mapping[int, int]) -> dict[str, Any]:
    """Mean, maximum and histogram of the number of updates by which pushes were late."""
    count = sum(histogram.values())
    mean = sum(staleness * pushes for staleness, pushes in histogram.items()) / count if count else math.nan
    return {"mean": mean, "max": max(histogram, default=0), "histogram": {str(k): v for k, v in histogram.items()}}
