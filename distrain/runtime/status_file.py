"""Writes ``status.json`` of a run's folder from a thread of rank 0, so that no step waits for it."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from distrain.errors import first_line
from distrain.files.contained_folder import ContainedFolder
from distrain.files.terminal import FILE_ONLY
from distrain.health.activity import RankActivity
from distrain.health.judge import Heartbeat, ObservedRank
from distrain.health.members import Member
from distrain.health.process import PlacedProcess
from distrain.health.run_status import STATUS_FILE, RankStatus, RunStatus
from distrain.runtime.run_owner import RunOwner

log = logging.getLogger(__name__)

#: Seconds between two writings. With thousands of ranks they are longer: writing takes at most this share of a core.
_SHORTEST_INTERVAL, _LONGEST_INTERVAL, _LARGEST_SHARE = 1.0, 10.0, 0.002
#: Rounds over which a rank's speed is measured.
_SPEED_ROUNDS = 10
#: How long the end of a run waits for the last writing.
_CLOSE_SECONDS = 5.0


class StatusFile:
    """Tells in the run's folder where each rank is, until it is closed. An error in that never ends the run.

    Args:
        owner: Says whether the folder is still this start's; if not, nothing is written.
        host: Name of this host.
        activity: What this rank is doing.
        observe: Returns what this rank knows of every rank; ``None`` if it is the only one.
        limits: Seconds without progress after which a run ends by itself: in training, and before and after it.
    """

    def __init__(
        self,
        owner: RunOwner,
        host: str,
        activity: RankActivity,
        observe: Callable[[], Sequence[tuple[Member, ObservedRank]]] | None,
        limits: tuple[float, float],
    ) -> None:
        self._owner, self._folder = owner, ContainedFolder(owner.run_dir)
        self._host, self._activity, self._limits = host, activity, limits
        self._writer = PlacedProcess.current()
        now = time.monotonic()
        #: What is known of the only rank, which publishes no heartbeats.
        self._only = (Member(host, self._writer.process, is_local=True), ObservedRank(Heartbeat(), now, now))
        self._observe = self._observe_only if observe is None else observe
        self._speeds: dict[int, deque[tuple[float, int]]] = {}
        self._number = 0
        self._started = time.time()
        #: When the training began and the fields that tell of it; one value, so that the thread never sees half of it.
        self._training: tuple[float, Mapping[str, int]] | None = None
        self._values: Mapping[str, float] = {}
        self._epoch_values: Mapping[str, float] = {}
        self._latest_error = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distrain-status", daemon=True)
        self._thread.start()

    def begin_training(self, first_step: int, total_steps: int, epochs: int, *, compiles: bool) -> None:
        """Training begins, or goes on; for the meaning of the arguments see :class:`RunStatus`."""
        fields = {"first_step": first_step, "total_steps": total_steps, "epochs": epochs, "compiles": compiles}
        self._training = (time.monotonic(), fields)

    def note_step(self, values: Mapping[str, float]) -> None:
        """These values of steps were logged; the mapping must not be changed afterwards."""
        self._values = values

    def note_epoch(self, values: Mapping[str, float]) -> None:
        """These values were logged at the end of an epoch, likewise."""
        self._epoch_values = values

    def close(self) -> None:
        """Writes the file for the last time."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            # Asked first: what is written after that is the last.
            closes = self._closing.is_set()
            # Of this thread alone, since waiting for a disk or for the interpreter's lock costs the training nothing.
            used = time.thread_time()
            try:
                self._write(time.monotonic(), running=not closes)
            except Exception as error:
                # Nobody may look at the file at all, so the terminal is spared.
                message = f"{type(error).__name__}: {first_line(error)}"
                if message != self._latest_error:
                    log.warning("%s can't be written: %s", STATUS_FILE, message, extra=FILE_ONLY)
                self._latest_error = message
            if closes:
                return
            seconds = (time.thread_time() - used) / _LARGEST_SHARE
            self._closing.wait(min(max(seconds, _SHORTEST_INTERVAL), _LONGEST_INTERVAL))

    def _write(self, now: float, *, running: bool) -> None:
        if not self._owner.may_write:
            return
        content = self.status(now, running=running).to_json()
        self._folder.replace_text(STATUS_FILE, json.dumps(content, allow_nan=False) + "\n")

    def status(self, now: float, *, running: bool) -> RunStatus:
        """The content of the next file.

        Args:
            now: The time, by ``time.monotonic``.
            running: Whether it is not the last.
        """
        activity = self._activity
        self._number += 1
        ranks = [self._rank(rank, *observed, now) for rank, observed in enumerate(self._observe())]
        step_limit, setup_limit = self._limits
        # The training may begin after `now` was taken.
        began, fields = self._training or (now, {})
        training = dict(fields)
        return RunStatus(
            self._number,
            time.time(),
            self._started,
            running,
            self._host,
            self._writer,
            ranks,
            step_limit,
            setup_limit,
            epoch=max(activity.epoch, int(self._epoch_values.get("epoch", 0))),
            step=max(activity.step, *(each.step for each in ranks)),
            training_seconds=max(now - began, 0.0),
            compiles=bool(training.pop("compiles", False)),
            values=_without_nonfinite(self._values),
            epoch_values=_without_nonfinite(self._epoch_values),
            **training,
        )

    def _observe_only(self) -> Sequence[tuple[Member, ObservedRank]]:
        activity = self._activity
        self._only[1].update(
            Heartbeat(self._number, activity.progress, activity.step, activity.phase), time.monotonic()
        )
        return [self._only]

    def _rank(self, rank: int, member: Member, observed: ObservedRank, now: float) -> RankStatus:
        heartbeat = observed.heartbeat
        rounds = self._speeds.setdefault(rank, deque(maxlen=_SPEED_ROUNDS + 1))
        rounds.append((now, heartbeat.step))
        (then, before), seconds = rounds[0], now - rounds[0][0]
        return RankStatus(
            rank,
            member.host,
            heartbeat.phase,
            heartbeat.step,
            max(heartbeat.step - before, 0) / seconds if now > then else 0.0,
            max(now - observed.progress_time, 0.0),
            max(now - observed.heartbeat_time, 0.0),
            heartbeat.leaving or observed.exited,
            self._activity.place_of(rank),
        )


def _without_nonfinite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values as JSON can hold them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
