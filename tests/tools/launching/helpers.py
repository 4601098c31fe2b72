"""Small programs that stand for trainings, launchers and ssh."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

#: Starts a process in a session of its own that writes its number into a file, hears no SIGTERM and never ends.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "below"], start_new_session=True)
else:
    import os, pathlib
    part = pathlib.Path(sys.argv[1] + ".part")
    part.write_text(str(os.getpid()))
    part.rename(sys.argv[1])
print("up", flush=True)
time.sleep(600)
"""
#: Takes a host and a command line, as ssh does, and runs it here by a shell.
SSH = """
import subprocess, sys
host, line = sys.argv[1:]
sys.exit(subprocess.run(["sh", "-c", line]).returncode)
"""


def program(path: Path, text: str) -> list[str]:
    """Writes a Python program and returns the command that runs it."""
    path.write_text(text)
    return [sys.executable, str(path)]


def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Waits for something, and fails if it doesn't come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and hasn't ended."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
