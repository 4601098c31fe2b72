"""Signals that ask a run to stop: recorded if the run can save first, raised as an exception otherwise."""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import IO, Any, Protocol

from distrain.errors import LAUNCHER_ENDED, Terminated
from distrain.files.contained_folder import ContainedFolder
from distrain.runtime import launcher

log = logging.getLogger(__name__)

#: A launcher may forward a signal that every process has received already, and systems send SIGHUP with SIGTERM. Within
#: this time it is the same request.
_SAME_REQUEST_SECONDS = 5.0
#: The same for SIGINT from a terminal, where a second Ctrl-C means that the user does not want to wait.
_SAME_INTERRUPT_SECONDS = 0.3
#: Ask the run to save and stop. An ignored one stays ignored: `nohup` ignores SIGHUP, a shell's `&` may ignore SIGINT.
#: Windows has the first two only.
STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
#: Asks the run to save and stop, and by it a thread says that the launcher has ended.
_SAVING: signal.Signals = getattr(signal, "SIGUSR1", signal.SIGTERM)


class Stoppable(Protocol):
    """An object that can be asked to stop.

    Attributes:
        stoppable: Whether ``stop_requested`` is checked at regular intervals.
        stop_requested: The signal's name, or :data:`~distrain.errors.LAUNCHER_ENDED`; ``None`` if there was none.
    """

    stoppable: bool
    stop_requested: str | None


class RememberedRequests:
    """Remembers requests to stop inside a block of several short runs.

    Such a run acts on a request only while it trains. One that comes between two of them, or while one ends, would be
    lost.

    Attributes:
        first: Name of the first signal that asked to stop; ``None`` if none has.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RememberedRequests:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:
                signal.signal(number, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        self.first = self.first or signal.Signals(number).name


class SignalHandler:
    """Handles the signals that users, terminals, launchers and batch systems send to end a run, and a launcher's end.

    While ``target.stoppable``, SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and the end of the launcher set
    ``target.stop_requested``. A second request raises :class:`~distrain.errors.Terminated` in the main thread, and so
    does a first one while the target is not stoppable; SIGUSR1 is then ignored. SIGQUIT also writes the stacks of all
    threads to the file given to :meth:`dump_stacks_to`.

    Args:
        target: The object that is asked to stop.
        shutdown: Code of the functions that end the run. A signal that arrives in them, even before their first line
            ran, is ignored like one that arrives when ``ignored`` is set.

    Attributes:
        ignored: Set when the run is ending, after a failure or with everything saved: signals are then ignored.
    """

    def __init__(self, target: Stoppable, shutdown: Collection[CodeType] = ()) -> None:
        self.ignored = False
        self._target = target
        self._shutdown = shutdown
        self._requested_at = 0.0
        self._launcher_ended = False
        self._closing = threading.Event()
        self._stacks: IO[str] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Starts to handle the signals; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in dict.fromkeys((*STOPPING, _SAVING)):
            may_be_ignored = number not in (signal.SIGTERM, _SAVING)
            if not (may_be_ignored and signal.getsignal(number) is signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._handle)
        self._closing.clear()
        launcher.call_at_end(self.report_launcher_end, self._closing)

    def dump_stacks_to(self, path: Path) -> None:
        """Makes SIGQUIT append the stacks of all threads to an existing file, also while the main thread hangs."""
        if "SIGQUIT" not in {number.name for number in self._previous}:
            return
        try:
            run_dir = ContainedFolder(path.parent.parent)
            descriptor = run_dir.open(f"{path.parent.name}/{path.name}", os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            log.warning("SIGQUIT will write no stacks: %s can't be opened (%s)", path, error.strerror)
            return
        self._stacks = os.fdopen(descriptor, "a")
        faulthandler.register(signal.SIGQUIT, self._stacks, all_threads=True, chain=True)

    def restore(self) -> None:
        """Restores the previous handlers."""
        self._closing.set()
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGQUIT)
            stacks, self._stacks = self._stacks, None
            # The signal's stacks are written without a buffer, so nothing is lost.
            with contextlib.suppress(OSError):
                stacks.close()
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed by Python.
            if handler is not None:
                signal.signal(number, handler)
        self._previous.clear()

    def report_launcher_end(self) -> None:
        """Requests to stop because the launcher has ended; may be called by any thread, and more than once."""
        if not self._launcher_ended and self._previous:
            self._launcher_ended = True
            # Only a signal reaches the main thread wherever it is. This one is always handled.
            if hasattr(signal, "SIGUSR1"):
                os.kill(os.getpid(), _SAVING)
            else:
                _thread.interrupt_main(_SAVING)  # os.kill would end the process on Windows

    def _handle(self, number: int, frame: FrameType | None) -> None:
        outer = self._previous.get(signal.Signals(number))
        if isinstance(outer, RememberedRequests):
            outer(number, frame)
        # When one rank fails, the launcher ends the others, which are already reporting that failure.
        if self.ignored or any(caller.f_code in self._shutdown for caller in _callers(frame)):
            return
        target, now = self._target, time.monotonic()
        name = signal.Signals(number).name
        if number == _SAVING and self._launcher_ended:
            name = LAUNCHER_ENDED
        first = target.stop_requested
        if name == "SIGUSR1":
            if not target.stoppable:
                log.warning("SIGUSR1 is ignored: no training is running that could be saved and stopped")
            elif first is None:
                target.stop_requested, self._requested_at = name, now
        elif first is None or first == "SIGUSR1":
            # Kept even when raised: a library may catch what is raised here, and the run then stops at its first step.
            target.stop_requested, self._requested_at = name, now
            if not target.stoppable:
                raise Terminated(name)
        elif now - self._requested_at >= _same_request_seconds(first, name):
            raise Terminated(name if first != "SIGINT" else first)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _same_request_seconds(first: str, second: str) -> float:
    """For how long a second request may be the echo of the first one, in seconds."""
    if first == "SIGINT":
        if launcher.is_torchrun():
            # After Ctrl-C torchrun sends SIGINT. It sends SIGTERM, or ends, only after a second Ctrl-C.
            return 0.0 if second in ("SIGTERM", LAUNCHER_ENDED) else _SAME_REQUEST_SECONDS
        return _SAME_INTERRUPT_SECONDS if second == "SIGINT" else _SAME_REQUEST_SECONDS
    # What ended the launcher is also why it sent a signal; the save goes on.
    return float("inf") if LAUNCHER_ENDED in (first, second) else _SAME_REQUEST_SECONDS
