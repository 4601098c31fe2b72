"""What will be done to a training, and when: drawn from a seed, so that the same seed plans the same faults."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

#: Share of faults that strike while ranks are still starting, where the kind allows it.
_WHILE_STARTING = 0.2
#: No fault is planned for the end of a run, which would be over before it has struck.
_LATEST = 0.6
_MOST_STEPS_LATE = 10


class Follows(enum.Enum):
    """What must come of a fault."""

    GOES_ON = "the run goes on by itself"
    FAILURE = "the run ends in time and failure.json names a rank"
    FAILURE_OF_RANK = "the run ends in time and failure.json names the rank that was hurt"
    STOPPED = "the run saves, writes stopped.json and ends"
    KILLED = "all processes are gone at once"


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: What users type.
        does: What it does, in a few words.
        follows: What must come of it, besides that the same command goes on with the run.
        any_time: It may strike while the ranks are starting, not only while they train.
        needs_checkpoint: It waits until there is a checkpoint.
        needs_network: It wants every rank on a host of its own, joined by a link.
        needs_disk: It wants a disk that can be filled.
    """

    name: str
    does: str
    follows: Follows
    any_time: bool = False
    needs_checkpoint: bool = False
    needs_network: bool = False
    needs_disk: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill_rank", "kill -9 of a rank", Follows.FAILURE_OF_RANK, any_time=True),
        Kind("kill_all", "kill -9 of the launcher and all ranks", Follows.KILLED, any_time=True),
        Kind("kill_saving", "the same while a checkpoint is being written", Follows.KILLED),
        Kind("stop_rank", "SIGSTOP to a rank, which then hangs", Follows.FAILURE_OF_RANK),
        Kind("interrupt_rank", "SIGINT to a rank, where Python raises KeyboardInterrupt", Follows.FAILURE_OF_RANK),
        Kind("terminate", "SIGTERM to the launcher", Follows.STOPPED),
        Kind("warn_rank", "SIGUSR1 to a rank, as schedulers warn of the end", Follows.STOPPED),
        Kind(
            "truncate",
            "kill -9 of all, then a file of the newest checkpoint is cut",
            Follows.KILLED,
            any_time=True,
            needs_checkpoint=True,
        ),
        Kind(
            "flip_bit",
            "kill -9 of all, then a bit in a file of the newest checkpoint is turned",
            Follows.KILLED,
            any_time=True,
            needs_checkpoint=True,
        ),
        Kind(
            "delete_file",
            "kill -9 of all, then a file of the newest checkpoint is deleted",
            Follows.KILLED,
            any_time=True,
            needs_checkpoint=True,
        ),
        Kind("fill_disk", "the disk is full for a while, during a save", Follows.GOES_ON, needs_disk=True),
        Kind("cut_link", "a host's link is dead until the run has ended", Follows.FAILURE, needs_network=True),
        Kind("delay_link", "all links are slow for a while", Follows.GOES_ON, needs_network=True),
    )
}


@dataclass(frozen=True)
class Fault:
    """One fault to come.

    Attributes:
        kind: A name of :data:`KINDS`.
        step: It strikes when this step is logged; ``None``: while the ranks start.
        seconds: How long after that step, or after the start.
        rank: Whom it strikes, where the kind strikes one.
        draws: Three numbers in [0, 1) that settle the rest: which file, which place in it, which bit; or how long.
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
class Run:
    """One disturbed run: the faults that strike it, in their order.

    Attributes:
        number: Counts the runs of a training from 1.
        faults: In order of their steps.
        on_network: Every rank has a host of its own.
    """

    number: int
    faults: tuple[Fault, ...]
    on_network: bool


def draw_kinds(kinds: Sequence[str], count: int, seed: str) -> list[str]:
    """Draws ``count`` names from those given, each about equally often."""
    chance = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += chance.sample(list(kinds), len(kinds))
    return drawn[:count]


def plan(
    kinds: Sequence[str],
    *,
    per_run: int,
    steps: int,
    world_size: int,
    start_seconds: float,
    step_seconds: float,
    seed: str,
    first: int = 1,
) -> list[Run]:
    """Deals faults to runs and draws when they strike, and whom.

    Args:
        kinds: The faults, by names of :data:`KINDS`.
        per_run: How many strike one run at most.
        steps: Steps of the undisturbed run.
        world_size: Ranks to choose victims from.
        start_seconds: How long a start takes until the first step.
        step_seconds: How long a step takes.
        seed: Settles everything.
        first: The first run's number.

    Returns:
        The runs; faults that need a network are together in runs of their own.
    """
    chance = random.Random(seed)
    groups: dict[bool, list[str]] = {False: [], True: []}
    for name in kinds:
        groups[KINDS[name].needs_network].append(name)
    runs: list[Run] = []
    for on_network, names in groups.items():
        for begin in range(0, len(names), per_run):
            dealt = names[begin : begin + per_run]
            moments = sorted(chance.randint(1, max(int(_LATEST * steps), 1)) for _ in dealt)
            faults = tuple(
                _draw(name, step, world_size, start_seconds, _MOST_STEPS_LATE * step_seconds, chance)
                for name, step in zip(dealt, moments, strict=True)
            )
            runs.append(Run(first + len(runs), faults, on_network))
    return runs


def _draw(name: str, step: int, world_size: int, start_seconds: float, late: float, chance: random.Random) -> Fault:
    starting = KINDS[name].any_time and chance.random() < _WHILE_STARTING
    return Fault(
        name,
        step=None if starting else step,
        seconds=chance.uniform(0, start_seconds if starting else late),
        rank=chance.randrange(world_size),
        draws=(chance.random(), chance.random(), chance.random()),
    )
