"""Processes of this host: whether they are alive or stopped, and killing them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys" / "kernel" / "random" / "boot_id"


def boot_id() -> str:
    """Names this host's monotonic clock: the same for all processes of the host, another one after it is restarted."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class Process:
    """A process; another one that gets the same process ID later is not mistaken for it.

    Attributes:
        pid: Process ID.
        started: Start time in clock ticks since boot; ``None`` on systems without ``/proc``.
    """

    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this ID now."""
        return cls(pid, _state_and_start(pid)[1])

    @property
    def is_alive(self) -> bool:
        """Whether the process exists and is not a zombie."""
        if self.started is None:
            return may_exist(self.pid)
        state, started = _state_and_start(self.pid)
        if started is None:
            # Without a free file descriptor, for example, /proc can't be read, which says nothing about the process.
            return may_exist(self.pid)
        return started == self.started and state not in ("Z", "X")

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has suspended the process; false on systems without ``/proc``, where it is unknown."""
        return self.started is not None and _state_and_start(self.pid) == ("T", self.started)

    def kill_after(self, seconds: float) -> None:
        """Kills the process unless it ends by itself in this time; at once if a signal has suspended it."""
        deadline = time.monotonic() + seconds
        while self.is_alive and not self.is_stopped and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def kill(self, seconds: float = 0.5) -> None:
        """Kills the process, but no other one that has its ID now; does nothing on systems without ``/proc``.

        Args:
            seconds: How long to wait until it has ended.
        """
        if self.started is None:
            return
        deadline = time.monotonic() + seconds
        while self.is_alive and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)


@dataclass(frozen=True)
class PlacedProcess:
    """A process as one that may be on another host knows it.

    Attributes:
        process: The process on its host.
        boot: Its host; see :func:`boot_id`.
        namespace: The name space of its process ID: containers of one host don't see each other's processes.
    """

    process: Process
    boot: str
    namespace: str

    @classmethod
    def current(cls) -> PlacedProcess:
        """The calling process."""
        try:
            namespace = str((_PROC / "self" / "ns" / "pid").readlink())
        except OSError:
            namespace = ""
        return cls(Process.current(), boot_id(), namespace)

    @property
    def is_visible(self) -> bool:
        """Whether the calling process can tell if it is alive."""
        here = PlacedProcess.current()
        return (self.boot, self.namespace) == (here.boot, here.namespace)


def seconds_since_start(pid: int) -> float | None:
    """How long a process has run; ``None`` on systems without ``/proc``, or if there is no such process."""
    started = _state_and_start(pid)[1]
    if started is None:
        return None
    try:
        since_boot = float(_PROC.joinpath("uptime").read_text().split()[0])
    except OSError:
        return None
    return max(since_boot - started / os.sysconf("SC_CLK_TCK"), 0.0)


def may_exist(pid: int) -> bool:
    """Whether there is a process with this ID; true where the system doesn't tell."""
    if not hasattr(signal, "SIGKILL"):
        return True  # Windows' os.kill ends the process, whatever the signal
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has so large a number
        return False
    except PermissionError:
        return True
    return True


def _state_and_start(pid: int) -> tuple[str, int | None]:
    """A process's state and start time from ``/proc/PID/stat``, see proc(5); ``("", None)`` if it can't be read."""
    try:
        # The second field, the program's name in parentheses, may contain spaces and parentheses itself.
        fields = _PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], int(fields[19])
