"""Injects faults into a running job, and checks the report files it leaves and how the next start resumes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from distrain.errors import EXIT_STOPPED
from distrain.tools.chaos import processes
from distrain.tools.chaos.attempt import Attempt
from distrain.tools.chaos.damage import CheckpointTracker
from distrain.tools.chaos.disk import FULL_MESSAGES, Disk
from distrain.tools.chaos.plan import FAULT_KINDS, Fault, Outcome
from distrain.tools.testnet.network import VirtualNetwork

#: Longest wait for a rank's process to appear, and for the job to report a failed save while its disk is kept full.
_WAIT_SECONDS = 30
#: A disk stays full after the first reported failure, and links stay slow, for a random time below this.
_MAX_DURATION_SECONDS = 1.0
#: Added to every packet that a host sends.
_LINK_DELAY_SECONDS = 0.05


class FaultMissed(Exception):
    """The fault could not be injected: the job or the rank has ended, or the job lacks what the fault needs.

    The message completes a sentence that begins with "missed, because".
    """


@dataclass
class Target:
    """A running job into which faults are injected.

    Attributes:
        attempt: The job: one start of the training's command.
        checkpoints: The checkpoints of the run.
        patience_seconds: Longest wait for the job to begin a save.
        disk: The storage of the run's folder, if it can be filled.
        network: The network of the ranks' hosts, if each rank has its own host.
        cleanups: Undo faults that last until the job has ended. The caller of :func:`inject` calls them after that.
    """

    attempt: Attempt
    checkpoints: CheckpointTracker
    patience_seconds: float
    disk: Disk | None = None
    network: VirtualNetwork | None = None
    cleanups: list[Callable[[], None]] = field(default_factory=list)


def inject(target: Target, fault: Fault) -> str:
    """Injects a fault; returns when it has been injected, and for a temporary fault when it is over.

    Returns:
        What was done, in a few words.

    Raises:
        FaultMissed: The job or the rank has ended, or the job lacks what the fault needs.
        FileNotFoundError: A checkpoint was to be damaged, but none is intact. All processes have been killed by then.
    """
    return _INJECTORS[fault.kind](target, fault)


def _signal_rank(number: signal.Signals) -> Callable[[Target, Fault], str]:
    """Makes an injector that sends this signal to the fault's rank."""

    def send(target: Target, fault: Fault) -> str:
        deadline = time.monotonic() + _WAIT_SECONDS
        # During startup the rank may not exist yet.
        while (pid := target.attempt.rank_pids().get(fault.rank)) is None:
            if target.attempt.has_ended():
                raise FaultMissed("the run had ended")
            if time.monotonic() > deadline:
                raise FaultMissed(f"rank {fault.rank} had no process on this host for {_WAIT_SECONDS} s")
            time.sleep(0.02)
        if not processes.send_signal(pid, number):
            raise FaultMissed(f"rank {fault.rank} had ended")
        return f"{number.name} to rank {fault.rank}"

    return send


def _terminate(target: Target, _: Fault) -> str:
    sent = [processes.send_signal(pid, signal.SIGTERM) for pid in target.attempt.launcher_pids()]
    if not any(sent):
        raise FaultMissed("the launcher had ended")
    return "SIGTERM to the launcher"


def _kill_all(target: Target, _: Fault) -> str:
    if target.attempt.has_ended():
        raise FaultMissed("the run had ended")
    target.attempt.kill()
    return "SIGKILL to all"


def _kill_saving(target: Target, _: Fault) -> str:
    deadline = time.monotonic() + target.patience_seconds
    while not target.attempt.has_ended():
        if time.monotonic() > deadline:
            raise FaultMissed(f"the run began no save within {target.patience_seconds:g} s")
        if target.checkpoints.save_in_progress():
            # The save may complete at any moment. So stop the ranks, check again, and only then kill.
            pids = target.attempt.rank_pids().values()
            for pid in pids:
                processes.send_signal(pid, signal.SIGSTOP)
            if target.checkpoints.save_in_progress():
                target.attempt.kill()
                return "SIGKILL to all during a save"
            for pid in pids:
                processes.send_signal(pid, signal.SIGCONT)
        # A small checkpoint may be written within milliseconds.
        time.sleep(0.0005)
    raise FaultMissed("the run ended before a save could be interrupted")


def _damage(target: Target, fault: Fault) -> str:
    _kill_all(target, fault)
    return target.checkpoints.damage(fault)


def _fill_disk(target: Target, fault: Fault) -> str:
    disk, attempt = target.disk, target.attempt
    if disk is None:
        raise FaultMissed("the disk of the run's folder can't be filled")
    begin = time.monotonic()
    until = begin + _WAIT_SECONDS
    reported = False
    try:
        while time.monotonic() < until and not attempt.has_ended():
            # Repeated, since the job may delete files or start processes meanwhile.
            disk.fill(attempt.all_pids())
            if not reported and any(message in attempt.output() for message in FULL_MESSAGES):
                reported, until = True, time.monotonic() + fault.draws[0] * _MAX_DURATION_SECONDS
            time.sleep(0.05)
    finally:
        disk.clear()
    if not reported and attempt.has_ended() and not any(attempt.exit_codes()):
        raise FaultMissed("the run ended without reporting a failed save")
    description = f"{disk.description}, for {time.monotonic() - begin:.1f} s"
    return description if reported else f"{description}; the run reported no failed save"


