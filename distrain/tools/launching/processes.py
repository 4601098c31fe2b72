"""Child processes that never outlive their parent's interest: ending one ends all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from distrain.runtime.signals import STOPPING

_PROC = Path("/proc")


class Child:
    """A running command together with all processes that it started.

    torchrun puts each rank into a session of its own, so ranks survive a torchrun that is killed, and no signal to a
    process group reaches them. They inherit the environment, however. Each child therefore gets an environment
    variable with a unique name, by which its descendants are found in Linux' ``/proc``. On other systems only the
    child's process group is ended.

    Args:
        command: Program and arguments.
        output: Where standard output and error go: an open file, or ``subprocess.PIPE`` to read them from
            :attr:`output`.
        environment: Variables to set besides this process's own.
        pipe_stdin: Makes the child's standard input a pipe, which closes at :meth:`close_stdin` or when this process
            ends. Otherwise standard input is empty.

    Attributes:
        output: The pipe to read from, if one was asked for.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: IO[bytes] | int,
        environment: Mapping[str, str] | None = None,
        pipe_stdin: bool = False,
    ) -> None:
        self._marker = f"DISTRAIN_CHILD_{uuid.uuid4().hex}"
        self._process = subprocess.Popen(  # noqa: S603 - the command is the user's own
            list(command),
            stdin=subprocess.PIPE if pipe_stdin else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), self._marker: "1"},
            # Keeps Ctrl-C from reaching the child directly; the parent ends it in an orderly way.
            start_new_session=True,
        )
        self.output = self._process.stdout

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the child to exit.

        Args:
            seconds: How long to wait; ``None`` for no limit.

        Returns:
            The exit code as a shell reports it (128 + signal), or ``None`` if the child is still running.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def close_stdin(self) -> None:
        """Closes the child's standard input."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def terminate(self, grace_seconds: float) -> int:
        """Sends SIGTERM, and after ``grace_seconds`` kills what still runs; returns the exit code."""
        self.close_stdin()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self.wait(grace_seconds)
        self.kill_all()
        code = self.wait()
        assert code is not None
        return code

    def kill_all(self) -> None:
        """Kills all that still runs of the child and its descendants."""
        if not _PROC.joinpath("self", "environ").exists():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return
        # Repeats until none is left, to find processes that were just being started.
        while pids := list(self._running_pids()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(0)
            time.sleep(0.01)

    def _running_pids(self) -> Iterator[int]:
        marker = f"{self._marker}=1".encode()
        for folder in _PROC.iterdir():
            # Other users' processes are not readable, and exited ones have no environment.
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and marker in folder.joinpath("environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


class TerminationRequested(BaseException):
    """This process received a signal that asks it to end.

    Attributes:
        code: The exit code for it, 128 + signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def termination_signals_raise(*, once: bool = False) -> Iterator[None]:
    """Makes SIGINT, SIGTERM, SIGHUP and SIGQUIT raise :class:`TerminationRequested` in the main thread.

    Does nothing in other threads. A SIGHUP that `nohup` has made ignored stays ignored.

    Args:
        once: Whether only the first signal raises, so that a second one can't interrupt what ends the processes.
    """
    received = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal received
        if not (once and received):
            received = True
            raise TerminationRequested(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number for number in STOPPING if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
