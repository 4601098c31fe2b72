"""Decides which rank blocks the run, from the heartbeats that every rank publishes.

All times are read from the observer's own monotonic clock: when *it* last saw a value change. Clocks of other hosts and
ages computed by other ranks are not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Heartbeat:
    """A rank's state, published at regular intervals as a sign of life.

    Attributes:
        number: Sequence number, different for every heartbeat of a rank.
        progress: Increases while the rank makes progress; ``None`` in phases without a time limit.
        step: Optimizer updates done.
        phase: What the rank is doing; see :class:`~distrain.health.activity.RankActivity`.
        waiting: Its main thread waits for other ranks.
        expendable: The other ranks continue without it.
        leaving: The last heartbeat before the process ends in an orderly way.
        failing: The rank knows that the run has failed; the values are those at that moment.
        shard: ``(index, count)``: its share of a batch.
    """

    number: int = 0
    progress: int | None = None
    step: int = 0
    phase: str = ""
    waiting: bool = False
    expendable: bool = False
    leaving: bool = False
    failing: bool = False
    shard: tuple[int, int] = (0, 0)

    def to_json(self) -> str:
        """Encodes the heartbeat for the store, in less than 100 bytes."""
        return json.dumps(astuple(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        """Decodes a heartbeat."""
        values = json.loads(text)
        # JSON has lists where Python has tuples.
        return replace(cls(*values), shard=tuple(values[-1]))


@dataclass
class ObservedRank:
    """What an observer knows about a rank.

    Attributes:
        heartbeat: The latest one.
        heartbeat_time: When a new heartbeat was last seen, in seconds.
        progress_time: When a change of progress or phase was last seen, in seconds.
        exited: The rank's process, on the observer's host, has ended.
    """

    heartbeat: Heartbeat
    heartbeat_time: float
    progress_time: float
    exited: bool = False

    def update(self, heartbeat: Heartbeat, now: float) -> None:
        """Records the heartbeat read at time ``now``."""
        if heartbeat.number != self.heartbeat.number:
            self.heartbeat_time = now
        if (heartbeat.progress, heartbeat.phase) != (self.heartbeat.progress, self.heartbeat.phase):
            self.progress_time = now
        self.heartbeat = heartbeat

    def reset_clocks(self, now: float) -> None:
        """Restarts both time limits, because the observer itself was suspended."""
        self.heartbeat_time = self.progress_time = now

    @property
    def is_required(self) -> bool:
        """Whether the run needs this rank: it is neither leaving nor expendable."""
        return not (self.heartbeat.leaving or self.heartbeat.expendable)


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds.

    Attributes:
        silence: Longest time without a new heartbeat.
        step: Longest time without progress.
        setup: Longest time without progress before the first step and after the last one.
    """

    silence: float
    step: float
    setup: float

    def for_progress(self, heartbeat: Heartbeat) -> tuple[float, str]:
        """Returns the limit that applies in the heartbeat's phase, and the configuration key that sets it."""
        if heartbeat.phase in ("set-up", "finishing"):
            return self.setup, "runtime.setup_timeout_seconds"
        return self.step, "runtime.timeout_seconds"


UNREPORTED_EXIT = "the process exited without reporting an error (killed?)"


@dataclass(frozen=True)
class Verdict:
    """The rank that blocks the run, and the reason."""

    rank: int
    reason: str


def judge(own_rank: int, ranks: Mapping[int, ObservedRank], limits: Limits, now: float) -> Verdict | None:
    """Returns the rank that blocks the run, or ``None`` if all is well.

    In this order of priority: a rank whose process has ended; the rank without a heartbeat for longest; a rank that
    makes no progress although it waits for no other; and, if all ranks have been waiting for too long, the one with
    the fewest steps.

    Args:
        own_rank: The observer, whose own heartbeats are not checked.
        ranks: Every rank of the run, the observer included.
        limits: Time limits.
        now: The observer's clock, in seconds.
    """
    required = {rank: observed for rank, observed in ranks.items() if observed.is_required}
    for rank, observed in required.items():
        if observed.exited:
            return Verdict(rank, UNREPORTED_EXIT)
    silent = [
        rank
        for rank, observed in required.items()
        if rank != own_rank and now - observed.heartbeat_time > limits.silence
    ]
    if silent:
        rank = min(silent, key=lambda rank: (required[rank].heartbeat_time, rank))
        cause = "its process is stopped, or its host or network is down"
        return Verdict(rank, f"no heartbeat for {limits.silence:g} s ({cause}){_phase_suffix(ranks[rank])}")
    # Expendable ranks are included: the others wait for them too, as long as their processes exist.
    timed = {
        rank: observed
        for rank, observed in ranks.items()
        if observed.heartbeat.progress is not None and not observed.heartbeat.leaving and not observed.exited
    }
    late = {
        rank: observed
        for rank, observed in timed.items()
        if now - observed.progress_time > limits.for_progress(observed.heartbeat)[0]
    }
    busy = [rank for rank, observed in late.items() if observed.is_required and not observed.heartbeat.waiting]
    if busy:
        # The others may be late only because of the one with the fewest steps, or the one that is late for longest.
        rank = min(busy, key=lambda rank: (late[rank].heartbeat.step, late[rank].progress_time, rank))
        return Verdict(rank, f"{_no_progress(limits, late[rank])}, and it waits for no other rank")
    if late and len(late) == len(timed) and all(observed.heartbeat.waiting for observed in late.values()):
        rank = min(late, key=lambda rank: (late[rank].heartbeat.step, rank))
        return Verdict(rank, f"{_no_progress(limits, late[rank])}; all ranks wait, and this one is furthest behind")
    return None


def why_stuck(own: ObservedRank, limits: Limits, now: float) -> str | None:
    """Returns why this rank is stuck, or ``None``; for expendable ranks, which :func:`judge` does not accuse."""
    late = own.heartbeat.progress is not None and now - own.progress_time > limits.for_progress(own.heartbeat)[0]
    return _no_progress(limits, own) if late and not own.heartbeat.waiting else None


def _no_progress(limits: Limits, observed: ObservedRank) -> str:
    seconds, key = limits.for_progress(observed.heartbeat)
    return f"no progress within {key}={seconds:g}{_phase_suffix(observed)}"


def _phase_suffix(observed: ObservedRank) -> str:
    return f" in {observed.heartbeat.phase}" if observed.heartbeat.phase else ""
