"""SignalHandler that ask a run to stop: a flag while somebody looks at it, an exception otherwise."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any, Protocol

from distrain.errors import Terminated

log = logging.getLogger(__name__)

#: A launcher may hand on a signal that every process got already; within this time it is the same request.
_SAME_REQUEST_SECONDS = 5.0


class Stoppable(Protocol):
    """What can be asked to stop.

    Attributes:
        stoppable: Somebody looks at ``stop_requested`` from time to time.
        stop_requested: The signal's name.
    """

    stoppable: bool
    stop_requested: str | None


class SignalHandler:
    """Handles SIGTERM and SIGUSR1, which batch systems send some time before they end a job.

    While ``asked.stoppable``, either sets ``asked.stop_requested``. A second SIGTERM, or one at any other time, raises
    :class:`~distrain.errors.Terminated` in the main thread; SIGUSR1 is then ignored.

    Args:
        asked: Who is to stop.

    Attributes:
        deaf: Nothing is heard any more: the run ends as it is.
    """

    def __init__(self, asked: Stoppable) -> None:
        self.deaf = False
        self._asked = asked
        self._requested_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handles signals from now on; does nothing outside of the main thread, where Python forbids it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Leaves them to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        # The launcher ends the others when one rank fails; that one's failure is being told already.
        if self.deaf:
            return
        name, now, asked = signal.Signals(number).name, time.monotonic(), self._asked
        if name == asked.stop_requested and now - self._requested_at < _SAME_REQUEST_SECONDS:
            return
        if number == signal.SIGTERM and (not asked.stoppable or name == asked.stop_requested):
            raise Terminated("ended by SIGTERM")
        if not asked.stoppable:
            log.warning("%s is ignored: nothing is being trained that could be saved and stopped", name)
        elif asked.stop_requested != "SIGTERM":
            asked.stop_requested, self._requested_at = name, now
