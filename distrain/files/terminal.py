"""Standard error, for lines that a user should see. A terminal that can't be written ends no run."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO, cast

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


def print_to_stderr(line: str) -> None:
    """Prints a line for the user at once."""
    TERMINAL.write(f"{line}\n")
    TERMINAL.flush()
