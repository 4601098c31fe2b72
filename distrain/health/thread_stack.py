"""Where a thread is: its innermost calls as text, and whether it is waiting for other ranks."""

from __future__ import annotations

import sys
import traceback
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


def _line(frame: FrameType, line: int) -> str:
    # The source line is left out, since it would have to be read from disk. co_qualname needs Python 3.11.
    code = frame.f_code
    return f'  File "{code.co_filename}", line {line}, in {getattr(code, "co_qualname", code.co_name)}'


def _is_waiting(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in WAITING_MODULES
