"""A child's exit code and standard input, and that none of its descendants survives it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.tools.launching.processes import Child, TerminationRequested, termination_signals_raise
from tests.harness import HANG_SECONDS
from tests.tools.launching.helpers import STUBBORN, is_running, program, wait_until

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux' /proc")


def child(text: str, *, pipe_stdin: bool = False) -> Child:
    return Child([sys.executable, "-c", text], output=subprocess.PIPE, pipe_stdin=pipe_stdin)


@pytest.mark.parametrize(
    ("text", "code"),
    [("pass", 0), ("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_exit_code_is_that_of_a_shell(text: str, code: int) -> None:
    assert child(text).wait(HANG_SECONDS) == code


def test_wait_returns_after_its_time_limit() -> None:
    started = child("import time; time.sleep(600)")
    assert started.wait(0.05) is None
    assert started.terminate(HANG_SECONDS) == 128 + signal.SIGTERM


def test_child_reads_end_of_file_after_stdin_is_closed() -> None:
    started = child("import sys; sys.stdin.read(); sys.exit(7)", pipe_stdin=True)
    assert started.wait(0.2) is None
    started.close_stdin()
    assert started.wait(HANG_SECONDS) == 7


def test_child_that_ends_on_sigterm_is_not_killed() -> None:
    program_text = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True)"
    started = child(f"{program_text}; time.sleep(600)")
    assert started.output is not None
    assert started.output.readline() == b"up\n"
    assert started.terminate(HANG_SECONDS) == 75


@needs_proc
def test_descendant_in_another_session_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    started = Child([*program(tmp_path / "stubborn.py", STUBBORN), str(pid_file)], output=subprocess.PIPE)
    wait_until(pid_file.exists)
    pid = int(pid_file.read_text())
    assert is_running(pid)
    assert started.terminate(0.1) == 128 + signal.SIGKILL
    assert not is_running(pid)


@needs_proc
def test_other_children_are_left_running() -> None:
    first, second = (child("import time; time.sleep(600)") for _ in range(2))
    first.terminate(HANG_SECONDS)
    assert second.wait(0.1) is None
    second.terminate(HANG_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_termination_signal_raises_an_exception_with_the_shells_exit_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TerminationRequested, match=number.name) as request, termination_signals_raise():
        signal.raise_signal(number)
    assert request.value.code == 128 + number
    assert signal.getsignal(number) is before
