"""The processes of a training, found by a mark in their environment, which every process hands to its children.

torchrun gives each rank a session of its own, so neither a session nor a process group holds them all; and a rank
whose launcher died has another parent. The environment stays. Reads ``/proc``, so this is for Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from distrain.tools.testnet.network import is_entry_process

#: The environment variable that holds the mark.
VARIABLE = "DISTRAIN_CHAOS"
_PROC = Path("/proc")


def marked(mark: str) -> dict[int, dict[str, str]]:
    """The living processes that carry the mark, and the environment each was started with."""
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # It may end meanwhile, or be another user's. A zombie's environment is empty.
            with contextlib.suppress(OSError):
                variables = _parse(entry.joinpath("environ").read_bytes())
                if variables.get(VARIABLE) == mark:
                    found[int(entry.name)] = variables
    return found


def ranks(mark: str) -> dict[int, int]:
    """The process of each rank on this machine; not what a rank itself has started, nor what started it."""
    found = {
        pid: int(variables["RANK"])
        for pid, variables in marked(mark).items()
        if "RANK" in variables and not is_entry_process(pid)
    }
    return {rank: pid for pid, rank in found.items() if _parent(pid) not in found}


def kill(mark: str) -> None:
    """Kills all that carry the mark, and what they start meanwhile; returns when none is left."""
    while pids := list(marked(mark)):
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.01)


def send(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside obeys SIGINT, though this process may be told to ignore it, as a script's ``&`` does.

    Whoever is started inherits that a signal is ignored, but not that it is handled.
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
        # The second field is the program's name, in brackets, which may hold anything.
        return int(_PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    return None
