"""The table of a sweep: the best first, every failure named."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from distrain.tools.launching import table
from distrain.tools.launching.jobs import DONE, FAILED, TIMED_OUT, Job, JobResult


def result(number: int, status: str, reason: str = "", **summary: Any) -> JobResult:
    name = f"{number:03d}_compression=fp16"
    job = Job(name, {"compression": "fp16", "lr": str(number)}, ("compression=fp16",), Path("sweep", name))
    return JobResult(job, status, reason, 12.34, summary)


RESULTS = [
    result(0, DONE, val_accuracy=0.5, test_loss=0.1, step_ms={"mean": 20.0}, bytes_sent_per_step=4096),
    result(1, FAILED, "rank 0 on a at step 1: bad \x1b[2J luck"),
    result(2, DONE, val_accuracy=0.75, test_loss=0.2),
    result(3, TIMED_OUT, "ended after 1 minutes"),
    result(4, DONE, val_accuracy=None, test_loss=float("nan")),
]


def test_best_job_is_first_and_jobs_without_the_metric_are_last() -> None:
    done = [result for result in RESULTS if result.status == DONE]
    assert [one.job.name[:3] for one in table.ranked(done, "val_accuracy")] == ["002", "000", "004"]
    assert [one.job.name[:3] for one in table.ranked(done, "test_loss")] == ["000", "002", "004"]


def test_text_has_a_row_for_each_finished_job_and_a_line_for_each_other() -> None:
    rows = table.to_text(RESULTS, "val_accuracy").splitlines()
    assert rows[0].split()[:4] == ["job", "compression", "lr", "val_accuracy"]
    assert [row.split()[0] for row in rows[1:4]] == ["002", "000", "004"]
    assert rows[2].split() == ["000", "fp16", "0", "0.5000", "-", "0.1000", "-", "20.0", "4,096", "12.3"]
    assert rows[4] == "001_compression=fp16: failed: rank 0 on a at step 1: bad \\x1b[2J luck"
    assert rows[5] == "003_compression=fp16: over its time limit: ended after 1 minutes"
    assert rows[6] == "3 of 5 jobs are done, 2 not"


def test_csv_has_all_jobs_in_order() -> None:
    rows = list(csv.DictReader(io.StringIO(table.to_csv(RESULTS))))
    assert [row["job"][:3] for row in rows] == ["000", "001", "002", "003", "004"]
    assert (rows[0]["compression"], rows[0]["lr"], rows[0]["step_ms.mean"]) == ("fp16", "0", "20.0")
    assert (rows[1]["status"], rows[1]["val_accuracy"], rows[1]["reason"][:6]) == ("failed", "", "rank 0")


def test_metric_may_be_part_of_a_value() -> None:
    assert table.summary_number(RESULTS[0], "step_ms.mean") == 20.0
    assert table.summary_number(RESULTS[0], "step_ms.p50") is None
    assert table.summary_number(RESULTS[0], "val_accuracy.mean") is None
