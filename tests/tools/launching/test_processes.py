"""A child's exit code, its standard input, and that nothing is left of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.tools.launching.processes import Asked, Child, asked_to_end
from tests.tools.launching.helpers import STUBBORN, program, runs, until

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux' /proc")


def child(text: str, *, held: bool = False) -> Child:
    return Child([sys.executable, "-c", text], output=subprocess.PIPE, held=held)


@pytest.mark.parametrize(
    ("text", "code"),
    [("pass", 0), ("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_exit_code_is_a_shells(text: str, code: int) -> None:
    assert child(text).wait(30) == code


def test_waiting_ends_after_the_time_given() -> None:
    started = child("import time; time.sleep(600)")
    assert started.wait(0.05) is None
    assert started.end(5) == 128 + signal.SIGTERM


def test_released_child_reads_the_end_of_its_input() -> None:
    started = child("import sys; sys.stdin.read(); sys.exit(7)", held=True)
    assert started.wait(0.2) is None
    started.release()
    assert started.wait(30) == 7


def test_one_that_ends_when_asked_is_not_killed() -> None:
    said = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True)"
    started = child(f"{said}; time.sleep(600)")
    assert started.output is not None
    assert started.output.readline() == b"up\n"
    assert started.end(30) == 75


@needs_proc
def test_what_it_started_in_another_session_is_killed_with_it(tmp_path: Path) -> None:
    below = tmp_path / "below"
    started = Child([*program(tmp_path / "stubborn.py", STUBBORN), str(below)], output=subprocess.PIPE)
    until(below.exists)
    pid = int(below.read_text())
    assert runs(pid)
    assert started.end(0.1) == 128 + signal.SIGKILL
    assert not runs(pid)


@needs_proc
def test_another_child_is_not_touched() -> None:
    first, second = (child("import time; time.sleep(600)") for _ in range(2))
    first.end(5)
    assert second.wait(0.1) is None
    second.end(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_being_asked_to_end_is_an_exception_with_the_shells_exit_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Asked, match=number.name) as asked, asked_to_end():
        signal.raise_signal(number)
    assert asked.value.code == 128 + number
    assert signal.getsignal(number) is before
