"""The machines and links on which a training is planned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.gradients.bucket_sizes import AllReduceCost


@dataclass(frozen=True)
class LinkPoint:
    """Time of one size of message.

    Attributes:
        sent: Bytes that each rank sends.
        seconds: From the start to the end of the transfer.
        processor_seconds: Time that a rank's own processor spends on it, which computation does not have.
    """

    sent: float
    seconds: float
    processor_seconds: float = 0.0


@dataclass(frozen=True)
class Link:
    """A link between two ranks, by the times of messages of some sizes.

    Attributes:
        points: In ascending order of size, at least two. Between two sizes the time is linear; beyond the last one the
            line goes on.
    """

    points: tuple[LinkPoint, ...]

    @classmethod
    def of(cls, latency: float, bytes_per_second: float) -> Link:
        """A link of constant bandwidth: t = latency + bytes / bytes_per_second (Hockney 1994).

        Args:
            latency: Seconds of a message without content.
            bytes_per_second: Of large messages, in one direction.
        """
        return cls((LinkPoint(0, latency), LinkPoint(bytes_per_second, latency + 1.0)))

    @classmethod
    def of_rounds(cls, points: Sequence[LinkPoint], rounds: int) -> Link:
        """From times of a collective that sends several messages one after the other.

        Args:
            points: Bytes that a rank sent in each collective, and its times.
            rounds: Number of messages: 2 (n - 1) of a ring all-reduce among n ranks.
        """
        latency = min(point.seconds for point in points) / rounds
        others = latency * (rounds - 1)
        # No message takes less than an empty one, or more than a larger one, whatever was measured.
        found = []
        for index, point in enumerate(points):
            larger = points[index:]
            seconds = max(min(one.seconds for one in larger) - others, latency)
            found.append(LinkPoint(point.sent, seconds, min(one.processor_seconds for one in larger)))
        return cls(tuple(found))

    @property
    def latency(self) -> float:
        """Seconds of the smallest message."""
        return self.points[0].seconds

    def seconds(self, sent: float) -> float:
        """Time of a transfer in which each rank sends so many bytes."""
        return _interpolated([(point.sent, point.seconds) for point in self.points], sent)

    def processor_seconds(self, sent: float) -> float:
        """Time that a rank's own processor spends on such a transfer."""
        return _interpolated([(point.sent, point.processor_seconds) for point in self.points], sent)


@dataclass(frozen=True)
class TokenBucket:
    """Tokens for bytes that a host may send at once, besides those that its link's rate allows.

    Attributes:
        bytes_per_second: Rate at which tokens arrive.
        burst_bytes: Most tokens that are kept.
        fast: The link while there are tokens.
    """

    bytes_per_second: float
    burst_bytes: float
    fast: Link


@dataclass(frozen=True)
class Accelerator:
    """What a device that isn't here reaches in training, for a roofline (Williams et al. 2009).

    Attributes:
        flops: Floating-point operations per second of large matrix products.
        bytes_per_second: Bandwidth of its memory.
        launch_seconds: Of a kernel that has nothing to do.
    """

    flops: float
    bytes_per_second: float
    launch_seconds: float = 5e-6

    def seconds(self, flops: float, moved_bytes: float, kernels: int = 1) -> float:
        """Time of some kernels: the slower one of computing and moving, and at least their launches."""
        return max(flops / self.flops, moved_bytes / self.bytes_per_second, kernels * self.launch_seconds)