def _cut_link(target: Target, fault: Fault) -> str:
    network = _running_network(target)
    # Host and rank have the same number, since each rank has its own host.
    network.cut_link(fault.rank)
    target.cleanups.append(network.restore_links)
    return f"link of rank {fault.rank}'s host cut"


def _delay_link(target: Target, fault: Fault) -> str:
    network = _running_network(target)
    seconds = fault.draws[0] * _MAX_DURATION_SECONDS
    network.add_delay(_LINK_DELAY_SECONDS)
    try:
        time.sleep(seconds)
    finally:
        network.restore_links()
    return f"links slow for {seconds:.1f} s"


def _running_network(target: Target) -> VirtualNetwork:
    """The network of a job that is still running."""
    if target.network is None:
        raise FaultMissed("the ranks are not on hosts of a test network")
    if target.attempt.has_ended():
        raise FaultMissed("the run had ended")
    return target.network


_INJECTORS: dict[str, Callable[[Target, Fault], str]] = {
    "kill_rank": _signal_rank(signal.SIGKILL),
    "kill_all": _kill_all,
    "kill_saving": _kill_saving,
    "stop_rank": _signal_rank(signal.SIGSTOP),
    "interrupt_rank": _signal_rank(signal.SIGINT),
    "terminate": _terminate,
    "warn_rank": _signal_rank(signal.SIGUSR1),
    "truncate": _damage,
    "flip_bit": _damage,
    "delete_file": _damage,
    "fill_disk": _fill_disk,
    "cut_link": _cut_link,
    "delay_link": _delay_link,
}


def check_reports(target: Target, fault: Fault, *, trained: bool) -> list[str]:
    """Checks the exit codes and report files of a job that a fault has ended.

    The fault's :class:`~distrain.tools.chaos.plan.Outcome` says what is required; of ``KILLED``, nothing is.

    Args:
        target: The job. All its processes have ended.
        fault: The fault that was injected, of a kind that ends the job.
        trained: The job had logged a step. Before that, ``failure.json`` may be missing.

    Returns:
        The problems found.
    """
    expected, exit_codes = FAULT_KINDS[fault.kind].expected, target.attempt.exit_codes()
    if expected is Outcome.KILLED:
        return []
    problems = []
    if not all(exit_codes):
        problems.append(f"exit code 0, although the run should have failed or stopped: {exit_codes}")
    if expected is Outcome.STOPS:
        return problems + _check_stop(target, exit_codes)
    report = target.attempt.read_report("failure.json")
    if report is None:
        return [*problems, "there is no failure.json"] if trained else problems
    if expected is Outcome.FAILS_NAMING_RANK and report.get("rank") != fault.rank:
        problems.append(f"failure.json names rank {report.get('rank')} ({report.get('error')}), not rank {fault.rank}")
    return problems


def _check_stop(target: Target, exit_codes: list[int]) -> list[str]:
    report = target.attempt.read_report("stopped.json")
    if report is None:
        return [f"there is no stopped.json: {target.attempt.last_message()}"]
    problems = []
    # torchrun itself exits with 1, whichever nonzero code its workers exit with.
    if any(code not in (EXIT_STOPPED, 1) for code in exit_codes):
        problems.append(f"exit codes {exit_codes}, not {EXIT_STOPPED}")
    newest = target.checkpoints.newest_intact()
    step = report.get("step")
    saved = checkpoint_format.checkpoint_path(target.checkpoints.folder, step) if isinstance(step, int) else None
    if saved is None or saved != newest:
        problems.append(f"stopped at step {step}, but the newest checkpoint is {newest.name if newest else 'missing'}")
    return problems


def check_resume(log: str, expected: Path | None, damaged: list[Path]) -> list[str]:
    """Checks that a run resumed from the newest intact checkpoint and logged each newer damaged one that it left out.

    Args:
        log: What rank 0 has logged since the restart.
        expected: The newest intact checkpoint before the restart; ``None``: the run must begin with step 0.
        damaged: The damaged checkpoints before the restart, older and newer than ``expected``.

    Returns:
        The problems found.
    """
    problems = []
    resumed = resumed_checkpoint(log)
    if resumed in {path.name for path in damaged}:
        problems.append(f"resumed from {resumed}, which was damaged")
    elif resumed != (expected.name if expected else None):
        problems.append(f"began with {resumed or 'step 0'}, not with {expected.name if expected else 'step 0'}")
    left_out = [line for line in log.splitlines() if "left out" in line]
    newer = [path.name for path in damaged if expected is None or path.name > expected.name]
    unreported = [name for name in newer if not any(name in line for line in left_out)]
    if unreported:
        problems.append(f"the log does not say that {', '.join(unreported)} was left out")
    return problems


def resumed_checkpoint(log: str) -> str | None:
    """The name of the checkpoint that a run resumed from, read from rank 0's log; ``None`` if it began with step 0."""
    marker = "resumed from "
    for line in log.splitlines():
        if marker in line:
            return Path(line.partition(marker)[2].rpartition(": step")[0]).name
    return None
