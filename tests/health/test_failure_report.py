"""Every rank reports the first failure, and one rank writes it to ``failure.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from distrain.health.activity import RankActivity
from distrain.health.failure_report import (
    FIRST_FAILURE_KEY,
    NO_FAILURE,
    Failure,
    FailureReporter,
    FirstFailure,
    archive_previous_report,
    is_broken_connection,
)


def make_store() -> Store:
    store: Store = HashStore()
    store.set(FIRST_FAILURE_KEY, NO_FAILURE)
    return store


def add_details(failure: Failure, _: Store | None) -> None:
    failure.samples = [3, 1]
    failure.others = [{"rank": 1 - failure.rank}]


def make_reporter(rank: int, run_dir: Path, mesh: Mapping[str, int] | None = None) -> FailureReporter:
    activity = RankActivity()
    activity.mesh = mesh or {"data": 2}
    reporter = FailureReporter(rank, activity.place_of)
    reporter.run_dir = run_dir
    return reporter


def test_the_first_rank_to_detect_a_failure_writes_it_and_all_report_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store()
    first, second = (make_reporter(rank, tmp_path, mesh={"data": 2, "shard": 1, "tensor": 2}) for rank in (0, 1))
    first.report(Failure(2, "there", 5, "the process exited"), "waited here", store, add_details)
    written = (tmp_path / "failure.json").read_text()
    second.report(Failure(1, "here", 5, "RuntimeError: connection closed"), "waited there", store, add_details)
    line = "stopped because rank 2 (data 1, tensor 0) on there failed at step 5: the process exited"
    assert capsys.readouterr().err == f"distrain: rank 0 {line}\ndistrain: rank 1 {line}\n"
    assert (tmp_path / "failure.json").read_text() == written
    report = json.loads(written)
    assert report.pop("time")[:2] == "20"
    assert report == {
        "rank": 2,
        "host": "there",
        "step": 5,
        "error": "the process exited",
        "place": {"data": 1, "tensor": 0},
        "samples": [3, 1],
        "traceback": "",
        "others": [{"rank": -1}],
    }


def test_a_process_reports_only_one_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = make_reporter(0, tmp_path)
    for error in ("first", "second"):
        reporter.report(Failure(0, "here", 1, error), "", make_store(), add_details)
    assert capsys.readouterr().err == "distrain: rank 0 on here failed at step 1: first\n"


def test_without_a_store_a_rank_reports_what_it_knows(tmp_path: Path) -> None:
    make_reporter(0, tmp_path).report(Failure(0, "here", 1, "broken"), "", None, add_details)
    assert json.loads((tmp_path / "failure.json").read_text())["error"] == "broken"


def test_a_report_that_cannot_be_written_does_not_hide_the_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    reporter = make_reporter(0, tmp_path / "file" / "run")
    reporter.report(Failure(0, "here", 1, "broken"), "", None, add_details)
    cannot, summary = capsys.readouterr().err.splitlines()
    assert cannot == f"distrain: {tmp_path}/file/run/failure.json can't be written: Not a directory"
    assert summary == "distrain: rank 0 on here failed at step 1: broken"


def test_the_first_failure_can_be_stored_as_text() -> None:
    first = FirstFailure(Failure(1, "there", 5, 'KeyError: "ü"'), detected_by=0)
    assert FirstFailure.from_json(first.to_json().encode()) == first
    assert FirstFailure.from_json(NO_FAILURE.encode()) is None


def test_the_report_of_an_earlier_run_is_archived(tmp_path: Path) -> None:
    archive_previous_report(tmp_path)
    (tmp_path / "failure.json").write_text("of the first run")
    archive_previous_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["previous_failure.json"]


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer"), True),
        (dist.DistNetworkError("reset"), True),
        (RuntimeError("shapes differ"), False),
        (RuntimeError("Rank 1 timed out waiting: Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Read error [10.0.0.1]:8000: Connection reset by peer"), True),
        (RuntimeError("Backend gloo does not support reduce_scatter of torch.int16"), False),
        (RuntimeError("ProcessGroupGloo: invalid tensor type, or layout"), False),
        (RuntimeError("my_gloomy_model: shapes differ"), False),
        (RuntimeError("shapes differ\nin a module called connection"), False),
        (RecursionError("connection"), False),
        (NotImplementedError("gloo"), False),
        (MemoryError("connection"), False),
        (ValueError("socket"), False),
    ],
)
def test_errors_that_may_be_caused_by_another_rank_are_recognised(error: Exception, broken: bool) -> None:
    assert is_broken_connection(error) == broken
