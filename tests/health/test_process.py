"""Processes of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distrain.health.process import Process, _stat

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def of(child: subprocess.Popen[bytes]) -> Process:
    return Process(child.pid, _stat(child.pid)[1])


def wait_for(happened: object) -> None:
    deadline = time.monotonic() + 5
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_this_process_lives() -> None:
    assert Process.current().is_alive
    assert not Process.current().is_stopped


def test_a_zombie_does_not_live(child: subprocess.Popen[bytes]) -> None:
    process = of(child)
    assert process.is_alive
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: not process.is_alive)
    # Nobody has waited for it yet.
    assert child.returncode is None


def test_another_process_with_the_same_number_is_another_one(child: subprocess.Popen[bytes]) -> None:
    earlier = replace(of(child), started=1)
    assert not earlier.is_alive
    earlier.kill()
    time.sleep(0.05)
    assert of(child).is_alive


def test_a_stopped_process_stands_still_and_can_be_ended(child: subprocess.Popen[bytes]) -> None:
    process = of(child)
    assert not process.is_stopped
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: process.is_stopped)
    assert process.is_alive
    process.kill()
    assert child.wait(5) == -signal.SIGKILL
    process.kill()
