"""Small programs that replace trainings, launchers and ssh in tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness import HANG_SECONDS

#: Ignores SIGTERM and never ends; starts a descendant like it in another session, which writes its PID into a file.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "descendant"], start_new_session=True)
else:
    import os, pathlib
    part = pathlib.Path(sys.argv[1] + ".part")
    part.write_text(str(os.getpid()))
    part.rename(sys.argv[1])
print("up", flush=True)
time.sleep(600)
"""
#: Takes a host and a command line as ssh does, but runs the command line on this machine.
SSH = """
import subprocess, sys
host, line = sys.argv[1:]
sys.exit(subprocess.run(["sh", "-c", line]).returncode)
"""


def program(path: Path, text: str) -> list[str]:
    """Writes a Python program and returns the command that runs it."""
    path.write_text(text)
    return [sys.executable, str(path)]


def wait_until(condition: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
    """Waits until a condition holds, and fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process exists and has not exited."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
