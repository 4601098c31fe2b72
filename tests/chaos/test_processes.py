"""Processes are found by their mark, whoever their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from distrain.chaos import processes

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

MARK = f"test.{os.getpid()}"


@pytest.fixture
def start() -> Iterator[Any]:
    def begin(command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, processes.VARIABLE: MARK, **variables}
        return subprocess.Popen(command, env=environment, start_new_session=True)

    yield begin
    processes.kill(MARK)


def wait_for(count: int) -> None:
    deadline = time.monotonic() + 10
    while len(processes.marked(MARK)) != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_and_orphans_carry_the_mark_and_others_do_not(start: Any) -> None:
    start(["sleep", "60"])
    # Its parent ends at once.
    start(["sh", "-c", "sleep 60 & exit"]).wait()
    other = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(2)
        assert other.pid not in processes.marked(MARK)
        processes.kill(MARK)
        assert processes.marked(MARK) == {}
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_rank_is_the_first_process_that_has_its_number(start: Any) -> None:
    first = start(["sh", "-c", "sleep 60 & wait"], RANK="0")
    second = start(["sleep", "60"], RANK="1")
    start(["sleep", "60"])
    wait_for(4)
    assert processes.ranks(MARK) == {0: first.pid, 1: second.pid}


def test_a_process_that_is_gone_takes_no_signal(start: Any) -> None:
    process = start(["sleep", "60"])
    assert processes.send(process.pid, signal.SIGKILL)
    process.wait()
    assert not processes.send(process.pid, signal.SIGKILL)
