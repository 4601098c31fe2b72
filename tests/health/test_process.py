"""Processes of this host: alive, stopped, or ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distrain.health.process import Process, _state_and_start, seconds_since_start
from tests.harness import HANG_SECONDS

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def process_of(child: subprocess.Popen[bytes]) -> Process:
    return Process(child.pid, _state_and_start(child.pid)[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_this_process_is_alive() -> None:
    assert Process.current().is_alive
    assert not Process.current().is_stopped


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.EIO])
def test_a_process_is_not_taken_for_ended_because_proc_cannot_be_read(
    number: int, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(child)

    def fail(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_text", fail)
    assert process.is_alive
    child.kill()
    child.wait()
    assert not process.is_alive


def test_the_age_of_a_process(child: subprocess.Popen[bytes]) -> None:
    mine, childs = seconds_since_start(os.getpid()), seconds_since_start(child.pid)
    assert mine is not None
    assert childs is not None
    assert 0 <= childs < mine
    child.kill()
    child.wait()
    assert seconds_since_start(child.pid) is None


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    process = process_of(child)
    assert process.is_alive
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: not process.is_alive)
    # Its parent has not waited for it yet.
    assert child.returncode is None


def test_a_process_that_got_the_same_id_later_is_not_mistaken_for_it(child: subprocess.Popen[bytes]) -> None:
    earlier = replace(process_of(child), started=1)
    assert not earlier.is_alive
    earlier.kill()
    time.sleep(0.05)
    assert process_of(child).is_alive


def test_a_stopped_process_is_recognised_and_can_be_killed(child: subprocess.Popen[bytes]) -> None:
    process = process_of(child)
    assert not process.is_stopped
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: process.is_stopped)
    assert process.is_alive
    process.kill()
    assert child.wait(HANG_SECONDS) == -signal.SIGKILL
    process.kill()


def test_a_process_gets_time_to_end_unless_a_signal_has_suspended_it(child: subprocess.Popen[bytes]) -> None:
    process = process_of(child)
    began = time.monotonic()
    process.kill_after(0.2)
    assert time.monotonic() - began > 0.2
    assert child.wait() == -signal.SIGKILL
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as other:
        stopped = process_of(other)
        other.send_signal(signal.SIGSTOP)
        wait_for(lambda: stopped.is_stopped)
        stopped.kill_after(60)
        assert other.wait(HANG_SECONDS) == -signal.SIGKILL
