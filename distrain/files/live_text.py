"""Text that is drawn in place on a terminal: its width, its colours, and lines that replace those drawn before."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Sequence
from typing import TextIO

#: Colours by the meaning of what is coloured, as parameters of the escape sequence.
GOOD, DOUBTFUL, BAD = "32", "33", "31"
#: Moves to the beginning of the line and clears it.
CLEAR_LINE = "\r\x1b[K"
#: Left and right of the drawn part of a bar.
_FULL, _EMPTY = "█", "░"


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes: letters of East Asia take two, accents none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )


def cut(text: str, width: int) -> str:
    """The beginning of a text that fits into so many columns, with an ellipsis if anything is missing."""
    if display_width(text) <= width:
        return text
    kept = text[: max(width, 1)]
    while kept and display_width(kept) > width - 1:
        kept = kept[:-1]
    return f"{kept}…"


def bar(share: float, width: int) -> str:
    """A bar of so many columns, of which a share between 0 and 1 is filled."""
    full = min(max(int(share * width), 0), width)
    return _FULL * full + _EMPTY * (width - full)


def clock(seconds: float) -> str:
    """A duration in hours, minutes and seconds, as ``0:09`` or ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_live(stream: TextIO) -> bool:
    """Whether text can be drawn in place on a stream."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # what a program has put in place of a stream; a stream that is closed
        return False


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """Text in a colour, where a stream shows colours and the user wants them (https://no-color.org)."""
    return f"\x1b[{colour}m{text}\x1b[0m" if is_live(stream) and not os.environ.get("NO_COLOR") else text


def terminal_size() -> tuple[int, int]:
    """Columns and rows of the terminal; 80 and 24 where they are unknown. A pseudo-terminal may have zero."""
    columns, rows = shutil.get_terminal_size()
    return columns or 80, rows or 24


class LiveText:
    """Lines on a terminal that the next lines replace.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._height = 0
        self._width = 0

    def show(self, lines: Sequence[str]) -> None:
        """Draws lines in place of those drawn before; each must fit into the terminal's width."""
        width = terminal_size()[0]
        # In a terminal that became narrower, the old lines take more rows than before.
        start = "\x1b[H\x1b[2J" if self._height and width < self._width else f"\x1b[{self._height}A\r\x1b[J"
        self._stream.write((start if self._height else "") + "".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._height, self._width = len(lines), width
