"""Signals that ask a run to stop: recorded if the run can save first, raised as an exception otherwise."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any, Protocol

from distrain.errors import Terminated

log = logging.getLogger(__name__)

#: A launcher may forward a signal that every process has received already. Within this time it is the same request.
_SAME_REQUEST_SECONDS = 5.0


class Stoppable(Protocol):
    """An object that can be asked to stop.

    Attributes:
        stoppable: Whether ``stop_requested`` is checked at regular intervals.
        stop_requested: The signal's name; ``None`` if there was none.
    """

    stoppable: bool
    stop_requested: str | None


class SignalHandler:
    """Handles SIGTERM and SIGUSR1, which batch systems send some time before they end a job.

    While ``target.stoppable``, either signal sets ``target.stop_requested``. A second SIGTERM, or one while the target
    is not stoppable, raises :class:`~distrain.errors.Terminated` in the main thread; SIGUSR1 is then ignored.

    Args:
        target: The object that is asked to stop.

    Attributes:
        ignored: Set when the run has failed and is ending: both signals are then ignored.
    """

    def __init__(self, target: Stoppable) -> None:
        self.ignored = False
        self._target = target
        self._requested_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Starts to handle the signals; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        # When one rank fails, the launcher ends the others, which are already reporting that failure.
        if self.ignored:
            return
        name, now, target = signal.Signals(number).name, time.monotonic(), self._target
        if name == target.stop_requested and now - self._requested_at < _SAME_REQUEST_SECONDS:
            return
        if number == signal.SIGTERM and (not target.stoppable or name == target.stop_requested):
            raise Terminated("ended by SIGTERM")
        if not target.stoppable:
            log.warning("%s is ignored: no training is running that could be saved and stopped", name)
        elif target.stop_requested != "SIGTERM":
            target.stop_requested, self._requested_at = name, now
