"""The agent runs its command as long as its standard input is open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.harness import HANG_SECONDS
from tests.runs import LAUNCH
from tests.tools.launching.helpers import STUBBORN, is_running, program, wait_until


def agent(*command: str, grace: float = 30) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "distrain.tools.launching.agent", str(grace), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)},
    )


def test_output_and_exit_code_are_passed_on(tmp_path: Path) -> None:
    started = agent(*program(tmp_path / "a.py", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)"))
    assert started.stdout is not None
    assert sorted(started.stdout.read().split()) == [b"err", b"out"]
    assert started.wait(HANG_SECONDS) == 5


def test_command_is_terminated_when_stdin_closes_and_has_time_to_save(tmp_path: Path) -> None:
    """The command's output is no longer read then, which must not block it."""
    saved = tmp_path / "saved"
    text = f"""
import pathlib, signal, sys, time
def save(*_):
    for _ in range(100):
        print("saving " * 1000, flush=True)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(600)
"""
    started = agent(*program(tmp_path / "a.py", text))
    assert started.stdin is not None
    assert started.stdout is not None
    assert started.stdout.readline() == b"up\n"
    started.stdout.close()
    started.stdin.close()
    assert started.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    assert saved.exists()


def test_command_and_descendants_are_killed_after_the_grace_period(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    started = agent(*program(tmp_path / "stubborn.py", STUBBORN), str(pid_file), grace=0.2)
    assert started.stdin is not None
    wait_until(pid_file.exists)
    started.stdin.close()
    assert started.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    assert not is_running(int(pid_file.read_text()))
    assert started.stdout is not None
    started.stdout.close()
