"""What a rank tells its peers of the collectives that it started: numbers in memory that it alone writes.

The order in which a rank writes is the order in which its peers see it: first the message, then the entry that
describes it, then the count that announces it. Plain stores and loads keep that order on x86-64, whose memory model is
total store order (Sewell et al. 2010, doi 10.1145/1785414.1785443), and not elsewhere; each is one aligned word, so
none is seen half.
"""

from __future__ import annotations

from typing import NamedTuple

#: Words of 8 bytes. Counts have cache lines of their own.
_TOKEN, STARTED, FINISHED, GIVEN_UP = 0, 8, 16, 24
_ENTRIES_FROM, _ENTRY = 64, 8
#: As many collectives may be started and not yet finished by all.
ENTRIES = 1024
#: Bytes of a board, which lies at an arena's beginning.
BOARD_SIZE = 8 * (_ENTRIES_FROM + _ENTRY * ENTRIES)


class Entry(NamedTuple):
    """A started collective.

    Attributes:
        code: What is done with what, as :mod:`distrain.communication.shared_memory.channel` puts it.
        size: Bytes of each rank's tensor.
        offset: Where the message begins in the rank's arena, if there is one.
    """

    code: int
    size: int
    offset: int = 0


class Board:
    """A rank's counts and entries.

    Args:
        words: Its arena, by words of 8 bytes.

    Attributes:
        words: The same, for who waits for a count.
    """

    def __init__(self, words: memoryview) -> None:
        self.words = words

    @property
    def token(self) -> int:
        """By which a peer knows that it opened the right memory."""
        return int(self.words[_TOKEN])

    @token.setter
    def token(self, token: int) -> None:
        self.words[_TOKEN] = token

    def announce(self, number: int, entry: Entry) -> None:
        """Tells of collective ``number``, whose message is complete."""
        words, at = self.words, _ENTRIES_FROM + _ENTRY * (number % ENTRIES)
        words[at], words[at + 1], words[at + 2] = entry
        words[STARTED] = number + 1

    def has(self, number: int, entry: Entry) -> bool:
        """Whether a collective that was started is this one, wherever the message lies."""
        at = _ENTRIES_FROM + _ENTRY * (number % ENTRIES)
        return self.words[at] == entry.code and self.words[at + 1] == entry.size

    def offset(self, number: int) -> int:
        """Where the message of one begins."""
        return self.words[_ENTRIES_FROM + _ENTRY * (number % ENTRIES) + 2]

    def entry(self, number: int) -> Entry:
        """What was told of a collective that was started and is not yet finished by this rank."""
        at = _ENTRIES_FROM + _ENTRY * (number % ENTRIES)
        return Entry(*self.words[at : at + 3])
