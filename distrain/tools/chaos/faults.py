"""How each kind of fault is done to a job, and what is wrong with what came of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distrain.errors import EXIT_STOPPED
from distrain.tools.chaos import processes
from distrain.tools.chaos.damage import Checkpoints
from distrain.tools.chaos.disk import FULL, Disk
from distrain.tools.chaos.job import Job
from distrain.tools.chaos.plan import KINDS, Fault, Follows
from distrain.tools.testnet.network import VirtualNetwork

#: A full disk must be met by a save, and told of, within this time.
_FIRST_SAVE_SECONDS = 30
#: Longest time that a disk stays full after that, and that a link stays slow.
_LONGEST_WHILE = 1.0
_LATE_SECONDS = 0.05


class Missed(Exception):
    """The moment of a fault has passed before it could strike; the message says why."""


@dataclass
class Scene:
    """What a fault strikes.

    Attributes:
        job: The training as it runs.
        checkpoints: Its checkpoints.
        disk: What its folder lies on, if that can be filled.
        network: What joins its hosts, if each rank has one.
        mends: What has to be undone when the job has ended.
    """

    job: Job
    checkpoints: Checkpoints
    disk: Disk | None = None
    network: VirtualNetwork | None = None
    mends: list[Callable[[], None]] = field(default_factory=list)


def strike(scene: Scene, fault: Fault) -> str:
    """Does it.

    Returns:
        What was done, in a few words.

    Raises:
        Missed: There is nothing left to strike.
    """
    return _STRIKES[fault.kind](scene, fault)


def _signal_rank(number: signal.Signals) -> Callable[[Scene, Fault], str]:
    def send(scene: Scene, fault: Fault) -> str:
        deadline = time.monotonic() + _FIRST_SAVE_SECONDS
        # While a job starts, its ranks may not be there yet.
        while (pid := scene.job.ranks().get(fault.rank)) is None:
            if scene.job.has_ended() or time.monotonic() > deadline:
                raise Missed(f"rank {fault.rank} has no process on this host")
            time.sleep(0.02)
        if not processes.send(pid, number):
            raise Missed(f"rank {fault.rank} had ended")
        return f"{number.name} to rank {fault.rank}"

    return send


def _terminate(scene: Scene, _: Fault) -> str:
    sent = [processes.send(pid, signal.SIGTERM) for pid in scene.job.launchers()]
    if not any(sent):
        raise Missed("the launcher had ended")
    return "SIGTERM to the launcher"


def _kill_all(scene: Scene, _: Fault) -> str:
    if scene.job.has_ended():
        raise Missed("the run had ended")
    scene.job.kill()
    return "SIGKILL to all"


def _kill_saving(scene: Scene, _: Fault) -> str:
    while not scene.job.has_ended():
        if scene.checkpoints.being_written():
            # Held still, so that what is seen is what is killed.
            ranks = scene.job.ranks().values()
            for pid in ranks:
                processes.send(pid, signal.SIGSTOP)
            if scene.checkpoints.being_written():
                scene.job.kill()
                return "SIGKILL to all during a save"
            for pid in ranks:
                processes.send(pid, signal.SIGCONT)
        time.sleep(0.0005)
    raise Missed("no save was caught")


def _damage(scene: Scene, fault: Fault) -> str:
    _kill_all(scene, fault)
    return scene.checkpoints.damage(fault)


def _fill_disk(scene: Scene, fault: Fault) -> str:
    assert scene.disk is not None
    begun = time.monotonic()
    until = begun + _FIRST_SAVE_SECONDS
    told = False
    try:
        while time.monotonic() < until and not scene.job.has_ended():
            scene.disk.fill(scene.job.everyone())
            if not told and any(words in scene.job.said() for words in FULL):
                told, until = True, time.monotonic() + fault.draws[0] * _LONGEST_WHILE
            time.sleep(0.05)
    finally:
        scene.disk.clear()
    if not told and scene.job.has_ended() and not any(scene.job.codes()):
        raise Missed("no save met the full disk")
    lasted = f"{scene.disk.means}, for {time.monotonic() - begun:.1f} s"
    return lasted if told else f"{lasted}; nothing was said about it"


def _cut_link(scene: Scene, fault: Fault) -> str:
    assert scene.network is not None
    if scene.job.has_ended():
        raise Missed("the run had ended")
    scene.network.cut_link(fault.rank)
    scene.mends.append(scene.network.restore_links)
    return f"link of rank {fault.rank}'s host cut"


def _delay_link(scene: Scene, fault: Fault) -> str:
    assert scene.network is not None
    seconds = fault.draws[0] * _LONGEST_WHILE
    if scene.job.has_ended():
        raise Missed("the run had ended")
    scene.network.add_delay(_LATE_SECONDS)
    try:
        time.sleep(seconds)
    finally:
        scene.network.restore_links()
    return f"links slow for {seconds:.1f} s"


_STRIKES: dict[str, Callable[[Scene, Fault], str]] = {
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


def wrong_reports(scene: Scene, fault: Fault, *, trained: bool) -> list[str]:
    """What is wrong with the exit codes and reports of a job that a fault has ended.

    Args:
        scene: The job.
        fault: What struck it.
        trained: It had begun to train; before that there need be no report.
    """
    follows, codes = KINDS[fault.kind].follows, scene.job.codes()
    if follows is Follows.KILLED:
        return []
    problems = []
    if not all(codes):
        problems.append(f"exit codes {codes} of a run that did not end well")
    if follows is Follows.STOPPED:
        return problems + _wrong_stop(scene, codes)
    report = scene.job.report("failure.json")
    if report is None:
        return [*problems, "there is no failure.json"] if trained else problems
    if follows is Follows.FAILURE_OF_RANK and report.get("rank") != fault.rank:
        problems.append(f"failure.json blames rank {report.get('rank')} ({report.get('error')}), not rank {fault.rank}")
    return problems


def _wrong_stop(scene: Scene, codes: list[int]) -> list[str]:
    report = scene.job.report("stopped.json")
    if report is None:
        return [f"there is no stopped.json: {scene.job.last_words()}"]
    problems = []
    # torchrun makes every worker's code that is not zero a 1.
    if any(code not in (EXIT_STOPPED, 1) for code in codes):
        problems.append(f"exit codes {codes}, not {EXIT_STOPPED}")
    newest = scene.checkpoints.newest()
    if newest is None or newest.name != f"step_{_number(report.get('step')):08d}":
        saved = newest.name if newest else "nothing"
        problems.append(f"stopped at step {report.get('step')}, and the newest checkpoint is {saved}")
    return problems


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1


def wrong_resume(log: str, expected: Path | None, damaged: list[Path]) -> list[str]:
    """What is wrong with the checkpoint that a run went on from.

    Args:
        log: What rank 0 logged since it started again.
        expected: The newest checkpoint that is whole, if there is one.
        damaged: The damaged ones that were there.
    """
    problems = []
    loaded = loaded_from(log)
    if loaded in {path.name for path in damaged}:
        problems.append(f"loaded {loaded}, which was damaged")
    elif loaded != (expected.name if expected else None):
        problems.append(f"went on from {loaded or 'the beginning'}, not from {expected.name if expected else 'there'}")
    newer = [path.name for path in damaged if expected is None or path.name > expected.name]
    unnamed = [name for name in newer if not any("left out" in line and name in line for line in log.splitlines())]
    if unnamed:
        problems.append(f"the log doesn't say that {', '.join(unnamed)} was left out")
    return problems


def loaded_from(log: str) -> str | None:
    """The name of the checkpoint that a run went on from, by its log."""
    marker = "resumed from "
    for line in log.splitlines():
        if marker in line:
            return Path(line.partition(marker)[2].rpartition(": step")[0]).name
    return None
