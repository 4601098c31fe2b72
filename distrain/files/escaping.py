r"""Text for a terminal or a log that may come from a stranger's file: control characters are escaped, here alone.

Characters that are not printable could send commands to a terminal, write in the opposite direction, or end a line, so
that a file could forge a record of a log. They are shown as in Python's source: ``\x1b``, ``\n``, ``\u202e``.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType

from typing_extensions import override

#: Spaces of other widths, and the joiners of letters that some languages need.
_HARMLESS = frozenset("\u00a0\u2007\u202f\u3000\u200c\u200d")


def escaped(text: str) -> str:
    """Text on one line, with everything that is not printable escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in _HARMLESS else letter.encode("unicode_escape").decode()
        for letter in text
    )


class Lines(str):
    """Text of several lines that this program made; make it by :meth:`of`, which escapes what the lines quote."""

    @classmethod
    def of(cls, lines: Iterable[str]) -> Lines:
        """The lines, each escaped."""
        return cls("\n".join(map(escaped, lines)))


class EscapingFormatter(logging.Formatter):
    """Formats a record as one line.

    Lines are kept only where this program made them: those of a message's own text, of an argument that is
    :class:`Lines`, and of a traceback. All else that is put into the message is escaped.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        shown = logging.makeLogRecord(vars(record))
        # Made by another handler's formatter, which may not have escaped it.
        shown.exc_text = None
        arguments = record.args
        if isinstance(arguments, Mapping):
            shown.args = {name: _Argument.of(value) for name, value in arguments.items()}
        elif arguments:
            shown.args = tuple(map(_Argument.of, arguments))
        shown.msg = Lines.of(record.msg.split("\n")) if isinstance(record.msg, str) else escaped(str(record.msg))
        return super().format(shown)

    @override
    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return "" if ei[1] is None else format_error(ei[1])

    @override
    def formatStack(self, stack_info: str) -> str:
        return Lines.of(stack_info.split("\n"))


class _Argument:
    """An argument of a message, which is escaped when it is put there."""

    def __init__(self, value: object) -> None:
        self._value = value

    @classmethod
    def of(cls, value: object) -> object:
        """The argument as the message needs it: numbers have formats of their own."""
        return value if value is None or isinstance(value, int | float | Lines) else cls(value)

    @override
    def __str__(self) -> str:
        return escaped(str(self._value))

    @override
    def __repr__(self) -> str:
        return escaped(repr(self._value))

    def __float__(self) -> float:
        return float(self._value)  # type: ignore[arg-type]

    def __int__(self) -> int:
        return int(self._value)  # type: ignore[call-overload,no-any-return]


def format_error(error: BaseException) -> Lines:
    """An error's traceback, line by line; the errors' own messages take one line each."""
    lines: list[str] = []
    for entry in traceback.format_exception(error):
        # A frame is indented, what is between chained errors begins with an empty line, and all else is a message.
        of_traceback = entry.startswith((" ", "\n", "Traceback "))
        lines += entry.rstrip("\n").split("\n") if of_traceback else [entry.rstrip("\n")]
    return Lines.of(lines)
