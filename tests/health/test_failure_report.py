"""Who failed first is told by every rank, and written once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from distrain.health.failure_report import (
    CLAIM,
    NO_CLAIM,
    Failure,
    FailureReporter,
    FirstFailure,
    archive_previous_report,
    is_broken_connection,
)


def store() -> Store:
    made: Store = HashStore()
    made.set(CLAIM, NO_CLAIM)
    return made


def complete(failure: Failure, _: Store | None) -> None:
    failure.samples = [3, 1]
    failure.others = [{"rank": 1 - failure.rank}]


def reporter(rank: int, folder: Path) -> FailureReporter:
    made = FailureReporter(rank)
    made.folder = folder
    return made


def test_the_first_to_know_writes_and_all_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = store()
    first, second = reporter(0, tmp_path), reporter(1, tmp_path)
    first.tell(Failure(2, "there", 5, "the process is gone"), "waited here", common, complete)
    written = (tmp_path / "failure.json").read_text()
    second.tell(Failure(1, "here", 5, "RuntimeError: connection closed"), "waited there", common, complete)
    line = "stopped because rank 2 on there failed at step 5: the process is gone"
    assert capsys.readouterr().err == f"distrain: rank 0 {line}\ndistrain: rank 1 {line}\n"
    assert (tmp_path / "failure.json").read_text() == written
    found = json.loads(written)
    assert found.pop("time")[:2] == "20"
    assert found == {
        "rank": 2,
        "host": "there",
        "step": 5,
        "error": "the process is gone",
        "samples": [3, 1],
        "traceback": "",
        "others": [{"rank": -1}],
    }


def test_a_process_tells_once_whoever_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teller = reporter(0, tmp_path)
    for error in ("first", "second"):
        teller.tell(Failure(0, "here", 1, error), "", store(), complete)
    assert capsys.readouterr().err == "distrain: rank 0 on here failed at step 1: first\n"


def test_without_a_store_a_rank_tells_what_it_knows(tmp_path: Path) -> None:
    reporter(0, tmp_path).tell(Failure(0, "here", 1, "broken"), "", None, complete)
    assert json.loads((tmp_path / "failure.json").read_text())["error"] == "broken"


def test_a_full_disk_does_not_hide_the_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        reporter(0, tmp_path / "not" / "there").tell(Failure(0, "here", 1, "broken"), "", None, complete)
    assert "rank 0 on here failed at step 1: broken" in capsys.readouterr().err
    assert "failure.json can't be written" in caplog.text


def test_a_claim_travels_as_text() -> None:
    claim = FirstFailure(Failure(1, "there", 5, 'KeyError: "ü"'), by=0)
    assert FirstFailure.unpacked(claim.packed().encode()) == claim
    assert FirstFailure.unpacked(NO_CLAIM.encode()) is None


def test_the_report_of_an_earlier_run_is_put_aside(tmp_path: Path) -> None:
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
        (ValueError("socket"), False),
    ],
)
def test_errors_that_may_be_the_echo_of_anothers_are_known(error: Exception, broken: bool) -> None:
    assert is_broken_connection(error) == broken
