"""Which collectives a rank has started and finished, written where the other ranks of its host can read it.

A control block lies at the beginning of a rank's arena; only that rank writes it. Other ranks must see the writes in
their order: first the message, then the entry that describes it, then the count that announces it. On x86-64 plain
stores and loads keep that order, since its memory model is total store order (Sewell et al. 2010, doi
10.1145/1785414.1785443). Other processors give no such guarantee. Every value is one aligned word, so no reader sees
half of a write.
"""

from __future__ import annotations

from typing import NamedTuple

#: Indices of 8-byte words. Each count has a cache line of its own.
_TOKEN, STARTED, FINISHED, ABORTED = 0, 8, 16, 24
_FIRST_ENTRY, _ENTRY_WORDS = 64, 8
#: Number of entries: so many collectives may be started before all ranks have finished the oldest.
ENTRIES = 1024
#: Bytes of a control block.
CONTROL_BLOCK_BYTES = 8 * (_FIRST_ENTRY + _ENTRY_WORDS * ENTRIES)


class Entry(NamedTuple):
    """A started collective.

    Attributes:
        code: Operation, dtype and detail, encoded by :mod:`distrain.communication.shared_memory.channel`.
        size: Bytes of each rank's tensor.
        offset: First byte of the rank's message in its arena, if it has one.
    """

    code: int
    size: int
    offset: int = 0


class ControlBlock:
    """The counts and entries of one rank.

    Args:
        words: The rank's arena as 8-byte integers.

    Attributes:
        words: As given; ranks that wait read the counts there.
    """

    def __init__(self, words: memoryview) -> None:
        self.words = words

    @property
    def token(self) -> int:
        """A random number by which another rank recognises that it has mapped the right arena."""
        return int(self.words[_TOKEN])

    @token.setter
    def token(self, token: int) -> None:
        self.words[_TOKEN] = token

    def announce(self, number: int, entry: Entry) -> None:
        """Announces collective ``number``, whose message is complete."""
        words, at = self.words, _FIRST_ENTRY + _ENTRY_WORDS * (number % ENTRIES)
        words[at], words[at + 1], words[at + 2] = entry
        words[STARTED] = number + 1

    def matches(self, number: int, entry: Entry) -> bool:
        """Whether the started collective ``number`` is the same as ``entry``, apart from the message's offset."""
        at = _FIRST_ENTRY + _ENTRY_WORDS * (number % ENTRIES)
        return self.words[at] == entry.code and self.words[at + 1] == entry.size

    def offset(self, number: int) -> int:
        """Offset of the message of the started collective ``number``."""
        return self.words[_FIRST_ENTRY + _ENTRY_WORDS * (number % ENTRIES) + 2]

    def entry(self, number: int) -> Entry:
        """The entry of collective ``number``, which this rank has started and the reader has not yet finished."""
        at = _FIRST_ENTRY + _ENTRY_WORDS * (number % ENTRIES)
        return Entry(*self.words[at : at + 3])
