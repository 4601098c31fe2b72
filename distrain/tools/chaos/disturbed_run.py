"""One disturbed run: starts the same command again and again and injects the planned faults, until the run is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from distrain.tools.chaos import injection
from distrain.tools.chaos.attempt import Attempt
from distrain.tools.chaos.damage import CheckpointTracker
from distrain.tools.chaos.disk import Disk
from distrain.tools.chaos.launchers import Launcher
from distrain.tools.chaos.plan import FAULT_KINDS, Fault, Outcome
from distrain.tools.testnet.network import VirtualNetwork

_POLL_SECONDS = 0.01
#: Added to the training's own time limit before a job that has not ended counts as a problem.
_ALLOWANCE_SECONDS = 15.0
#: Time for processes to end after their launcher has.
_GRACE_SECONDS = 5.0
#: A job that ends well this soon after a fault was done anyway: ranks need not agree to stop any more.
_NEARLY_DONE_SECONDS = 2.0
#: A run that fails more often without a fault is given up.
_MAX_FAILURES = 2


@dataclass(frozen=True)
class TrainingSpec:
    """A training under test.

    Attributes:
        name: Its name in the report.
        keys: Its configuration keys, without ``run_dir``.
        world_size: Number of ranks.
        detection_seconds: Its time limit for detecting a failure while it trains.
        setup_seconds: The same during startup.
    """

    name: str
    keys: tuple[str, ...]
    world_size: int
    detection_seconds: float
    setup_seconds: float


@dataclass
class Recovery:
    """An injected fault and what followed it. The attributes are also the keys in the result file.

    Attributes:
        training: Name of the training.
        run: Number of the disturbed run.
        fault: The fault.
        done: What was done, in words.
        notice_seconds: From the fault to the end of all processes; ``None`` if nothing ended, or the
            processes had to be killed.
        resumed: The checkpoint from which the run resumed.
        go_on_seconds: From the restart (or from the fault, if nothing ended) to the next logged step.
        problems: What went wrong; a recovery has no problems.
        identical: The run ended with the parameters of the undisturbed run.
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
        """Whether the run continued without problems. The final parameters are compared separately."""
        return self.go_on_seconds is not None and not self.problems

    def line(self) -> str:
        """One line for the user."""
        parts = [f"{self.training}, run {self.run}: {self.fault}: {self.done}"]
        if self.notice_seconds is not None:
            parts.append(f"ended after {self.notice_seconds:.1f} s")
        if self.go_on_seconds is not None:
            origin = f"resumed from {self.resumed}" if self.resumed else "continued"
            parts.append(f"{origin} after {self.go_on_seconds:.1f} s")
        return "; ".join([*parts, *(f"WRONG: {problem}" for problem in self.problems)])


@dataclass
class _PendingRecovery:
    """A fault after which no step has been logged yet.

    Attributes:
        recovery: The fault.
        since: When the fault was injected, or when the run was restarted.
        after: The last step logged before the fault; ``None`` once the run has been restarted.
    """

    recovery: Recovery
    since: float
    after: int | None = None


