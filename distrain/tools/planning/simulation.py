"""Runs the programs of some ranks against the clock of a model: processors are shared, links carry transfers in turn.

A rank does its operations one after the other. A rank that computes shares its machine's processors with all that
compute there at the same moment. A transfer begins when all its ranks have started it and the one before it on the
same channel has ended; if it leaves its link idle for a part of its time, two may be under way. A backward pass that
runs meanwhile is delayed by the time that the rank's own processor spends on the transfer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distrain.strategies.pipeline.timeline import Span
from distrain.tools.planning.cluster import TokenBucket
from distrain.tools.planning.network import Duration


@dataclass(frozen=True)
class Compute:
    """A rank computes.

    Attributes:
        kind: As in :class:`~distrain.strategies.pipeline.timeline.Span`; ``compression`` for a compressor's own work,
            ``overhead`` for what is done around a pass, ``update`` for all else that is no pass.
        seconds: If the rank computes alone on its machine, at a relative speed of 1.
        stage: Index of the stage.
        microbatch: Index of the microbatch.
    """

    kind: str
    seconds: float
    stage: int = 0
    microbatch: int = 0


@dataclass(frozen=True)
class Start:
    """A rank starts its part of a transfer, and goes on.

    Attributes:
        transfer: Its name; all ranks that take part use the same.
        duration: How long it takes.
        ranks: Number of ranks that must have started it.
        channel: Transfers on the same channel don't overlap, but for the time in which they leave the link idle.
    """

    transfer: str
    duration: Duration
    ranks: int
    channel: str


@dataclass(frozen=True)
class Wait:
    """A rank waits for the end of a transfer.

    Attributes:
        transfer: Its name.
        stage: Index of the stage that needs it.
        microbatch: Index of the microbatch that needs it.
    """

    transfer: str
    stage: int = 0
    microbatch: int = 0


#: Most steps until the token buckets of the links are as full before a step as after it.
_MOST_STEPS = 10
#: Kinds of computation that are not shown in a timeline of passes.
_NO_PASSES = ("compression", "overhead", "update")

Operation = Compute | Start | Wait
Program = Sequence[Operation]


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        seconds: From the start to the end of the last rank's program.
        lanes: For each rank its passes and waits, as a measured timeline has them.
        waited: For each rank the seconds in which it waited.
        computed: For each rank the seconds in which it computed, by kind.
        sent: For each rank the bytes that it sent.
    """

    seconds: float
    lanes: list[list[Span]]
    waited: list[float]
    computed: list[dict[str, float]]
    sent: list[float]


@dataclass
class _Transfer:
    duration: Duration
    needed: int
    channel: str
    members: list[_Rank] = field(default_factory=list)
    begins: float = math.inf
    ends: float = math.inf


@dataclass
class _Rank:
    index: int
    machine: int
    speed: float
    alike: int
    program: Program
    position: int = 0
    #: The one at this position; ``None`` at the end of the program.
    operation: Operation | None = field(init=False)
    since: float = 0.0
    #: Seconds of computation that are left of the current operation, alone at this rank's speed.
    remaining: float = 0.0
    #: Processor time of transfers under way that no computation has met yet, and when they end.
    burden: float = 0.0
    burden_ends: float = 0.0
    lane: list[Span] = field(default_factory=list)
    waited: float = 0.0
    computed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: float = 0.0
    #: Tokens of its link, and when there were so many.
    tokens: float = 0.0
    counted: float = 0.0

    def __post_init__(self) -> None:
        self.go_to(0)

    def go_to(self, position: int) -> None:
        """Takes the operation at a position of the program."""
        self.position = position
        self.operation = self.program[position] if position < len(self.program) else None


