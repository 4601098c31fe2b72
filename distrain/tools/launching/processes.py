"""Processes that this one starts and answers for: however they end, nothing that they started is left behind."""

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

_PROC = Path("/proc")


class Child:
    """A started command, and all that it starts.

    torchrun puts each rank into a session of its own, so ranks outlive a torchrun that is killed and no signal to a
    process group reaches them. They inherit the environment, so each child carries a variable of its own name there,
    by which Linux' ``/proc`` finds what is left. Elsewhere only the child's process group is ended.

    Args:
        command: Program and arguments.
        output: Where both of its outputs go: an open file, or ``subprocess.PIPE`` to read them from :attr:`output`.
        environment: Variables besides this process's own.
        held: The child's standard input is a pipe that is closed by :meth:`release`, or by the end of this process.

    Attributes:
        output: The pipe, if one was asked for.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: IO[bytes] | int,
        environment: Mapping[str, str] | None = None,
        held: bool = False,
    ) -> None:
        self._mark = f"DISTRAIN_CHILD_{uuid.uuid4().hex}"
        self._process = subprocess.Popen(  # noqa: S603 - the command is the user's own
            list(command),
            stdin=subprocess.PIPE if held else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), self._mark: "1"},
            # Ctrl-C is for the parent, which tells the child in its own way.
            start_new_session=True,
        )
        self.output = self._process.stdout

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code as a shell counts it (128 + signal), or ``None`` if it still runs after so many seconds."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def release(self) -> None:
        """Closes the child's standard input."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self, grace_seconds: float) -> int:
        """Asks the child to end (SIGTERM), and kills it and all that it started if it takes longer than this."""
        self.release()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        self.wait(grace_seconds)
        self.clear()
        code = self.wait()
        assert code is not None
        return code

    def clear(self) -> None:
        """Kills what still runs of the child and of what it started."""
        if not _PROC.joinpath("self", "environ").exists():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return
        # Once more after each kill: one that was just being started is found in the next round.
        while left := list(self._left()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(0)
            time.sleep(0.01)

    def _left(self) -> Iterator[int]:
        mark = f"{self._mark}=1".encode()
        for folder in _PROC.iterdir():
            # Other users' processes can't be read, ended ones have no environment.
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and mark in folder.joinpath("environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


class Asked(BaseException):
    """This process was asked to end.

    Attributes:
        code: The exit code that says so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def asked_to_end() -> Iterator[None]:
    """Makes SIGINT, SIGTERM and SIGHUP raise :class:`Asked` in the main thread."""

    def ask(number: int, _: FrameType | None) -> None:
        raise Asked(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