class DisturbedRun:
    """A run into which faults are injected.

    Args:
        training: The training to run.
        number: The run's number in the report.
        launcher: Starts the training.
        folder: The run's folder.
        output: File that takes what the training prints.
        patience_seconds: A run that logs nothing for this long is given up.
        disk: The storage of the folder, if it can be filled.
        network: The network of the ranks' hosts, if each rank has its own host.
        print_line: Prints a line for the user.
    """

    def __init__(
        self,
        training: TrainingSpec,
        number: int,
        launcher: Launcher,
        folder: Path,
        output: Path,
        *,
        patience_seconds: float,
        disk: Disk | None,
        network: VirtualNetwork | None,
        print_line: Callable[[str], None],
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
        self._print_line = print_line
        self._checkpoints = CheckpointTracker(checkpoint_format.checkpoints_folder(folder))
        self._pending: list[_PendingRecovery] = []

    def run_to_completion(self, faults: deque[Fault]) -> list[str]:
        """Starts the training until it is done; returns the problem that prevented that, if any."""
        failures = 0
        while True:
            problem = self._run_attempt(faults)
            if problem is None:
                continue
            if problem and failures < _MAX_FAILURES:
                failures += 1
                self._record_problem(problem)
                continue
            for pending in self._pending:
                self._print_line(pending.recovery.line())
            self._pending.clear()
            return [problem] if problem else []

    def _run_attempt(self, faults: deque[Fault]) -> str | None:
        """Starts the command once; returns ``None`` if a fault ended it, "" if it is done, else the problem."""
        self._checkpoints.publish_complete()
        expected, damaged = self._checkpoints.newest_intact(), self._checkpoints.damaged()
        with Attempt(self._launcher, self._training.keys, self._folder, self._output) as attempt:
            target = injection.Target(attempt, self._checkpoints, self._patience, self._disk, self._network)
            begin = time.monotonic()
            for pending in self._pending:
                pending.since, pending.after = begin, None
            resuming = [pending.recovery for pending in self._pending]
            step, last_progress, due = None, begin, None
            while True:
                ended, now = attempt.has_ended(), time.monotonic()
                if (newest := attempt.newest_step()) != step:
                    if step is None:
                        self._check_resume(resuming, attempt, expected, damaged)
                    step, last_progress = newest, now
                    self._confirm_progress(step)
                if ended:
                    break
                if now - last_progress > self._patience:
                    return f"nothing was logged for {self._patience:g} s"
                if faults and self._may_inject(faults[0], step):
                    if due is None:
                        due = (begin if faults[0].step is None else now) + faults[0].seconds
                    if now >= due:
                        due = None
                        if self._inject(faults.popleft(), target, trained=step is not None):
                            return None
                        last_progress = time.monotonic()
                time.sleep(_POLL_SECONDS)
            if remaining := attempt.remaining_pids(_GRACE_SECONDS):
                self._record_problem(f"{len(remaining)} processes were left behind")
            if any(attempt.exit_codes()):
                return f"failed without a fault: {attempt.last_message()}"
            if step is None:
                self._check_resume(resuming, attempt, expected, damaged)
            self._confirm_progress(None)
            return ""

    def _may_inject(self, fault: Fault, step: int | None) -> bool:
        # A fault that the job must survive is awaited first. A restart may be hit again before its first step.
        if any(pending.after is not None for pending in self._pending):
            return False
        if FAULT_KINDS[fault.kind].needs_checkpoint and self._checkpoints.newest_intact() is None:
            return False
        return fault.step is None or (step is not None and step >= fault.step)

    def _inject(self, fault: Fault, target: injection.Target, *, trained: bool) -> bool:
        """Injects a fault and waits for the job's end if it must end; returns whether the job has ended."""
        begin = time.monotonic()
        try:
            recovery = Recovery(self._training.name, self._number, fault, injection.inject(target, fault))
        except injection.FaultMissed as missed:
            self._print_line(f"{self._training.name}, run {self._number}: {fault}: missed, because {missed}")
            return False
        self.recoveries.append(recovery)
        self._pending.append(_PendingRecovery(recovery, time.monotonic(), target.attempt.newest_step() or 0))
        expected = FAULT_KINDS[fault.kind].expected
        if expected is Outcome.CONTINUES:
            return False
        try:
            if expected is not Outcome.KILLED:
                self._await_end(recovery, target.attempt, begin, trained=trained)
                if not any(target.attempt.exit_codes()) and time.monotonic() - begin < _NEARLY_DONE_SECONDS:
                    self.recoveries.pop()
                    self._pending.pop()
                    self._print_line(
                        f"{self._training.name}, run {self._number}: {fault}: missed, because the run was nearly done"
                    )
                    return False
            recovery.problems += injection.check_reports(target, fault, trained=trained)
        finally:
            for cleanup in target.cleanups:
                cleanup()
        return True

    def _await_end(self, recovery: Recovery, attempt: Attempt, begin: float, *, trained: bool) -> None:
        limit = self._training.detection_seconds if trained else self._training.setup_seconds
        deadline = begin + limit + _ALLOWANCE_SECONDS
        while not attempt.has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        ended = attempt.has_ended()
        remaining = attempt.remaining_pids(max(deadline - time.monotonic(), 0))
        if not remaining:
            recovery.notice_seconds = time.monotonic() - begin
            return
        problem = f"{len(remaining)} processes were left behind" if ended else "the run had not ended"
        recovery.problems.append(f"{problem} {limit + _ALLOWANCE_SECONDS:g} s after the fault")
        attempt.kill()

    def _check_resume(
        self, resuming: list[Recovery], attempt: Attempt, expected: Path | None, damaged: list[Path]
    ) -> None:
        log = attempt.rank0_log()
        for recovery in resuming:
            recovery.resumed = injection.resumed_checkpoint(log) or "the beginning"
            recovery.problems += injection.check_resume(log, expected, damaged)

    def _confirm_progress(self, step: int | None) -> None:
        """Completes pending recoveries after a step was logged, or after the run is done (``None``)."""
        now = time.monotonic()
        for pending in list(self._pending):
            if step is None or pending.after is None or step > pending.after:
                pending.recovery.go_on_seconds = now - pending.since
                self._pending.remove(pending)
                self._print_line(pending.recovery.line())

    def _record_problem(self, problem: str) -> None:
        """Attributes a problem to the pending faults, or else to the last fault."""
        for recovery in [pending.recovery for pending in self._pending] or self.recoveries[-1:]:
            recovery.problems.append(problem)
        if not self.recoveries:
            self._print_line(f"{self._training.name}, run {self._number}: {problem}")
