"""Finds the processes of a training by a mark in their environment, which children inherit.

torchrun gives each rank a session of its own, so neither a session nor a process group holds them all, and a rank whose
launcher died gets another parent. The environment does not change. Reads ``/proc``, so this works on Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from distrain.tools.testnet.network import is_entry_process

#: The environment variable that holds the mark.
MARK_VARIABLE = "DISTRAIN_CHAOS"
_PROC = Path("/proc")
_SOURCE = str(Path(__file__).resolve().parents[3])


def marked_processes(mark: str) -> dict[int, dict[str, str]]:
    """The running processes with the mark: number and initial environment of each.

    Args:
        mark: The mark; one that ends with a dot stands for all marks that begin so.
    """
    environments = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # The process may have ended, or belong to another user. A zombie's environment is empty.
            with contextlib.suppress(OSError):
                variables = _parse(entry.joinpath("environ").read_bytes())
                own = variables.get(MARK_VARIABLE, "")
                if own == mark or (mark.endswith(".") and own.startswith(mark)):
                    environments[int(entry.name)] = variables
    return environments


@contextlib.contextmanager
def ended_with_this_process() -> Iterator[None]:
    """At the end of this block, all trainings that this process started are killed, also if it is itself killed.

    A second process does that when its standard input closes.
    """
    guard = subprocess.Popen(
        [sys.executable, "-m", "distrain.tools.chaos.processes", f"{os.getpid()}."],
        stdin=subprocess.PIPE,
        # What ends this process must not end it too.
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([_SOURCE, os.environ.get("PYTHONPATH", "")])},
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def rank_pids(mark: str) -> dict[int, int]:
    """The process number of each rank on this machine.

    Children of a rank inherit its RANK; only the topmost process with that variable counts.
    """
    ranks = {
        pid: int(variables["RANK"])
        for pid, variables in marked_processes(mark).items()
        if "RANK" in variables and not is_entry_process(pid)
    }
    return {rank: pid for pid, rank in ranks.items() if _parent(pid) not in ranks}


def kill_all(mark: str) -> None:
    """Kills all processes with the mark, and those they start meanwhile; returns when none is left."""
    while pids := list(marked_processes(mark)):
        for pid in pids:
            send_signal(pid, signal.SIGKILL)
        time.sleep(0.01)


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; false if there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def default_sigint() -> Iterator[None]:
    """Processes started in this block react to SIGINT, even if this process ignores it.

    A shell starts a background command (``&``) of a script with SIGINT ignored, and children inherit an ignored signal
    but not a handler.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse(environment: bytes) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in environment.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        # The second field is the program's name in brackets, which may contain spaces and brackets.
        return int(_PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    return None


if __name__ == "__main__":
    # Started by ended_with_this_process(): standard input closes when that process ends.
    sys.stdin.buffer.read()
    kill_all(sys.argv[1])
