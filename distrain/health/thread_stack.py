"""Where a thread is: its innermost calls as text, and whether it waits for other ranks."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from types import FrameType

_MOST = 12
#: A thread that is in one of these modules waits for other ranks.
_COMMUNICATION = frozenset(
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
        lines: Its innermost calls, outermost first.
        waiting: It waits for other ranks.
    """

    lines: list[str]
    waiting: bool

    @classmethod
    def of_thread(cls, identifier: int) -> ThreadStack:
        """Of a thread that may be doing anything, by :func:`threading.get_ident`'s number."""
        return cls.of_frame(sys._current_frames().get(identifier))

    @classmethod
    def of_frame(cls, frame: FrameType | None) -> ThreadStack:
        """Of whoever is in this frame."""
        lines: list[str] = []
        waiting = False
        while frame is not None:
            if len(lines) < _MOST:
                lines.append(_line(frame, frame.f_lineno))
            waiting = waiting or _is_communication(frame)
            frame = frame.f_back
        return cls(lines[::-1], waiting)

    @classmethod
    def of_error(cls, error: BaseException) -> ThreadStack:
        """Where an error came from."""
        frames = list(traceback.walk_tb(error.__traceback__))
        return cls(
            [_line(frame, line) for frame, line in frames[-_MOST:]],
            any(_is_communication(frame) for frame, _ in frames),
        )


def _line(frame: FrameType, line: int) -> str:
    # Without the source itself, which would be read from disk. co_qualname is of Python 3.11 and later.
    code = frame.f_code
    return f'  File "{code.co_filename}", line {line}, in {getattr(code, "co_qualname", code.co_name)}'


def _is_communication(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _COMMUNICATION