@dataclass(frozen=True)
class Cluster:
    """Hosts with the same number of ranks each.

    Attributes:
        hosts: Number of hosts.
        ranks_per_host: Ranks on each host.
        within: Link between ranks of one host.
        between: Link between hosts, which all ranks of a host share.
        memory_bytes: Memory that each rank may use; ``None``: unknown.
        slowdown: ``slowdown[k - 1]`` is the factor by which a rank's computation takes longer while k ranks of a
            machine compute, against one alone; beyond the last entry it grows in proportion to k. Empty: each rank has
            a device of its own.
        hosts_per_machine: Hosts that share one machine's processors, as those of a test network do.
        relative_speeds: Speed of each host's computation against the measured one; empty: all are as fast.
        spread: Standard deviation of the time that a rank computes in a step, relative to its mean.
        scatters: Link between hosts as a reduce-scatter uses it, in which each rank sends a part to each other one;
            ``None``: as ``between``, with all parts at once.
        gathers: Link between hosts as an all-gather uses it, in a ring; ``None``: as ``between``.
        messages: Link of messages from one rank to another one of the same host, which don't go through shared memory;
            ``None``: as ``within``.
        accelerator: The ranks' devices, where times were not measured.
        sockets: Link of the connections between a worker and a parameter server; ``None``: as other messages.
        all_reduce_cost: Cost of an all-reduce of all these ranks, from which a run chooses the sizes of its buckets;
            ``None``: as follows from the links.
        token_bucket: Of each host's link to the others; ``None``: ``between`` is always as fast.
    """

    hosts: int
    ranks_per_host: int
    within: Link
    between: Link
    memory_bytes: float | None = None
    slowdown: tuple[float, ...] = ()
    hosts_per_machine: int = 1
    relative_speeds: tuple[float, ...] = ()
    spread: float = 0.0
    scatters: Link | None = None
    gathers: Link | None = None
    messages: Link | None = None
    accelerator: Accelerator | None = None
    sockets: Link | None = None
    token_bucket: TokenBucket | None = None
    all_reduce_cost: AllReduceCost | None = None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.hosts * self.ranks_per_host

    @property
    def ranks_per_machine(self) -> int:
        """Ranks that share the processors of one machine."""
        return self.ranks_per_host * self.hosts_per_machine

    def host_of(self, rank: int) -> int:
        """The host of a rank; ranks of a host are consecutive."""
        return rank // self.ranks_per_host

    def speed_of(self, rank: int) -> float:
        """Relative speed of a rank's computation."""
        return self.relative_speeds[self.host_of(rank)] if self.relative_speeds else 1.0

    def slowdown_of(self, computing: int) -> float:
        """Factor by which computation takes longer while so many ranks of a machine compute."""
        return slowdown_at(self.slowdown, computing)

    def with_hosts(self, hosts: int) -> Cluster:
        """The same with another number of hosts, each on a machine of its own."""
        known = self.relative_speeds
        speeds = tuple(known[index % len(known)] for index in range(hosts)) if known else ()
        # Sockets that were measured within a host say nothing of those between hosts.
        sockets = self.sockets if (self.hosts > 1) == (hosts > 1) else None
        cost = self.all_reduce_cost if self.hosts == hosts else None
        return dataclasses.replace(
            self, hosts=hosts, hosts_per_machine=1, relative_speeds=speeds, sockets=sockets, all_reduce_cost=cost
        )


def slowdown_at(slowdown: Sequence[float], computing: int) -> float:
    """As :meth:`Cluster.slowdown_of`, with the factors of a cluster."""
    known = len(slowdown)
    if not known:
        return 1.0
    return slowdown[computing - 1] if computing <= known else slowdown[-1] * computing / known


def slowdown_curve(alone: float, together: float, ranks: int, processors: int) -> tuple[float, ...]:
    """The factors between one rank and all, of which only the two ends were measured.

    Up to one rank a processor the factor grows evenly, since ranks share caches and memory. From there on they also
    take turns, so it grows in proportion.

    Args:
        alone: Seconds of a step of one rank alone.
        together: Seconds of the same step while all ranks compute.
        ranks: How many compute together.
        processors: Of the machine.
    """
    whole = max(together / alone, 1.0)
    shared = min(ranks, processors)
    at_processors = max(whole * shared / ranks, 1.0)
    rising = [1 + (at_processors - 1) * index / max(shared - 1, 1) for index in range(shared)]
    turns = [max(whole * count / ranks, at_processors) for count in range(shared + 1, ranks + 1)]
    return (*rising, *turns)


def expected_maximum(ranks: int) -> float:
    """Mean of the largest of so many independent standard normal numbers, by Blom's approximation (1958).

    A step that ends when the slowest rank has ended takes longer by so many standard deviations.
    """
    return 0.0 if ranks < 2 else _normal_quantile((ranks - 0.375) / (ranks + 0.25))


def _normal_quantile(probability: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 * math.erfc(-middle / math.sqrt(2)) < probability
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    if at <= points[0][0] or len(points) == 1:
        return points[0][1]
    after = next((index for index, (size, _) in enumerate(points) if size >= at), len(points) - 1)
    (low_size, low), (high_size, high) = points[after - 1], points[after]
    return low + max(high - low, 0.0) / (high_size - low_size) * (at - low_size)
