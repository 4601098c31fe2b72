"""Plans which faults strike which run and when. The same seed gives the same plan."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

#: Share of faults that strike during startup, for kinds that allow it.
_STARTUP_SHARE = 0.2
#: Faults are planned within this share of a run's steps, because a run near its end may end before the fault strikes.
_LATEST_SHARE = 0.6
#: A fault strikes at most this many step times after its step was logged.
_MAX_LATENESS_STEPS = 10


class Outcome(enum.Enum):
    """What a job has to do after a fault."""

    CONTINUES = "the run continues by itself"
    FAILS = "the run ends in time and failure.json names a rank"
    FAILS_NAMING_RANK = "the run ends in time and failure.json names the rank that was hit"
    STOPS = "the run saves, writes stopped.json and ends"
    KILLED = "all processes are killed by the fault itself"


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault.

    Attributes:
        name: The name that users type.
        description: What the fault does, in a few words.
        expected: The required outcome. In addition, the same command must resume the run afterwards.
        during_startup: The fault may strike while the ranks start, not only while they train.
        needs_checkpoint: The fault waits until there is a checkpoint.
        needs_network: Every rank must be on a host of its own, joined by links.
        needs_disk: The run's folder must be on a disk that can be filled.
    """

    name: str
    description: str
    expected: Outcome
    during_startup: bool = False
    needs_checkpoint: bool = False
    needs_network: bool = False
    needs_disk: bool = False


FAULT_KINDS = {
    kind.name: kind
    for kind in (
        FaultKind("kill_rank", "kill -9 of a rank", Outcome.FAILS_NAMING_RANK, during_startup=True),
        FaultKind("kill_all", "kill -9 of the launcher and all ranks", Outcome.KILLED, during_startup=True),
        FaultKind("kill_saving", "the same while a checkpoint is being written", Outcome.KILLED),
        FaultKind("stop_rank", "SIGSTOP to a rank, which then hangs", Outcome.FAILS_NAMING_RANK),
        FaultKind("interrupt_rank", "SIGINT to a rank, as Ctrl-C sends it", Outcome.STOPS),
        FaultKind("terminate", "SIGTERM to the launcher", Outcome.STOPS),
        FaultKind("warn_rank", "SIGUSR1 to a rank, as schedulers announce the end", Outcome.STOPS),
        FaultKind(
            "truncate",
            "kill -9 of all, then a file of the newest checkpoint is truncated",
            Outcome.KILLED,
            during_startup=True,
            needs_checkpoint=True,
        ),
        FaultKind(
            "flip_bit",
            "kill -9 of all, then a bit in a file of the newest checkpoint is flipped",
            Outcome.KILLED,
            during_startup=True,
            needs_checkpoint=True,
        ),
        FaultKind(
            "delete_file",
            "kill -9 of all, then a file of the newest checkpoint is deleted",
            Outcome.KILLED,
            during_startup=True,
            needs_checkpoint=True,
        ),
        FaultKind("fill_disk", "the disk is full for a while, during a save", Outcome.CONTINUES, needs_disk=True),
        FaultKind("cut_link", "a host's link is dead until the run has ended", Outcome.FAILS, needs_network=True),
        FaultKind("delay_link", "all links are slow for a while", Outcome.CONTINUES, needs_network=True),
    )
}


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        kind: A name of :data:`FAULT_KINDS`.
        step: The fault strikes once this step is logged; ``None``: during startup.
        seconds: Delay after that step was logged, or after the start.
        rank: The rank that is hit, for kinds that hit one.
        draws: Three numbers in [0, 1) that decide the details: which file, which byte and which bit; or how long.
    """

    kind: str
    step: int | None
    seconds: float
    rank: int
    draws: tuple[float, float, float]

    def __str__(self) -> str:
        when = "at the start" if self.step is None else f"at step {self.step}"
        return f"{self.kind} {when} + {self.seconds:.2f} s"


@dataclass(frozen=True)
class PlannedRun:
    """The faults of one disturbed run.

    Attributes:
        number: Counts the runs of a training from 1.
        faults: The faults in order of their steps.
        needs_network: Every rank needs a host of its own.
    """

    number: int
    faults: tuple[Fault, ...]
    needs_network: bool


def draw_kinds(kinds: Sequence[str], count: int, seed: str) -> list[str]:
    """Draws ``count`` of the given names, each about equally often."""
    generator = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += generator.sample(list(kinds), len(kinds))
    return drawn[:count]


def plan_runs(
    kinds: Sequence[str],
    *,
    per_run: int,
    steps: int,
    world_size: int,
    startup_seconds: float,
    step_seconds: float,
    seed: str,
    first: int = 1,
) -> list[PlannedRun]:
    """Distributes faults over runs and draws their times and victims.

    Args:
        kinds: Names of :data:`FAULT_KINDS`, one per fault.
        per_run: Maximum number of faults per run.
        steps: Steps of the undisturbed run.
        world_size: Number of ranks to choose victims from.
        startup_seconds: Time from the start to the first logged step.
        step_seconds: Time of a step.
        seed: Determines the whole plan.
        first: Number of the first run.

    Returns:
        The runs. Faults that need a network are never mixed with others in one run.
    """
    generator = random.Random(seed)
    groups: dict[bool, list[str]] = {False: [], True: []}
    for name in kinds:
        groups[FAULT_KINDS[name].needs_network].append(name)
    runs: list[PlannedRun] = []
    for needs_network, names in groups.items():
        for begin in range(0, len(names), per_run):
            names_of_run = names[begin : begin + per_run]
            fault_steps = sorted(generator.randint(1, max(int(_LATEST_SHARE * steps), 1)) for _ in names_of_run)
            faults = tuple(
                _draw_fault(name, step, world_size, startup_seconds, _MAX_LATENESS_STEPS * step_seconds, generator)
                for name, step in zip(names_of_run, fault_steps, strict=True)
            )
            runs.append(PlannedRun(first + len(runs), faults, needs_network))
    return runs


def _draw_fault(
    name: str,
    step: int,
    world_size: int,
    startup_seconds: float,
    lateness_seconds: float,
    generator: random.Random,
) -> Fault:
    starting = FAULT_KINDS[name].during_startup and generator.random() < _STARTUP_SHARE
    return Fault(
        name,
        step=None if starting else step,
        seconds=generator.uniform(0, startup_seconds if starting else lateness_seconds),
        rank=generator.randrange(world_size),
        draws=(generator.random(), generator.random(), generator.random()),
    )
