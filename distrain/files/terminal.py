"""What is printed for the user, all of it escaped. Standard error that can't be written ends no run."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, TextIO, cast

from distrain.files.escaping import EscapingFormatter, Lines, escaped, format_error
from distrain.files.live_text import CLEAR_LINE, is_live

#: For ``extra=`` of a log call: the line goes to the rank's file and not to the terminal.
FILE_ONLY = {"file_only": True}


class _Terminal:
    """Writes to what ``sys.stderr`` is at that moment; where that can't be written, the text is lost.

    A run's output often goes to a file on the same disk as the run, or to a terminal that is closed while it trains.
    Losing such a line must not end a training, and there is no other place to report it.
    """

    def write(self, text: str) -> int:
        """Writes text; returns its length."""
        try:
            _stream().write(text)
        except (OSError, ValueError):  # ValueError: the stream was closed
            return 0
        return len(text)

    def flush(self) -> None:
        """Writes out what is buffered."""
        try:
            _stream().flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        # What tqdm asks a stream for: `isatty`, `fileno`, `encoding`.
        return getattr(_stream(), name)


def _stream() -> TextIO:
    return sys.stderr if sys.stderr is not None else io.StringIO()


#: Standard error as a stream that raises no error.
TERMINAL = cast(TextIO, _Terminal())


def print_to_stderr(text: str) -> None:
    """Prints for the user at once; on one line, except for :class:`~distrain.files.escaping.Lines`."""
    # Another process of the run may have drawn a live line, at whose end the text would begin.
    TERMINAL.write(f"{CLEAR_LINE if is_live(_stream()) else ''}{_shown(text)}\n")
    TERMINAL.flush()


def show(text: str) -> None:
    """Like :func:`print_to_stderr`, to standard output: for results, which must not be lost without an error."""
    shown = _shown(text)
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _shown(text: str) -> str:
    return text if isinstance(text, Lines) else escaped(text)


def escape_everything() -> None:
    """Makes Python itself escape what it prints: uncaught errors, warnings, and logs before a run's log begins."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter("%(message)s"))

    def show_error(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
        print_to_stderr(format_error(error))

    def show_thread_error(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None:
            name = "?" if arguments.thread is None else arguments.thread.name
            print_to_stderr(Lines.of([f"Exception in thread {name}:", *format_error(arguments.exc_value).split("\n")]))

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return (
            Lines.of([f"{filename}:{lineno}: {category.__name__}: {message}", *([] if line is None else [line])]) + "\n"
        )

    sys.excepthook = show_error
    threading.excepthook = show_thread_error
    warnings.formatwarning = format_warning


def open_standard_streams() -> None:
    """Opens the null device in place of standard input, output and error where they are closed (``>&- 2>&-``).

    The next file to be opened would otherwise get their number, and what a library prints would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # A new file gets the lowest free number.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
