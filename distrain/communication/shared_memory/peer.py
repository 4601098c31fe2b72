"""The other ranks of a host, and waiting for them."""

from __future__ import annotations

import ctypes
import math
import os
import time

import torch.distributed as dist

from distrain.communication.shared_memory.arena import Memory
from distrain.communication.shared_memory.control_block import FINISHED, GIVEN_UP, STARTED, Board, Entry
from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.health.judge import UNREPORTED_EXIT
from distrain.health.process import Process

#: Looks at a count before others get the processor: a few µs, in which no other thread of this process runs, nor the
#: peer itself where it has come to this processor.
_SPINS = 50
#: How long it is only yielded, in seconds; then this rank sleeps between two looks, longer the longer it waits.
_YIELD_SECONDS = 3e-4
#: A yield that takes longer has let another thread run.
_SHARED_SECONDS = 1e-5
#: How often a rank moves at most, in seconds: in this time the system itself sees who needs a processor.
_MOVE_SECONDS = 1e-3
_LEAST_SLEEP, _MOST_SLEEP, _SLEEP_SHARE = 5e-5, 1e-3, 0.05
#: How often a process that is waited for is looked at.
_LOOK_SECONDS = 0.02


class Peer:
    """Another rank of this host, as far as its memory tells.

    Args:
        who: For messages.
        process: That it is.
        memory: Its arena.
        limit: How long to wait for it, in seconds.
        crowded: There are more ranks than cores, so that waiting must leave the processor at once.
        moves: Of this rank and the peer this one goes where they are on one processor.

    Attributes:
        who: As given.
        memory: As given.
    """

    def __init__(
        self, who: RankName, process: Process, memory: Memory, limit: float, *, crowded: bool, moves: bool
    ) -> None:
        self.who = who
        self._process = process
        self.memory = memory
        self._board = Board(memory.words)
        self._words = self._board.words
        self._spins = 0 if crowded else _SPINS
        self._yield_seconds = 0.0 if crowded else _YIELD_SECONDS
        self._limit = limit
        self._moves = moves
        self._moved = -math.inf

    @property
    def token(self) -> int:
        """See :class:`Board`."""
        return self._board.token

    @property
    def finished(self) -> int:
        """How many collectives it needs no messages of any more."""
        return self._words[FINISHED]

    def await_start(self, number: int) -> None:
        """Waits until it has started collective ``number``.

        Raises:
            PeerLost: Its process is gone.
            torch.distributed.DistError: The time is up, or the peer has given up.
        """
        self._await(STARTED, number)

    def await_finish(self, number: int) -> None:
        """Waits until it needs no message of collective ``number`` any more; raises as the above."""
        self._await(FINISHED, number)

    def is_in(self, number: int, entry: Entry) -> bool:
        """Whether what it has started is the same, wherever the message lies."""
        return self._board.has(number, entry)

    def entry(self, number: int) -> Entry:
        """What it told of a collective that it has started."""
        return self._board.entry(number)

    def offset(self, number: int) -> int:
        """Where in its arena lies what it gave to a collective that it has started."""
        return self._board.offset(number)

    def _await(self, count: int, number: int) -> None:
        words = self._words
        if words[count] > number:
            return
        for _ in range(self._spins):
            if words[count] > number:
                return
        began = looked = time.monotonic()
        while words[count] <= number:
            now = time.monotonic()
            waited = now - began
            if waited < self._yield_seconds:
                os.sched_yield()
                if self._moves and time.monotonic() - now > _SHARED_SECONDS and now - self._moved > _MOVE_SECONDS:
                    self._moved = now
                    leave_processor()
                continue
            if now - looked > _LOOK_SECONDS:
                looked = now
                # In this order: what it did before it went is done.
                if not self._process.is_alive and words[count] <= number:
                    raise PeerLost(self.who.rank, self.who.host, UNREPORTED_EXIT)
                if words[GIVEN_UP] and words[count] <= number:
                    raise dist.DistError(f"{self.who} can't go on with other hosts")
                if waited > self._limit:
                    raise dist.DistError(
                        f"{self.who} did not come to a collective of ranks that share memory within {self._limit:g} s"
                    )
            time.sleep(min(max(_SLEEP_SHARE * waited, _LEAST_SLEEP), _MOST_SLEEP))


def leave_processor() -> None:
    """Moves this thread to another processor, if it may run on any.

    Ranks that yield to each other stay on one for long, at five times what a collective costs else: the system looks
    for a better place when a thread wakes up, and these never sleep.
    """
    allowed = os.sched_getaffinity(0)
    others = allowed - {ctypes.CDLL(None).sched_getcpu()}
    if others:
        try:
            os.sched_setaffinity(0, others)
        finally:
            os.sched_setaffinity(0, allowed)