def simulate(
    programs: Sequence[Program],
    machines: Sequence[int],
    slowdown: Callable[[int], float],
    speeds: Sequence[float] | None = None,
    alike: Sequence[int] | None = None,
    bucket: TokenBucket | None = None,
) -> Simulated:
    """Simulates some ranks.

    With token buckets, the step is simulated until it leaves as many tokens as it has found.

    Args:
        programs: What each rank does.
        machines: The machine of each rank.
        slowdown: Factor by which computation takes longer while so many ranks of a machine compute.
        speeds: Relative speed of each rank; ``None``: all are as fast.
        alike: Number of ranks that each simulated one stands for, which do the same at the same time on the same
            machine; ``None``: itself alone.
        bucket: Of each rank's host; ``None``: the links have none.

    Raises:
        ValueError: The programs wait for each other for ever.
    """
    ones = [1] * len(programs)
    arguments = (programs, machines, slowdown, speeds or [1.0] * len(programs), alike or ones)
    if bucket is None:
        return _Simulation(*arguments).run()
    tokens = [bucket.burst_bytes] * len(programs)
    for _ in range(_MOST_STEPS):
        simulation = _Simulation(*arguments, bucket, tokens)
        simulated, before = simulation.run(), tokens
        tokens = simulation.tokens()
        if all(abs(now - then) < 0.01 * bucket.burst_bytes for now, then in zip(tokens, before, strict=True)):
            break
    return simulated


