"""Which rank holds up the others, judged from what each says of itself once a second.

All times are the observer's own, of a clock that only goes forward: when it last saw something change. Clocks of other
hosts, and ages that others computed, play no part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life.

    Attributes:
        number: Of this beat; each has another one.
        progress: Goes up while the rank gets on; ``None`` for one that is not judged by that.
        step: Updates done.
        phase: In a word.
        waiting: Its main thread waits for other ranks.
        expendable: The others go on without it.
        left: It is about to end; nothing more will come.
        ending: It knows that the run has failed, and says where it was then.
        shard: ``(index, count)``: its share of a batch.
    """

    number: int = 0
    progress: int | None = None
    step: int = 0
    phase: str = ""
    waiting: bool = False
    expendable: bool = False
    left: bool = False
    ending: bool = False
    shard: tuple[int, int] = (0, 0)

    def packed(self) -> str:
        """As text of a few dozen bytes."""
        return json.dumps(astuple(self))

    @classmethod
    def unpacked(cls, text: str | bytes) -> Heartbeat:
        """The other way round."""
        told = json.loads(text)
        # JSON knows no tuples.
        return replace(cls(*told), shard=tuple(told[-1]))


@dataclass
class ObservedRank:
    """What an observer knows of a rank.

    Attributes:
        beat: The last one.
        beat_seen: When a new beat was seen last, in seconds.
        progress_seen: When progress, or something else to do, was seen last.
        gone: Its process, on the observer's host, is not there any more.
    """

    beat: Heartbeat
    beat_seen: float
    progress_seen: float
    gone: bool = False

    def look(self, beat: Heartbeat, now: float) -> None:
        """Takes in the newest beat."""
        if beat.number != self.beat.number:
            self.beat_seen = now
        if (beat.progress, beat.phase) != (self.beat.progress, self.beat.phase):
            self.progress_seen = now
        self.beat = beat

    def forgive(self, now: float) -> None:
        """Starts the clocks anew: the observer itself was away."""
        self.beat_seen = self.progress_seen = now

    @property
    def counts(self) -> bool:
        """Whether the others need it."""
        return not (self.beat.left or self.beat.expendable)


@dataclass(frozen=True)
class Limits:
    """How long is too long, in seconds.

    Attributes:
        silence: Without a beat.
        step: Without progress.
        setup: The same before the first step and after the last, when figures may be drawn.
    """

    silence: float
    step: float
    setup: float

    def of(self, beat: Heartbeat) -> tuple[float, str]:
        """How long a rank may be without progress in what it does, and the key that says so."""
        if beat.phase in ("set-up", "finishing"):
            return self.setup, "runtime.setup_timeout_seconds"
        return self.step, "runtime.timeout_seconds"


UNREPORTED_EXIT = "the process exited without reporting an error (killed?)"


@dataclass(frozen=True)
class Verdict:
    """The rank that is to blame, and why in words."""

    rank: int
    reason: str


def judge(own: int, seen: Mapping[int, ObservedRank], limits: Limits, now: float) -> Verdict | None:
    """Who holds up the run, if anybody does.

    A process that is gone; else the rank that has been silent for longest; else one that makes no progress though it
    waits for nobody; else, if all wait and have done so for too long, the one that is furthest behind.

    Args:
        own: The observer, which is not silent to itself.
        seen: Every rank.
        limits: How long is too long.
        now: By the observer's clock.
    """
    counting = {rank: each for rank, each in seen.items() if each.counts}
    for rank, each in counting.items():
        if each.gone:
            return Verdict(rank, UNREPORTED_EXIT)
    silent = [rank for rank, each in counting.items() if rank != own and now - each.beat_seen > limits.silence]
    if silent:
        rank = min(silent, key=lambda rank: (counting[rank].beat_seen, rank))
        return Verdict(
            rank, f"no sign of life for {limits.silence:g} s (stopped, or its host or network is gone){_at(seen[rank])}"
        )
    # Those that the others can do without are waited for as well, until they are gone.
    working = {
        rank: each
        for rank, each in seen.items()
        if each.beat.progress is not None and not each.beat.left and not each.gone
    }
    late = {rank: each for rank, each in working.items() if now - each.progress_seen > limits.of(each.beat)[0]}
    busy = [rank for rank, each in late.items() if each.counts and not each.beat.waiting]
    if busy:
        # The others may be late because of the one that is furthest behind, in steps or else in time.
        rank = min(busy, key=lambda rank: (late[rank].beat.step, late[rank].progress_seen, rank))
        return Verdict(rank, f"{_no_progress(limits, late[rank])}, and it waits for no other rank")
    if late and len(late) == len(working) and all(each.beat.waiting for each in late.values()):
        rank = min(late, key=lambda rank: (late[rank].beat.step, rank))
        return Verdict(rank, f"{_no_progress(limits, late[rank])}; all ranks wait, and this one is furthest behind")
    return None


def is_stuck(own: ObservedRank, limits: Limits, now: float) -> str | None:
    """Why a rank should give itself up that nobody else would, because the others go on without it."""
    late = own.beat.progress is not None and now - own.progress_seen > limits.of(own.beat)[0]
    return _no_progress(limits, own) if late and not own.beat.waiting else None


def _no_progress(limits: Limits, seen: ObservedRank) -> str:
    seconds, key = limits.of(seen.beat)
    return f"no progress within {key}={seconds:g}{_at(seen)}"


def _at(seen: ObservedRank) -> str:
    return f" in {seen.beat.phase}" if seen.beat.phase else ""
