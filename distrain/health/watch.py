"""Signs of life outside the collectives: a rank that hangs, stands still or is gone is named, and all ranks end.

Each rank has a thread that writes a beat to the run's store once a second, over a connection of its own, reads
everybody's, and judges by :mod:`distrain.health.judge`. A blocked main thread delays neither.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.errors import PeerLost, Terminated
from distrain.health.activity import RankActivity
from distrain.health.crash_dump import read_crash_dump
from distrain.health.failure_report import (
    CLAIM,
    NO_CLAIM,
    Failure,
    FailureReporter,
    FirstFailure,
    first_line,
    is_broken_connection,
    say,
)
from distrain.health.judge import UNREPORTED_EXIT, Heartbeat, Limits, ObservedRank, is_stuck, judge
from distrain.health.members import beat_key, find_members, read_beats, told_key
from distrain.health.rank_states import RankDetails, RankStates
from distrain.health.thread_stack import ThreadStack

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 1.0
#: Beats within the time that silence may last.
_BEATS = 4
#: How long the main thread gets to fail by itself when the run has failed.
_MOMENT_SECONDS = 3.0
#: How long a rank that others blame gets to end itself.
_LAST_WORDS_SECONDS = 2.0
_DYING_SECONDS = 1.0
#: How long a peer whose failure broke a collective off has to say so, and to be missed if it can't.
_SAY_SECONDS, _MISS_SECONDS = 2.0, 6.0
#: After this the process ends even if its last words can't be written.
_AT_LAST_SECONDS = 10.0


@dataclass(frozen=True)
class WatchIdentity:
    """Where the ranks of a run find each other.

    Attributes:
        rank: This one.
        size: How many there are.
        host: This one's.
        address: Of the store, for messages.
        is_served_by_rank_0: The store goes with rank 0's process; else with its launcher.
    """

    rank: int
    size: int
    host: str
    address: str
    is_served_by_rank_0: bool


class Watch:
    """Watches over the ranks of a run.

    Args:
        meeting: Who they are; all have joined.
        store: A connection to their store for this alone.
        limits: How long is too long.
        position: This rank's, kept up to date by the thread that makes this object.
        reporter: Tells of failures.
        before_end: Called before a thread of this object ends the process.
    """

    def __init__(
        self,
        meeting: WatchIdentity,
        store: Store,
        limits: Limits,
        position: RankActivity,
        reporter: FailureReporter,
        before_end: Callable[[], None],
    ) -> None:
        self._meeting = meeting
        self._rank = meeting.rank
        self._store = store
        self._limits = limits
        self._position = position
        self._reporter = reporter
        self._before_end = before_end
        self._members = find_members(store, meeting.size, meeting.host)
        self._interval = min(_INTERVAL_SECONDS, limits.silence / _BEATS)
        # An observer that was away for longer than this can't tell who else was.
        self._absence = max(_INTERVAL_SECONDS, min(limits.silence, limits.step) / 2)
        self._main = threading.get_ident()
        now = time.monotonic()
        self._seen = {rank: ObservedRank(Heartbeat(), now, now) for rank in range(meeting.size)}
        self._looked = now
        self._suspect: int | None = None
        self._frozen: ThreadStack | None = None
        self._number = self._sent = 0
        self._talking_since: float | None = None
        self._ending_since: float | None = None
        self._changed = threading.Condition()
        self._wake, self._closing, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="distrain-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="distrain-watch-guard", daemon=True).start()

    # --- what the main thread asks -----------------------------------------------------------------------------------

    def announce(self) -> None:
        """Beats now, and returns when the store has it."""
        with self._changed:
            wanted = self._number + 1
            self._wake.set()
            self._changed.wait_for(lambda: self._sent >= wanted or self._done.is_set(), _MOMENT_SECONDS)

    def close(self) -> None:
        """Says good-bye; if the run has failed, processes of this host that stand still are ended first."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_MOMENT_SECONDS)

    def freeze(self, error: BaseException) -> None:
        """From now on the main thread is said to be where this error came from, not where it is dealt with."""
        self._frozen = ThreadStack.of_error(error)

    def culprit(self, error: BaseException, store: Store, passed_over: Collection[int]) -> Failure | None:
        """Another rank that is behind an error of this one, as far as can be seen; ``None`` if it tells so itself.

        Args:
            error: What ended this rank.
            store: The main thread's connection.
            passed_over: Ranks that are gone and are not the reason.

        Raises:
            RuntimeError: The store is gone.
        """
        broken = is_broken_connection(error)
        if not (broken or isinstance(error, Terminated | PeerLost)):
            return None
        lost = self.failure_of(error.rank, error.reason) if isinstance(error, PeerLost) else None
        began = time.monotonic()
        # A collective that breaks off is most often a peer's failure: give that peer the time to say so.
        while (waited := time.monotonic() - began) < _MISS_SECONDS:
            # In this order: who said something and then ended, did so in the store before.
            gone = [rank for rank, member in enumerate(self._members) if member.is_gone]
            if store.get(CLAIM) != NO_CLAIM.encode():
                return lost
            for rank, beat in read_beats(store, gone).items():
                # Where a launcher ends the others, one that they would have done without is the reason after all.
                done_without = beat.expendable and not isinstance(error, Terminated)
                # A server learns from beats which step it was, and they may be a second old.
                is_early = waited < _SAY_SECONDS and not self._position.is_measured
                if not (beat.left or done_without or rank in passed_over or is_early):
                    return self.failure_of(rank, UNREPORTED_EXIT)
            if waited > _SAY_SECONDS:
                if not broken or all(member.is_near for member in self._members):
                    break
                for rank in self._missed():
                    return self.failure_of(rank, "its connections broke off and it gives no sign of life")
            time.sleep(0.05)
        return lost

    def knows_of_failure(self, store: Store) -> bool:
        """Whether a rank has told of a failure, or is gone without a word; answers at once."""
        gone = (self._members[rank].is_gone and not seen.beat.left for rank, seen in self._seen.items())
        return store.get(CLAIM) != NO_CLAIM.encode() or any(gone)

    def _missed(self) -> list[int]:
        """Ranks on other hosts that left out a few beats, which alone would not be a failure."""
        latest = time.monotonic() - (_BEATS - 0.5) * self._interval
        return [
            rank
            for rank, seen in self._seen.items()
            if not self._members[rank].is_near and not seen.beat.left and seen.beat_seen < latest
        ]

    def failure_of(self, rank: int, error: str) -> Failure:
        """What there is to tell of another rank."""
        steps = [self._seen[rank].beat.step]
        if not self._position.independent_steps:
            # Its last beat may be a second old; ranks that keep step wait for each other in the same one.
            steps += [seen.beat.step for seen in self._seen.values() if seen.beat.progress is not None]
            steps += [self._position.step] if self._position.is_measured else []
        words = self._last_words(rank)
        if error == UNREPORTED_EXIT and words:
            error = f"the process crashed: {words.splitlines()[0]}"
        return Failure(rank, self._members[rank].host, max(steps), error)

    def loss_of_store(self, problem: str) -> Failure:
        """Whose failure it is that the store can't be reached."""
        address, by_rank_0 = self._meeting.address, self._meeting.is_served_by_rank_0
        if by_rank_0 and self._members[0].is_near:
            # A process that is killed closes its connections a little before it is gone.
            deadline = time.monotonic() + _DYING_SECONDS
            while time.monotonic() < deadline:
                if self._members[0].is_gone:
                    return self.failure_of(0, UNREPORTED_EXIT)
                time.sleep(0.02)
        served = f"the store at {address}, which {'it' if by_rank_0 else 'its launcher'} served, can't be reached"
        return self.failure_of(0, f"{served}: {problem}")

    def complete(self, failure: Failure, store: Store | None) -> None:
        """Adds what is known of all ranks to a failure.

        Args:
            failure: Whose ``samples``, ``others`` and, if there is none, ``traceback`` are set.
            store: To read from; ``None`` if it can't be reached.
        """
        rank = failure.rank
        found = RankStates({each: seen.beat for each, seen in self._seen.items()}, {})
        if store is not None:
            found = RankStates.read(store, found.beats, self._members, (rank, self._rank), self._interval)
        found.beats[self._rank], found.told[self._rank] = self._words()
        failure.samples = found.samples(rank, self._rank, self._position)
        failure.traceback = failure.traceback or self._last_words(rank) or found.stack(rank)
        failure.others = found.others(rank, self._members)

    def _last_words(self, rank: int) -> str:
        return read_crash_dump(self._reporter.folder, rank) if self._members[rank].is_gone else ""

    # --- beating -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._watch()
        except RuntimeError as error:
            # Where rank 0 serves the store, that ends with the run.
            if not self._closing.wait(_MOMENT_SECONDS):
                self._end(self.loss_of_store(first_line(error)), None)
        finally:
            self._done.set()
            with self._changed:
                self._changed.notify_all()

    def _watch(self) -> None:
        while True:
            closing = self._closing.is_set()
            claim = self._exchange(left=closing)
            if claim is not None:
                # Whoever writes the report waits for where this rank was.
                self._exchange(left=closing, ending=True)
                self._end(claim.failure, self._store)
                return
            if closing:
                self._put_down(None)
                if self._rank == 0 and self._meeting.is_served_by_rank_0:
                    self._see_off()
                return
            failure = self._judge()
            if failure is not None and not self._closing.is_set():
                self._end(failure, self._store)
                return
            self._wake.wait(self._interval)
            self._wake.clear()

    def _exchange(self, *, left: bool, ending: bool = False) -> FirstFailure | None:
        """Beats and reads everybody's beats; returns the run's failure, if somebody told of one."""
        with self._changed:
            self._number += 1
            number = self._number
        beat, told = self._words(left=left, ending=ending)
        self._talking_since = time.monotonic()
        self._store.set(beat_key(self._rank), beat.packed())
        self._store.set(told_key(self._rank), told.packed())
        # Before the beats are read: who ends as it should has said so in the store first.
        gone = [rank for rank, member in enumerate(self._members) if member.is_gone]
        claim = FirstFailure.unpacked(self._store.get(CLAIM))
        beats = read_beats(self._store, self._seen)
        now = time.monotonic()
        self._talking_since = None
        for rank, seen in self._seen.items():
            seen.look(beats[rank], now)
            seen.gone = rank in gone
        with self._changed:
            self._sent = number
            self._changed.notify_all()
        return claim

    def _words(self, *, left: bool = False, ending: bool = False) -> tuple[Heartbeat, RankDetails]:
        """What this rank has to tell the others now."""
        position, calls = self._position, self._calls()
        beat = Heartbeat(
            self._number,
            position.progress if position.is_measured else None,
            position.step,
            position.phase,
            calls.waiting,
            position.expendable,
            left,
            ending,
            position.shard,
        )
        return beat, RankDetails(position.epoch, position.offset, position.count, calls.lines)

    def _calls(self) -> ThreadStack:
        return self._frozen or ThreadStack.of_thread(self._main)

    def _judge(self) -> Failure | None:
        now = time.monotonic()
        absent, self._looked = now - self._looked > self._absence, now
        if absent:
            for seen in self._seen.values():
                seen.forgive(now)
        stuck = is_stuck(self._seen[self._rank], self._limits, now)
        if stuck is not None and self._position.expendable and not self._closing.is_set():
            self._give_up(stuck)
        verdict = judge(self._rank, self._seen, self._limits, now)
        suspect, self._suspect = self._suspect, None if verdict is None else verdict.rank
        # Twice, since a rank may just have begun or ended to wait.
        if verdict is None or suspect != verdict.rank:
            return None
        return self.failure_of(verdict.rank, verdict.reason)

    def _see_off(self) -> None:
        """Waits a moment for the others, who would find the store gone."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            if all(beat.left for beat in read_beats(self._store, self._seen).values()):
                return
            time.sleep(0.01)

    def _guard(self) -> None:
        """Looks after the other thread, which may be caught in a call to a store that is gone without a word."""
        looked = time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._absence and self._talking_since is not None:
                self._talking_since = now
            looked, talking_since = now, self._talking_since
            if self._ending_since is not None:
                if now - self._ending_since > _AT_LAST_SECONDS and not self._closing.is_set():
                    os._exit(1)
            elif talking_since is not None and now - talking_since > self._limits.silence:
                failure = self.loss_of_store(f"no answer for {self._limits.silence:g} s")
                threading.Thread(target=self._end, args=(failure, None), daemon=True).start()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, failure: Failure, store: Store | None) -> None:
        """Tells of the failure, and ends this process unless the main thread does so itself."""
        self._ending_since = time.monotonic()
        self._reporter.tell(failure, self._here(), store, self.complete)
        told = self._reporter.told
        self._put_down(told)
        # A rank that others blame is beyond help, and they wait for it to go.
        is_blamed = told is not None and told.failure.rank == self._rank != told.by
        if not self._closing.wait(0 if is_blamed else _MOMENT_SECONDS):
            self._leave()

    def _give_up(self, reason: str) -> NoReturn:
        """Ends this process alone; the others go on."""
        self._ending_since = time.monotonic()
        failure = self.failure_of(self._rank, reason)
        log.error("%s\n%s", failure.error, self._here())
        say(f"distrain: {failure.line()}; the others go on")
        self._exchange(left=True)
        self._leave()

    def _leave(self) -> NoReturn:
        self._before_end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _here(self) -> str:
        return "\n".join(["its main thread is in:", *self._calls().lines])

    def _put_down(self, claim: FirstFailure | None) -> None:
        """Ends processes of this host that will not end by themselves; a launcher would wait half a minute for them.

        After a failure those are the rank that is to blame, if it did not say so itself, and whatever a signal stopped;
        at the end of a run that succeeded, stopped ones that the others did without.
        """
        near = {rank: each.process for rank, each in enumerate(self._members) if each.is_near and rank != self._rank}
        if claim is None:
            near = {rank: process for rank, process in near.items() if self._seen[rank].beat.expendable}
        elif claim.failure.rank in near and claim.by != claim.failure.rank:
            blamed = near[claim.failure.rank]
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
            while blamed.is_alive and not blamed.is_stopped and time.monotonic() < deadline:
                time.sleep(0.05)
            blamed.kill()
            # It could not remove its empty file itself.
            self._last_words(claim.failure.rank)
        for process in near.values():
            if process.is_stopped:
                process.kill()