class _Simulation:
    """One run of the simulation."""

    def __init__(
        self,
        programs: Sequence[Program],
        machines: Sequence[int],
        slowdown: Callable[[int], float],
        speeds: Sequence[float],
        alike: Sequence[int],
        bucket: TokenBucket | None = None,
        tokens: Sequence[float] = (),
    ) -> None:
        self._ranks = [
            _Rank(index, *of_rank) for index, of_rank in enumerate(zip(machines, speeds, alike, programs, strict=True))
        ]
        for rank, held in zip(self._ranks, tokens, strict=False):
            rank.tokens = held
        self._bucket = bucket
        self._slowdown = slowdown
        self._now = 0.0
        self._transfers: dict[str, _Transfer] = {}
        #: When the last two transfers of a channel end.
        self._channel_ends: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self._under_way: list[_Transfer] = []

    def run(self) -> Simulated:
        for rank in self._ranks:
            self._begin(rank)
        while any(rank.operation is not None for rank in self._ranks):
            self._advance()
        return Simulated(
            self._now,
            [rank.lane for rank in self._ranks],
            [rank.waited for rank in self._ranks],
            [dict(rank.computed) for rank in self._ranks],
            [rank.sent for rank in self._ranks],
        )

    def tokens(self) -> list[float]:
        """Tokens that each rank's link has at the end."""
        for rank in self._ranks:
            self._count_tokens(rank, self._now)
        return [rank.tokens for rank in self._ranks]

    def _advance(self) -> None:
        """Goes to the next moment at which something ends."""
        computing = [rank for rank in self._ranks if isinstance(rank.operation, Compute)]
        active: dict[int, int] = defaultdict(int)
        for rank in computing:
            active[rank.machine] += rank.alike
        rates = {rank.index: 1 / self._slowdown(active[rank.machine]) for rank in computing}
        ends = [self._now + rank.remaining / rates[rank.index] for rank in computing]
        ends += [transfer.ends for transfer in self._under_way]
        ends += [transfer.begins for transfer in self._under_way if transfer.begins > self._now]
        if not ends:
            raise ValueError("the programs wait for each other")
        then = max(min(ends), self._now)
        for rank in computing:
            rank.remaining -= (then - self._now) * rates[rank.index]
        before, self._now = self._now, then
        for transfer in list(self._under_way):
            # It begins later than it was started if the channel was busy.
            if before < transfer.begins <= then:
                self._burden(transfer)
            if transfer.ends <= then:
                self._under_way.remove(transfer)
        for rank in computing:
            if rank.remaining <= 1e-12 * max(self._now, 1.0):
                self._end(rank)
        for rank in self._ranks:
            if isinstance(rank.operation, Wait) and self._has_ended(rank.operation.transfer):
                self._end(rank)

    def _has_ended(self, name: str) -> bool:
        return name in self._transfers and self._transfers[name].ends <= self._now

    def _begin(self, rank: _Rank) -> None:
        """Begins a rank's operation, and does those that take no time."""
        while (operation := rank.operation) is not None:
            rank.since = self._now
            if isinstance(operation, Start):
                self._start(rank, operation)
            elif isinstance(operation, Wait):
                if not self._has_ended(operation.transfer):
                    return
            else:
                rank.remaining = operation.seconds / rank.speed
                if rank.burden and rank.burden_ends > self._now:
                    rank.remaining += rank.burden
                rank.burden = 0.0
                if rank.remaining > 0:
                    return
            rank.go_to(rank.position + 1)

    def _start(self, rank: _Rank, start: Start) -> None:
        transfer = self._transfers.setdefault(start.transfer, _Transfer(start.duration, start.ranks, start.channel))
        transfer.members.append(rank)
        rank.sent += start.duration.sent
        if len(transfer.members) < transfer.needed:
            return
        before_last, last = self._channel_ends[transfer.channel]
        idle = transfer.duration.idle_seconds
        transfer.begins = max(self._now, before_last if idle else last)
        seconds = self._seconds(transfer.duration)
        by_bytes = last + max(seconds - idle, 0.0)
        transfer.ends = self._end_with_tokens(transfer, max(transfer.begins + seconds, by_bytes))
        self._channel_ends[transfer.channel] = (last, transfer.ends)
        self._under_way.append(transfer)
        if transfer.begins <= self._now:
            self._burden(transfer)

    def _seconds(self, duration: Duration) -> float:
        """How long a transfer takes that finds enough tokens, if its link needs any."""
        fast = duration.fast_seconds
        return duration.seconds if self._bucket is None or fast is None else fast

    def _end_with_tokens(self, transfer: _Transfer, ends: float) -> float:
        """When a transfer ends that would end at ``ends`` if there were enough tokens."""
        duration = transfer.duration
        if self._bucket is None or duration.fast_seconds is None:
            return ends
        rate = self._bucket.bytes_per_second
        for rank in transfer.members:
            self._count_tokens(rank, transfer.begins)
        # Tokens were counted at the end of a transfer that may still be under way.
        enough = max(rank.counted + (duration.between - rank.tokens) / rate for rank in transfer.members)
        ends = max(ends, enough)
        for rank in transfer.members:
            # Tokens that arrive meanwhile are used too.
            arrived = rate * max(ends - rank.counted, 0.0)
            rank.tokens = min(rank.tokens + arrived - duration.between, self._bucket.burst_bytes)
            rank.counted = max(ends, rank.counted)
        return ends

    def _count_tokens(self, rank: _Rank, now: float) -> None:
        """Adds the tokens that have arrived at a rank's link."""
        if self._bucket is not None and now > rank.counted:
            arrived = self._bucket.bytes_per_second * (now - rank.counted)
            rank.tokens = min(rank.tokens + arrived, self._bucket.burst_bytes)
            rank.counted = now

    def _burden(self, transfer: _Transfer) -> None:
        """Delays what the ranks of a transfer compute meanwhile."""
        for rank in transfer.members:
            if isinstance(rank.operation, Compute):
                rank.remaining += transfer.duration.processor_seconds
            else:
                rank.burden += transfer.duration.processor_seconds
                rank.burden_ends = max(rank.burden_ends, transfer.ends)

    def _end(self, rank: _Rank) -> None:
        """Ends a rank's operation and begins the next one."""
        operation = rank.operation
        taken = self._now - rank.since
        if isinstance(operation, Compute):
            rank.computed[operation.kind] += taken
            if operation.kind not in _NO_PASSES:
                rank.lane.append(Span(operation.kind, operation.stage, operation.microbatch, rank.since, self._now))
        elif isinstance(operation, Wait):
            rank.waited += taken
            rank.lane.append(Span("wait", operation.stage, operation.microbatch, rank.since, self._now))
        rank.go_to(rank.position + 1)
        self._begin(rank)
