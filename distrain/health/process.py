"""Other processes of this host: whether they are still there, whether they stand still, and ending them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, whatever else gets its number later.

    Attributes:
        pid: Its number.
        started: When it started, in clock ticks since boot; ``None`` where the system has no ``/proc``.
    """

    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Process:
        """This one."""
        return cls(os.getpid(), _stat(os.getpid())[1])

    @property
    def is_alive(self) -> bool:
        """Whether it is there and not only the zombie that its parent has not looked at yet."""
        if self.started is None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, 0)
                return True
            return False
        state, started = _stat(self.pid)
        return started == self.started and state not in ("Z", "X")

    @property
    def is_stopped(self) -> bool:
        """Whether a signal stopped it; unknown, and therefore no, without ``/proc``."""
        return self.started is not None and _stat(self.pid) == ("T", self.started)

    def kill(self, seconds: float = 0.5) -> None:
        """Ends it, but no other process that has its number now; does nothing without ``/proc``.

        Args:
            seconds: How long to wait until it is gone.
        """
        if self.started is None:
            return
        deadline = time.monotonic() + seconds
        while self.is_alive and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)


def _stat(pid: int) -> tuple[str, int | None]:
    """State and start of a process, of proc(5)'s ``stat``; none for one that is gone, or without ``/proc``."""
    try:
        # The program's name, in brackets, may hold anything.
        fields = _PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], int(fields[19])
