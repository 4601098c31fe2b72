"""One disturbed run: the same command again and again, hurt as planned, until it has ended well."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from distrain.tools.chaos import faults
from distrain.tools.chaos.damage import Checkpoints
from distrain.tools.chaos.disk import Disk
from distrain.tools.chaos.job import Job, Launcher
from distrain.tools.chaos.plan import KINDS, Fault, Follows
from distrain.tools.testnet.network import VirtualNetwork

_POLL_SECONDS = 0.01
#: What a run may take to be gone, besides its own time limit.
_ALLOWANCE_SECONDS = 15.0
_GRACE_SECONDS = 5.0
#: Ranks need not agree to stop if they are done sooner.
_NEARLY_OVER_SECONDS = 2.0
#: A run that fails by itself more often is given up.
_MOST_FAILURES = 2


@dataclass(frozen=True)
class Training:
    """What is hurt.

    Attributes:
        name: How the report calls it.
        keys: Its command line's keys, without ``run_dir``.
        world_size: Ranks.
        limit_seconds: Within which it promises to find a fault while it trains.
        setup_seconds: The same while it starts.
    """

    name: str
    keys: tuple[str, ...]
    world_size: int
    limit_seconds: float
    setup_seconds: float


@dataclass
class Recovery:
    """A fault and what came of it.

    Attributes:
        training: Which training.
        run: Number of its disturbed run.
        fault: What struck.
        done: What was done, in words.
        notice_seconds: From the fault to the end of all processes; ``None`` where we ended them, or nothing ended.
        resumed: The checkpoint that it went on from.
        go_on_seconds: From the next start (or from the fault, where nothing ended) to the next logged step.
        problems: What is wrong with it; a recovery has none.
        identical: The run ended with the undisturbed run's parameters.
    """

    training: str
    run: int
    fault: Fault
    done: str
    notice_seconds: float | None = None
    resumed: str | None = None
    go_on_seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    identical: bool = False

    @property
    def recovered(self) -> bool:
        """Whether all went as it should, apart from the parameters in the end."""
        return self.go_on_seconds is not None and not self.problems

    def line(self) -> str:
        """What a user reads as soon as it is known."""
        told = [f"{self.training}, run {self.run}: {self.fault}: {self.done}"]
        if self.notice_seconds is not None:
            told.append(f"over after {self.notice_seconds:.1f} s")
        if self.go_on_seconds is not None:
            told.append(f"went on from {self.resumed or 'where it was'} after {self.go_on_seconds:.1f} s")
        return "; ".join([*told, *(f"WRONG: {problem}" for problem in self.problems)])


@dataclass
class _Waiting:
    """A fault after which no step was logged yet; ``after`` is the last step before it, of the same start."""

    recovery: Recovery
    since: float
    after: int | None = None


class Disturbed:
    """A run that is hurt.

    Args:
        training: What runs.
        number: The run's number in the report.
        launcher: Starts it.
        folder: Its folder.
        output: The file that takes what it prints.
        patience_seconds: A run that logs nothing for so long is given up.
        disk: What its folder lies on, if that can be filled.
        network: What joins its hosts, if each rank has one.
        say: Takes a line for the user.
    """

    def __init__(
        self,
        training: Training,
        number: int,
        launcher: Launcher,
        folder: Path,
        output: Path,
        *,
        patience_seconds: float,
        disk: Disk | None,
        network: VirtualNetwork | None,
        say: Callable[[str], None],
    ) -> None:
        self.recoveries: list[Recovery] = []
        self._training = training
        self._number = number
        self._launcher = launcher
        self._folder = folder
        self._output = output
        self._patience = patience_seconds
        self._disk = disk
        self._network = network
        self._say = say
        self._checkpoints = Checkpoints(checkpoint_format.checkpoints_folder(folder))
        self._waiting: list[_Waiting] = []

    def to_the_end(self, faults_to_come: deque[Fault]) -> list[str]:
        """Starts the run until it ends well; returns why it did not, if so."""
        failures = 0
        while True:
            outcome = self._start(faults_to_come)
            if outcome is None:
                continue
            if outcome and failures < _MOST_FAILURES:
                failures += 1
                self._blame(outcome)
                continue
            for waiting in self._waiting:
                self._say(waiting.recovery.line())
            self._waiting.clear()
            return [outcome] if outcome else []

    def _start(self, faults_to_come: deque[Fault]) -> str | None:
        """One start of the command; ``None`` if a fault ended it, empty if it ended well, or why it didn't."""
        self._checkpoints.name_complete()
        expected, damaged = self._checkpoints.newest(), self._checkpoints.damaged()
        with Job(self._launcher, self._training.keys, self._folder, self._output) as job:
            scene = faults.Scene(job, self._checkpoints, self._disk, self._network)
            begun = time.monotonic()
            for waiting in self._waiting:
                waiting.since, waiting.after = begun, None
            resumed = [waiting.recovery for waiting in self._waiting]
            step, changed, due = None, begun, None
            while True:
                ended, now = job.has_ended(), time.monotonic()
                if (newest := job.step()) != step:
                    if step is None:
                        self._check_resume(resumed, job, expected, damaged)
                    step, changed = newest, now
                    self._confirm(step)
                if ended:
                    break
                if now - changed > self._patience:
                    return f"nothing was logged for {self._patience:g} s"
                if faults_to_come and self._may_strike(faults_to_come[0], step):
                    if due is None:
                        due = (begun if faults_to_come[0].step is None else now) + faults_to_come[0].seconds
                    if now >= due:
                        due = None
                        if self._strike(faults_to_come.popleft(), scene, trained=step is not None):
                            return None
                        changed = time.monotonic()
                time.sleep(_POLL_SECONDS)
            if left := job.left(_GRACE_SECONDS):
                self._blame(f"{len(left)} processes were left behind")
            if any(job.codes()):
                return f"failed without a fault: {job.last_words()}"
            if step is None:
                self._check_resume(resumed, job, expected, damaged)
            self._confirm(None)
            return ""

    def _may_strike(self, fault: Fault, step: int | None) -> bool:
        # One that the run must survive by itself is waited for; but a start may be hurt before it has gone on.
        if any(waiting.after is not None for waiting in self._waiting):
            return False
        if KINDS[fault.kind].needs_checkpoint and self._checkpoints.newest() is None:
            return False
        return fault.step is None or (step is not None and step >= fault.step)

    def _strike(self, fault: Fault, scene: faults.Scene, *, trained: bool) -> bool:
        """Strikes, and waits for the end if there must be one; whether the job has ended."""
        begun = time.monotonic()
        try:
            recovery = Recovery(self._training.name, self._number, fault, faults.strike(scene, fault))
        except faults.Missed as missed:
            self._say(f"{self._training.name}, run {self._number}: {fault}: missed, since {missed}")
            return False
        self.recoveries.append(recovery)
        self._waiting.append(_Waiting(recovery, time.monotonic(), scene.job.step() or 0))
        follows = KINDS[fault.kind].follows
        if follows is Follows.GOES_ON:
            return False
        try:
            if follows is not Follows.KILLED:
                self._await_end(recovery, scene.job, begun, trained=trained)
                if not any(scene.job.codes()) and time.monotonic() - begun < _NEARLY_OVER_SECONDS:
                    self.recoveries.pop()
                    self._waiting.pop()
                    self._say(
                        f"{self._training.name}, run {self._number}: {fault}: missed, since the run was nearly over"
                    )
                    return False
            recovery.problems += faults.wrong_reports(scene, fault, trained=trained)
        finally:
            for mend in scene.mends:
                mend()
        return True

    def _await_end(self, recovery: Recovery, job: Job, begun: float, *, trained: bool) -> None:
        limit = self._training.limit_seconds if trained else self._training.setup_seconds
        deadline = begun + limit + _ALLOWANCE_SECONDS
        while not job.has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        over = job.has_ended()
        left = job.left(max(deadline - time.monotonic(), 0))
        if not left:
            recovery.notice_seconds = time.monotonic() - begun
            return
        what = f"{len(left)} processes were left behind" if over else "the run was not over"
        recovery.problems.append(f"{what} {limit + _ALLOWANCE_SECONDS:g} s after the fault")
        job.kill()

    def _check_resume(self, resumed: list[Recovery], job: Job, expected: Path | None, damaged: list[Path]) -> None:
        log = job.log()
        for recovery in resumed:
            recovery.resumed = faults.loaded_from(log) or "the beginning"
            recovery.problems += faults.wrong_resume(log, expected, damaged)

    def _confirm(self, step: int | None) -> None:
        """A step was logged, or the run has ended well (``None``): who waited for that has gone on."""
        now = time.monotonic()
        for waiting in list(self._waiting):
            if step is None or waiting.after is None or step > waiting.after:
                waiting.recovery.go_on_seconds = now - waiting.since
                self._waiting.remove(waiting)
                self._say(waiting.recovery.line())

    def _blame(self, problem: str) -> None:
        """What went wrong by itself is the last fault's consequence."""
        for recovery in [waiting.recovery for waiting in self._waiting] or self.recoveries[-1:]:
            recovery.problems.append(problem)
        if not self.recoveries:
            self._say(f"{self._training.name}, run {self._number}: {problem}")
