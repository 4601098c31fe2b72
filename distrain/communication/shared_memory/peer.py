"""The other ranks of this host, and waiting for them."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import time

import torch.distributed as dist

from distrain.communication.shared_memory.arena import MappedArena
from distrain.communication.shared_memory.control_block import ABORTED, FINISHED, STARTED, ControlBlock, Entry
from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.health.judge import UNREPORTED_EXIT
from distrain.health.process import Process

#: Reads of a count before the core is yielded: a few µs, in which no other thread of this process runs, nor the peer if
#: it shares this core.
_SPINS = 50
#: Seconds in which a waiting rank only yields. After them it sleeps between two reads, longer the longer it waits.
_YIELD_SECONDS = 3e-4
#: A yield that takes longer than this has let another thread run.
_CONTENDED_YIELD_SECONDS = 1e-5
#: Least seconds between two migrations; in between, the scheduler itself may place the threads.
_MIGRATION_SECONDS = 1e-3
#: Bounds of a sleep in seconds, and its length as a fraction of the time waited so far.
_MIN_SLEEP, _MAX_SLEEP, _SLEEP_FRACTION = 5e-5, 1e-3, 0.05
#: Seconds between two checks whether the peer's process is alive.
_LIVENESS_SECONDS = 0.02


class Peer:
    """Another rank of this host, as seen through its arena.

    Args:
        name: The rank's name for messages.
        process: The peer's OS process.
        arena: The peer's arena.
        timeout: Longest wait for the peer, in seconds.
        oversubscribed: The host has more ranks than cores, so that a waiting rank must yield its core at once.
        migrates: Whether this rank migrates when both share a core; true for one rank of each pair.

    Attributes:
        name: As given.
        arena: As given.
    """

    def __init__(
        self,
        name: RankName,
        process: Process,
        arena: MappedArena,
        timeout: float,
        *,
        oversubscribed: bool,
        migrates: bool,
    ) -> None:
        self.name = name
        self._process = process
        self.arena = arena
        self._control_block = ControlBlock(arena.words)
        self._words = self._control_block.words
        self._spins = 0 if oversubscribed else _SPINS
        self._yield_seconds = 0.0 if oversubscribed else _YIELD_SECONDS
        self._timeout = timeout
        self._migrates = migrates
        self._last_migration = -math.inf

    @property
    def token(self) -> int:
        """See :class:`~distrain.communication.shared_memory.control_block.ControlBlock`."""
        return self._control_block.token

    @property
    def finished(self) -> int:
        """Number of collectives that the peer has finished; it no longer reads their messages."""
        return self._words[FINISHED]

    def has_started(self, number: int) -> bool:
        """Whether the peer has started collective ``number``."""
        return self._words[STARTED] > number

    def await_start(self, number: int) -> None:
        """Waits until the peer has started collective ``number``.

        Raises:
            PeerLost: The peer's process has ended.
            torch.distributed.DistError: The timeout has passed, or the peer has aborted.
        """
        self._await(STARTED, number)

    def await_finish(self, number: int) -> None:
        """Waits until the peer has finished collective ``number``; raises the same as :meth:`await_start`."""
        self._await(FINISHED, number)

    def matches(self, number: int, entry: Entry) -> bool:
        """Whether the peer's started collective ``number`` is the same as ``entry``, apart from the offset."""
        return self._control_block.matches(number, entry)

    def entry(self, number: int) -> Entry:
        """The peer's entry of a collective that it has started."""
        return self._control_block.entry(number)

    def offset(self, number: int) -> int:
        """Offset in the peer's arena of its message to a collective that it has started."""
        return self._control_block.offset(number)

    def _await(self, count: int, number: int) -> None:
        """Waits until the word at index ``count`` exceeds ``number``: spins, then yields, then sleeps."""
        words = self._words
        if words[count] > number:
            return
        for _ in range(self._spins):
            if words[count] > number:
                return
        start = last_check = time.monotonic()
        while words[count] <= number:
            now = time.monotonic()
            waited = now - start
            if waited < self._yield_seconds:
                os.sched_yield()
                if (
                    self._migrates
                    and time.monotonic() - now > _CONTENDED_YIELD_SECONDS
                    and now - self._last_migration > _MIGRATION_SECONDS
                ):
                    self._last_migration = now
                    migrate_to_another_core()
                continue
            if now - last_check > _LIVENESS_SECONDS:
                last_check = now
                # The count is read after the liveness check, because the peer may have raised it just before it ended.
                if not self._process.is_alive and words[count] <= number:
                    raise PeerLost(self.name.rank, self.name.host, UNREPORTED_EXIT)
                if words[ABORTED] and words[count] <= number:
                    raise dist.DistError(f"{self.name} can't continue with other hosts")
                if waited > self._timeout:
                    raise dist.DistError(
                        f"{self.name} did not join a collective of ranks that share memory within {self._timeout:g} s"
                    )
            time.sleep(min(max(_SLEEP_FRACTION * waited, _MIN_SLEEP), _MAX_SLEEP))


@functools.cache
def _c_library() -> ctypes.CDLL:
    """The C library. Every ``CDLL`` makes a class, which is part of a reference cycle, so it is made only once."""
    return ctypes.CDLL(None)


def migrate_to_another_core() -> None:
    """Moves this thread to another core, if its affinity allows more than one.

    Two ranks that yield to each other can stay on one core for long, where a collective takes five times as long. The
    scheduler looks for a better core when a thread wakes up, and yielding threads never sleep.
    """
    allowed = os.sched_getaffinity(0)
    others = allowed - {_c_library().sched_getcpu()}
    if others:
        try:
            os.sched_setaffinity(0, others)
        finally:
            os.sched_setaffinity(0, allowed)
