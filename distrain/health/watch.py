"""Monitors all ranks with heartbeats: a rank that hangs, is stopped or has ended is named, and all ranks then end.

Each rank has a thread that publishes a heartbeat to the run's store once a second, over a connection of its own. It
reads the heartbeats of all ranks, and evaluates them with :mod:`distrain.health.judge`, even while the main thread
blocks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from typing import NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.errors import PeerLost, Terminated, first_line
from distrain.files.escaping import Lines
from distrain.files.terminal import TERMINAL, print_to_stderr
from distrain.health.activity import RankActivity
from distrain.health.crash_dump import read_crash_dump
from distrain.health.failure_report import (
    FIRST_FAILURE_KEY,
    NO_FAILURE,
    Failure,
    FailureReporter,
    FirstFailure,
    is_broken_connection,
)
from distrain.health.judge import UNREPORTED_EXIT, Heartbeat, Limits, ObservedRank, judge, why_stuck
from distrain.health.members import Member, WatchIdentity, details_key, heartbeat_key, read_heartbeats, read_members
from distrain.health.rank_states import RankDetails, RankStates
from distrain.health.thread_stack import ThreadStack

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 1.0
#: Heartbeats within the longest permitted silence.
_HEARTBEATS_PER_SILENCE = 4
#: The run ends after this many rounds in a row have failed: before this rank has been silent for too long.
_MAX_FAILED_ROUNDS = 3
#: After a failure of the run: how long the main thread may take to end by itself.
_MAIN_THREAD_SECONDS = 4.5
#: How long a rank that others hold responsible may take to end itself before it is killed.
_BLAMED_RANK_SECONDS = 2.0
#: How long a process on this host may take to end after its connections closed.
_EXIT_SECONDS = 1.0
#: After a broken collective: how long the peer that caused it may take to report, and how long a silent one is sought.
_REPORT_SECONDS, _SEARCH_SECONDS = 2.0, 6.0
#: After a failure the process ends after this time at the latest.
_FORCED_EXIT_SECONDS = 10.0


class Watch:
    """Publishes this rank's heartbeats and monitors those of all ranks. Created by the main thread.

    Args:
        identity: This rank and its run; all ranks must have registered (:func:`distrain.health.members.register`).
        store: A connection to the run's store that only this object uses.
        limits: Time limits.
        activity: What this rank is doing; kept up to date by the main thread.
        reporter: Reports failures.
        on_launcher_end: Called when the store that the launcher serves has ended: the run is to save and stop.
        before_exit: Called before a thread of this object ends the process.
    """

    def __init__(
        self,
        identity: WatchIdentity,
        store: Store,
        limits: Limits,
        activity: RankActivity,
        reporter: FailureReporter,
        on_launcher_end: Callable[[], None],
        before_exit: Callable[[], None],
    ) -> None:
        self._identity, self._rank = identity, identity.rank
        self._store, self._limits = store, limits
        self._activity = activity
        self._reporter = reporter
        self._on_launcher_end = on_launcher_end
        self._before_exit = before_exit
        self._members = read_members(store, identity.world_size, identity.host)
        self._interval = min(_INTERVAL_SECONDS, limits.silence / _HEARTBEATS_PER_SILENCE)
        # If this thread did not run for longer than this, the whole job may have been suspended: start the clocks anew.
        self._longest_gap = max(_INTERVAL_SECONDS, min(limits.silence, limits.step) / 2)
        self._main_thread = threading.get_ident()
        now = self._last_check = time.monotonic()
        self._observed = {rank: ObservedRank(Heartbeat(), now, now) for rank in range(identity.world_size)}
        self._suspect: int | None = None
        self._stack_of_error: ThreadStack | None = None
        # Rounds in a row that have failed by an unexpected error, and the latest such error.
        self._failed_rounds, self._latest_error = 0, ""
        # Sequence numbers of the latest heartbeat begun, and of the latest one in the store.
        self._number = self._published = 0
        # When the request to the store, or the end of the process, began that is under way; None if there is none.
        self._request_began: float | None = None
        self._store_has_ended = False
        self._exit_began: float | None = None
        self._changed = threading.Condition()
        self._wake, self._closing, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="distrain-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="distrain-watch-guard", daemon=True).start()

    # --- called by the main thread -----------------------------------------------------------------------------------

    def publish_now(self) -> None:
        """Publishes a heartbeat now, and returns when the store has it."""
        with self._changed:
            number = self._number + 1
            self._wake.set()
            self._changed.wait_for(
                lambda: self._published >= number or self._store_has_ended or self._done.is_set(), _MAIN_THREAD_SECONDS
            )

    def ranks(self) -> list[tuple[Member, ObservedRank]]:
        """Every rank, and what this one knows of it now; for any thread, which must not change it."""
        return [(member, self._observed[rank]) for rank, member in enumerate(self._members)]

    def close(self) -> None:
        """Publishes that this rank leaves, kills local processes that would not end by themselves, ends the watch."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_MAIN_THREAD_SECONDS)

    def keep_stack_of(self, error: BaseException) -> None:
        """Publishes from now on the stack at which this error was raised, instead of the main thread's current one."""
        self._stack_of_error = ThreadStack.of_error(error)

    def find_cause(self, error: BaseException, store: Store, ignored_ranks: Collection[int]) -> Failure | None:
        """Returns the failure of another rank that caused an error on this one.

        Args:
            error: What ended this rank.
            store: The main thread's connection to the store.
            ignored_ranks: Ranks that ended earlier and did not stop the run.

        Returns:
            The failure, or ``None`` if this rank's error has no such cause or the other rank has already reported it.

        Raises:
            RuntimeError: The store cannot be reached.
        """
        broken = is_broken_connection(error)
        if not (broken or isinstance(error, Terminated | PeerLost)):
            return None
        known_step = error.step if isinstance(error, PeerLost) else None
        lost_peer = self.describe_failure(error.rank, error.reason, known_step) if isinstance(error, PeerLost) else None
        began = time.monotonic()
        # Most often a collective breaks off because a peer failed. That peer gets time to report its own failure.
        while (waited := time.monotonic() - began) < _SEARCH_SECONDS:
            # In this order: a process publishes its failure before it ends, so an ended one is read after it published.
            exited = [rank for rank, member in enumerate(self._members) if member.has_exited]
            if store.get(FIRST_FAILURE_KEY) != NO_FAILURE.encode():
                return lost_peer
            for rank, heartbeat in read_heartbeats(store, exited).items():
                # If the launcher ends this rank, the end of an expendable rank is why it does so.
                was_expendable = heartbeat.expendable and not isinstance(error, Terminated)
                step = known_step if isinstance(error, PeerLost) and rank == error.rank else None
                # A parameter server learns a failed server's step from its heartbeats, the last of which may be due.
                is_early = waited < _REPORT_SECONDS and not self._activity.is_timed and step is None
                if not (heartbeat.leaving or was_expendable or rank in ignored_ranks or is_early):
                    return self.describe_failure(rank, UNREPORTED_EXIT, step)
            if waited > _REPORT_SECONDS:
                # A peer that was asked to end looks for a cause itself, and reports the request if it finds none.
                if not broken or (waited > 1.5 * _REPORT_SECONDS and all(member.is_local for member in self._members)):
                    break
                for rank in self._silent_remote_ranks():
                    return self.describe_failure(rank, "its connections broke off and it sends no heartbeats")
            time.sleep(0.05)
        return lost_peer

    def knows_of_failure(self, store: Store | None) -> bool:
        """Whether a rank has reported a failure, or has ended without reporting one; returns at once.

        Args:
            store: The main thread's connection to the store; ``None`` if it can't be reached.
        """
        exited = (
            self._members[rank].has_exited and not seen.heartbeat.leaving for rank, seen in self._observed.items()
        )
        return (store is not None and store.get(FIRST_FAILURE_KEY) != NO_FAILURE.encode()) or any(exited)

    def _silent_remote_ranks(self) -> list[int]:
        """Ranks on other hosts with a few missing heartbeats, which alone would not count as a failure."""
        latest = time.monotonic() - (_HEARTBEATS_PER_SILENCE - 0.5) * self._interval
        return [
            rank
            for rank, observed in self._observed.items()
            if not self._members[rank].is_local and not observed.heartbeat.leaving and observed.heartbeat_time < latest
        ]

    def describe_failure(self, rank: int, error: str, known_step: int | None = None) -> Failure:
        """Builds the report of another rank's failure, as far as this rank knows; ``known_step``: it did so many."""
        heartbeat = self._observed[rank].heartbeat
        steps = [heartbeat.step, known_step or 0]
        # A server, whose steps have no time limit, is at least as far as each of its workers.
        if not self._activity.independent_steps or heartbeat.phase == "serving":
            # The failed rank's last heartbeat may be a second old. Ranks in lockstep wait for each other in one step.
            steps += [seen.heartbeat.step for seen in self._observed.values() if seen.heartbeat.progress is not None]
            steps += [self._activity.step] if self._activity.is_timed else []
        crash_dump = self._crash_dump(rank)
        if error == UNREPORTED_EXIT and crash_dump:
            error = f"the process crashed: {crash_dump.splitlines()[0]}"
        return Failure(rank, self._members[rank].host, max(steps), error)

    def describe_store_failure(self, problem: str) -> Failure:
        """Builds the report of a store that cannot be reached; the rank that served it counts as failed."""
        address, by_rank_0 = self._identity.store_address, self._identity.rank_0_serves_store
        if by_rank_0 and self._members[0].is_local:
            # The connections of a killed process close shortly before the process has ended.
            deadline = time.monotonic() + _EXIT_SECONDS
            while time.monotonic() < deadline:
                if self._members[0].has_exited:
                    return self.describe_failure(0, UNREPORTED_EXIT)
                time.sleep(0.02)
        server = "this rank" if by_rank_0 else "its launcher"
        return self.describe_failure(0, f"the store at {address}, served by {server}, can't be reached: {problem}")

    def add_details(self, failure: Failure, store: Store | None) -> None:
        """Adds what is known about all ranks to a failure.

        Args:
            failure: Its ``samples`` and ``others`` are set, and its ``traceback`` if it has none.
            store: Where the ranks' states are read; ``None`` if it cannot be reached.
        """
        rank = failure.rank
        states = RankStates({each: observed.heartbeat for each, observed in self._observed.items()}, {})
        if store is not None:
            states = RankStates.read(store, states.heartbeats, self._members, (rank, self._rank), self._interval)
        states.heartbeats[self._rank], states.details[self._rank] = self._own_state()
        failure.samples = states.samples(rank, self._rank, self._activity)
        failure.traceback = failure.traceback or self._crash_dump(rank) or states.stack(rank)
        failure.others = states.others(rank, self._members, self._activity.place_of)

    def _crash_dump(self, rank: int) -> str:
        # In a folder that was taken the file is another process's.
        if not self._members[rank].has_exited or self._reporter.is_taken():
            return ""
        return read_crash_dump(self._reporter.run_dir, rank)

    # --- heartbeats, in the watch's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._try_round():
                self._wake.wait(self._interval)
                self._wake.clear()
        except Exception:
            # The main thread may wait for the other ranks forever, and without heartbeats they would blame this rank.
            log.exception("the watch thread can't report a failure; this process ends")
            print_to_stderr(f"distrain: the watch thread of rank {self._rank} failed; its process ends")
            if not self._closing.wait(_MAIN_THREAD_SECONDS):
                self._exit_process()
        finally:
            self._done.set()
            with self._changed:
                self._changed.notify_all()

    def _try_round(self) -> bool:
        """Like :meth:`_run_round`, but ends the run after errors, unless another round may succeed."""
        try:
            continues = self._run_round()
        except Exception as error:
            if isinstance(error, RuntimeError) and self._request_began is not None:
                ends = self._may_end_without_store()
                # A store that rank 0 serves also ends when the run ends as it should.
                if not ends and not self._closing.wait(_MAIN_THREAD_SECONDS):
                    self._end_run(self.describe_store_failure(first_line(error)), None)
                return False
            if self._exit_began is not None:
                raise
            return self._may_try_again(error)
        self._failed_rounds = 0
        return continues

    def _may_end_without_store(self) -> bool:
        """If the launcher has ended, and its store with it: lets the main thread save and stop.

        Returns:
            Whether it did so; false if it made no progress for too long, or if rank 0 serves the store.
        """
        if self._identity.rank_0_serves_store:
            return False
        self._request_began, self._store_has_ended = None, True
        with self._changed:
            self._changed.notify_all()
        self._on_launcher_end()
        progress, began = self._activity.progress, time.monotonic()
        last_check = began
        while not self._closing.wait(self._interval):
            now = time.monotonic()
            was_suspended, last_check = now - last_check > self._longest_gap, now
            if progress != self._activity.progress or was_suspended:
                progress, began = self._activity.progress, now
            elif now - began > self._limits.step:
                return False
        return True

    def _may_try_again(self, error: Exception) -> bool:
        """Logs an unexpected error of a round; after too many in a row this ends the run and returns false."""
        self._request_began = None
        self._failed_rounds += 1
        message = f"{type(error).__name__}: {first_line(error)}"
        if message != self._latest_error:
            self._latest_error = message
            log.error("the watch thread failed, and tries again", exc_info=error)
        if self._failed_rounds < _MAX_FAILED_ROUNDS:
            return True
        if not self._closing.is_set():
            # Looking at the main thread's stack may be what fails, and the report needs a stack.
            self.keep_stack_of(error)
            failure = Failure(
                self._rank,
                self._identity.host,
                self._activity.step,
                f"its watch thread, which sends the heartbeats, failed {self._failed_rounds} times in a row: {message}",
                traceback="".join(traceback.format_exception(error)),
            )
            self._end_run(failure, self._store)
        return False

    def _run_round(self) -> bool:
        """Publishes a heartbeat and evaluates those of all ranks; returns whether the watch continues."""
        closing = self._closing.is_set()
        first_failure = self._exchange(leaving=closing)
        if first_failure is not None:
            # The rank that writes the report waits for this one's state.
            self._exchange(leaving=closing, failing=True)
            self._end_run(first_failure.failure, self._store)
            return False
        if closing:
            self._kill_local_leftovers(None)
            if self._rank == 0 and self._identity.rank_0_serves_store:
                self._wait_until_all_leave()
            return False
        failure = self._check()
        if failure is not None and not self._closing.is_set():
            self._end_run(failure, self._store)
            return False
        return True

    def _exchange(self, *, leaving: bool, failing: bool = False) -> FirstFailure | None:
        """Publishes a heartbeat and reads those of all ranks; returns the run's first failure, if there is one."""
        with self._changed:
            self._number += 1
            number = self._number
        heartbeat, details = self._own_state(leaving=leaving, failing=failing)
        self._request_began = time.monotonic()
        self._store.set(heartbeat_key(self._rank), heartbeat.to_json())
        self._store.set(details_key(self._rank), details.to_json())
        # Before the heartbeats are read: a process that ends in an orderly way has published "leaving" before.
        exited = [rank for rank, member in enumerate(self._members) if member.has_exited]
        first_failure = FirstFailure.from_json(self._store.get(FIRST_FAILURE_KEY))
        heartbeats = read_heartbeats(self._store, self._observed)
        now = time.monotonic()
        self._request_began = None
        for rank, observed in self._observed.items():
            observed.update(heartbeats[rank], now)
            observed.exited = rank in exited
        with self._changed:
            self._published = number
            self._changed.notify_all()
        return first_failure

    def _own_state(self, *, leaving: bool = False, failing: bool = False) -> tuple[Heartbeat, RankDetails]:
        activity, stack = self._activity, self._stack()
        heartbeat = Heartbeat(
            self._number,
            activity.progress if activity.is_timed else None,
            activity.step,
            activity.phase,
            stack.waiting,
            activity.expendable,
            leaving,
            failing,
            activity.shard,
        )
        return heartbeat, RankDetails(activity.epoch, activity.offset, activity.count, stack.lines)

    def _stack(self) -> ThreadStack:
        return self._stack_of_error or ThreadStack.of_thread(self._main_thread)

    def _check(self) -> Failure | None:
        """Evaluates the heartbeats; returns the failure if the same rank was found responsible twice in a row."""
        now = time.monotonic()
        was_suspended, self._last_check = now - self._last_check > self._longest_gap, now
        if was_suspended:
            for observed in self._observed.values():
                observed.reset_clocks(now)
        reason = why_stuck(self._observed[self._rank], self._limits, now)
        if reason is not None and self._activity.expendable and not self._closing.is_set():
            self._exit_alone(reason)
        verdict = judge(self._rank, self._observed, self._limits, now)
        suspect, self._suspect = self._suspect, None if verdict is None else verdict.rank
        # Twice, since a rank may have begun or ceased to wait just before its heartbeat.
        if verdict is None or suspect != verdict.rank:
            return None
        return self.describe_failure(verdict.rank, verdict.reason)

    def _wait_until_all_leave(self) -> None:
        """Waits briefly for the other ranks, which would report a failure if the store ended before they leave."""
        deadline = time.monotonic() + _BLAMED_RANK_SECONDS
        # The store is this process's own; an error here would only mean that nothing more can be learned from it.
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if all(heartbeat.leaving for heartbeat in read_heartbeats(self._store, self._observed).values()):
                    return
                time.sleep(0.01)

    def _guard(self) -> None:
        """Monitors the watch's own thread, which may block in a request to a store that no longer answers."""
        last_check = time.monotonic()
        reported = ""
        while not self._done.wait(self._interval):
            now = time.monotonic()
            was_suspended, last_check = now - last_check > self._longest_gap, now
            try:
                self._check_watch(now, was_suspended=was_suspended)
            except Exception as error:
                # It must go on: only this thread can end a process whose watch is blocked.
                if reported != (message := f"{type(error).__name__}: {first_line(error)}"):
                    reported = message
                    log.error("the thread that monitors the watch failed, and tries again", exc_info=error)

    def _check_watch(self, now: float, *, was_suspended: bool) -> None:
        if was_suspended and self._request_began is not None:
            self._request_began = now
        request_began = self._request_began
        if self._exit_began is not None:
            if now - self._exit_began > _FORCED_EXIT_SECONDS and not self._closing.is_set():
                os._exit(1)
        elif request_began is not None and now - request_began > self._limits.silence:
            failure = self.describe_store_failure(f"no answer for {self._limits.silence:g} s")
            threading.Thread(target=self._end_run, args=(failure, None), daemon=True).start()

    # --- ending the process ------------------------------------------------------------------------------------------

    def _end_run(self, failure: Failure, store: Store | None) -> None:
        """Reports the failure, and ends this process unless the main thread does so itself in time."""
        self._exit_began = time.monotonic()
        self._reporter.report(failure, self._local_stack(), store, self.add_details)
        reported = self._reporter.reported
        self._kill_local_leftovers(reported)
        # The main thread of a rank that others hold responsible will not end by itself, and they wait for its end.
        is_blamed = reported is not None and reported.failure.rank == self._rank != reported.detected_by
        if not self._closing.wait(0 if is_blamed else _MAIN_THREAD_SECONDS):
            self._exit_process()

    def _exit_alone(self, reason: str) -> NoReturn:
        """Ends this expendable rank; the other ranks continue."""
        self._exit_began = time.monotonic()
        failure = self.describe_failure(self._rank, reason)
        log.error("%s\n%s", failure.error, Lines.of(self._local_stack().split("\n")))
        print_to_stderr(f"distrain: {failure.summary()}; the other ranks continue")
        self._exchange(leaving=True)
        self._exit_process()

    def _exit_process(self) -> NoReturn:
        try:
            self._before_exit()
            TERMINAL.flush()
            sys.stdout.flush()
        except Exception:
            log.exception("an error while this process ends")
        finally:
            os._exit(1)

    def _local_stack(self) -> str:
        return "\n".join(["its main thread is in:", *self._stack().lines])

    def _kill_local_leftovers(self, first_failure: FirstFailure | None) -> None:
        """Kills processes of this host that will not end by themselves; launchers wait half a minute for such ones.

        Args:
            first_failure: After a failure the responsible rank is killed, unless it reported the failure itself, and so
                is every rank that a signal has stopped. ``None`` at the end of a run that succeeded: only stopped
                expendable ranks are killed.
        """
        processes = {
            rank: member.process for rank, member in enumerate(self._members) if member.is_local and rank != self._rank
        }
        if first_failure is None:
            processes = {
                rank: process for rank, process in processes.items() if self._observed[rank].heartbeat.expendable
            }
        elif first_failure.failure.rank in processes and first_failure.detected_by != first_failure.failure.rank:
            processes[first_failure.failure.rank].kill_after(_BLAMED_RANK_SECONDS)
            # A killed process leaves its empty crash dump behind; reading removes it.
            self._crash_dump(first_failure.failure.rank)
        for process in processes.values():
            if process.is_stopped:
                process.kill()
