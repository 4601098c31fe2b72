"""Where a thread is: its innermost calls as text, and whether it is waiting for other ranks."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_MAX_LINES = 12
#: Modules that wait for other ranks: a thread with a frame in one of them is considered to be waiting.
WAITING_MODULES = frozenset(
    {
        "distrain.communication.collectives",
        "distrain.strategies.parameter_server.collectives",
        "distrain.strategies.parameter_server.connect",
        "distrain.strategies.parameter_server.server",
        "distrain.strategies.parameter_server.client",
        "distrain.communication.shared_memory.channel",
        "distrain.communication.shared_memory.hierarchical",
        "torch.distributed.distributed_c10d",
    }
)


@dataclass(frozen=True)
class ThreadStack:
    """Where a thread is.

    Attributes:
        lines: Its innermost calls, the outermost of them first, at most 12.
        waiting: It waits for other ranks.
    """

    lines: list[str]
    waiting: bool

    @classmethod
    def of_thread(cls, identifier: int) -> ThreadStack:
        """The stack of a running thread, given its :func:`threading.get_ident` number."""
        with _no_automatic_collection():
            return cls.of_frame(sys._current_frames().get(identifier))

    @classmethod
    def of_frame(cls, frame: FrameType | None) -> ThreadStack:
        """The stack that ends in this frame; empty for ``None``."""
        lines: list[str] = []
        waiting = False
        while frame is not None:
            if len(lines) < _MAX_LINES:
                lines.append(_line(frame, frame.f_lineno))
            waiting = waiting or _is_waiting(frame)
            frame = frame.f_back
        return cls(lines[::-1], waiting)

    @classmethod
    def of_error(cls, error: BaseException) -> ThreadStack:
        """The stack at which an error was raised."""
        frames = list(traceback.walk_tb(error.__traceback__))
        return cls(
            [_line(frame, line) for frame, line in frames[-_MAX_LINES:]],
            any(_is_waiting(frame) for frame, _ in frames),
        )


#: Held while automatic garbage collection is off, so that two threads don't restore each other's setting.
_collection_lock = threading.RLock()


@contextlib.contextmanager
def _no_automatic_collection() -> Iterator[None]:
    """Prevents automatic garbage collection in all threads while another thread's frames are walked.

    In Python 3.11 ``frame.f_back`` creates a frame object, which can start a collection in this thread. A collection
    that frees a tensor releases the interpreter lock. The other thread then continues and leaves the frame that is
    being read, whose memory is used again for something else: the process crashes.

    The threshold is changed rather than :func:`gc.disable` called, because training code may switch collection off and
    on around a part of a step in the other thread: that works as before.
    """
    with _collection_lock:
        threshold, *_ = gc.get_threshold()
        try:
            gc.set_threshold(0)
            yield
        finally:
            # Another thread may have set its own threshold meanwhile.
            if gc.get_threshold()[0] == 0:
                gc.set_threshold(threshold)


def _line(frame: FrameType, line: int) -> str:
    # The source line is left out, since it would have to be read from disk. co_qualname needs Python 3.11.
    code = frame.f_code
    return f'  File "{code.co_filename}", line {line}, in {getattr(code, "co_qualname", code.co_name)}'


def _is_waiting(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in WAITING_MODULES
