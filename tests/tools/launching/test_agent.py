"""The agent runs its command only as long as its standard input is open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.runs import LAUNCH
from tests.tools.launching.helpers import STUBBORN, program, runs, until


def agent(*command: str, grace: float = 30) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "distrain.tools.launching.agent", str(grace), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)},
    )


def test_hands_on_output_and_exit_code(tmp_path: Path) -> None:
    started = agent(*program(tmp_path / "a.py", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)"))
    assert started.stdout is not None
    assert sorted(started.stdout.read().split()) == [b"err", b"out"]
    assert started.wait(30) == 5


def test_asks_the_command_to_end_when_its_input_is_closed_and_gives_it_time_to_save(tmp_path: Path) -> None:
    """Nobody reads what the command says by then: that must not disturb it."""
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
    assert started.wait(30) == 128 + signal.SIGTERM
    assert saved.exists()


def test_kills_all_that_does_not_end_within_the_grace(tmp_path: Path) -> None:
    below = tmp_path / "below"
    started = agent(*program(tmp_path / "stubborn.py", STUBBORN), str(below), grace=0.2)
    assert started.stdin is not None
    until(below.exists)
    started.stdin.close()
    assert started.wait(30) == 128 + signal.SIGTERM
    assert not runs(int(below.read_text()))
    assert started.stdout is not None
    started.stdout.close()
