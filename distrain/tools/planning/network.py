"""How long collectives and messages take among ranks of several hosts.

Ring and tree: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
Hierarchical: as :mod:`distrain.communication.shared_memory.hierarchical` does it; ranks of a host combine their
tensors first, and one rank of each host takes part in the ring.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from distrain.tools.planning.cluster import Cluster, Link, LinkPoint

#: ``hierarchical``: gloo and shared memory. ``flat``: all ranks in one ring or tree, as NCCL does it.
Collectives = Literal["hierarchical", "flat"]


@dataclass(frozen=True)
class Duration:
    """Of a transfer.

    Attributes:
        seconds: From the moment when all ranks have started it to its end.
        processor_seconds: Part of it in which a rank's processor is busy, so that computation is delayed.
        sent: Bytes that each rank sends.
        fast_seconds: As ``seconds``, if the token buckets of the hosts' links hold enough for it; ``None``: there are
            none.
        between: Bytes of ``sent`` that a rank sends to another host.
        idle_seconds: Part of ``seconds`` in which the link waits for messages to arrive, so that another transfer may
            use it.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    sent: float = 0.0
    fast_seconds: float | None = None
    between: float = 0.0
    idle_seconds: float = 0.0

    def times(self, count: float) -> Duration:
        """So many of them, one after the other."""
        fast = None if self.fast_seconds is None else count * self.fast_seconds
        # One after the other, so that what others may use is that of one.
        return Duration(
            count * self.seconds,
            count * self.processor_seconds,
            count * self.sent,
            fast,
            count * self.between,
            self.idle_seconds,
        )

    def __add__(self, other: Duration) -> Duration:
        buckets = self.fast_seconds is not None or other.fast_seconds is not None
        return Duration(
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            self.sent + other.sent,
            self._fast + other._fast if buckets else None,
            self.between + other.between,
            self.idle_seconds + other.idle_seconds,
        )

    @property
    def _fast(self) -> float:
        return self.seconds if self.fast_seconds is None else self.fast_seconds


@dataclass(frozen=True)
class Group:
    """Ranks that communicate.

    Attributes:
        hosts: Hosts that have some of them.
        per_host: Ranks on each of these hosts.
        sharing: Groups that use the same hosts' network at the same time, as the stages of a pipeline's replicas do.
    """

    hosts: int
    per_host: int
    sharing: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.hosts * self.per_host


class Network:
    """Durations of transfers on a cluster.

    Args:
        cluster: Has the links.
        collectives: How they are done.
        latency_factor: By which collectives in a step have a longer latency than the links' measurement shows.
    """

    def __init__(
        self, cluster: Cluster, collectives: Collectives = "hierarchical", latency_factor: float = 1.0
    ) -> None:
        self._cluster = cluster
        self._collectives = collectives
        self._latency_factor = latency_factor

    def group(self, ranks: int, stride: int = 1) -> Group:
        """The group of every ``stride``-th rank, so many of them.

        Args:
            ranks: Size of the group.
            stride: Distance of two neighbours, such as the ranks of a pipeline whose replicas communicate.
        """
        per_host = max(self._cluster.ranks_per_host // stride, 1)
        per_host = math.gcd(min(per_host, ranks), ranks)
        sharing = min(stride, self._cluster.ranks_per_host) if ranks > per_host else 1
        return Group(ranks // per_host, per_host, sharing)

    def all_reduce(self, size: float, group: Group) -> Duration:
        """An all-reduce of ``size`` bytes."""
        if group.size < 2:
            return Duration()
        if self._collectives == "flat":
            slow = self._between(group) if group.hosts > 1 else self._cluster.within
            fastest = min(
                self._ring(slow, size, group.size),
                self._tree(slow, size, group.size),
                key=lambda duration: duration.seconds,
            )
            return self._with_tokens(fastest, fastest.seconds) if group.hosts > 1 else fastest
        # On one host ranks read each other's tensors; what a rank sends is counted as in a ring.
        inside = self._ring(self._cluster.within, size, group.per_host)
        if group.hosts == 1:
            return inside
        fast = self._ring(self._fast, size, group.hosts).seconds
        outside = self._with_tokens(self._ring(self._between(group), size, group.hosts), fast)
        # Gloo has two threads, and what one waits for does not keep the other from sending.
        idle = self._latency_factor * 2 * (group.hosts - 1) * self._cluster.between.latency
        return inside + dataclasses.replace(outside, idle_seconds=idle)

    def all_gather(self, size: float, group: Group) -> Duration:
        """An all-gather of ``size`` bytes of each rank, in a ring."""
        if group.size < 2:
            return Duration()
        link = self._between(group, self._cluster.gathers) if group.hosts > 1 else self._cluster.within
        sent, rounds = (group.size - 1) * size, group.size - 1
        found = Duration(self._rounds(link, sent, rounds), self._processor_seconds(link, sent), sent)
        if group.hosts == 1:
            return found
        idle = 0.0 if self._collectives == "flat" else self._latency_factor * rounds * link.latency
        fast = min(self._rounds(self._fast, sent, rounds), found.seconds)
        return dataclasses.replace(self._with_tokens(found, fast), idle_seconds=idle)

    def reduce_scatter(self, size: float, group: Group) -> Duration:
        """A reduce-scatter of ``size`` bytes, of whose sum each rank gets an equal part."""
        sent = (group.size - 1) / group.size * size
        if self._collectives == "flat" or group.hosts == 1:
            return self.all_gather(size / group.size, group)
        if group.per_host > 1:
            # The hosts' leaders sum up everything, and each rank takes its part.
            return dataclasses.replace(self.all_reduce(size, group), sent=sent)
        # Each rank sends each other one its part: all at once, or one after the other as far as its processor does it.
        measured = self._cluster.scatters
        link = self._between(group, measured)
        rounds = 1 if measured is None else group.size - 1
        found = Duration(self._rounds(link, sent, rounds), self._processor_seconds(link, sent), sent)
        return self._with_tokens(found, min(self._rounds(self._fast, sent, rounds), found.seconds))

    def message(self, size: float, source: int, target: int, tensors: int = 1, sharing: int = 1) -> Duration:
        """Messages from one rank to another one.

        Args:
            size: Of all together, in bytes.
            source: Rank that sends.
            target: Rank that receives.
            tensors: Number of messages, one after the other.
            sharing: Ranks of the host that send as much at the same time.
        """
        same = self._cluster.host_of(source) == self._cluster.host_of(target)
        inside = self._cluster.messages or self._cluster.within
        link = inside if same else self._between(Group(2, 1, sharing))
        found = Duration(_in_rounds(link, size, tensors), link.processor_seconds(size), size)
        return found if same else self._with_tokens(found, _in_rounds(self._fast, size, tensors))

    def to_server(self, size: float, worker: int, server: int) -> Duration:
        """A message between a worker and a parameter server.

        Args:
            size: In bytes.
            worker: The worker's rank.
            server: The server's rank.
        """
        link = self._cluster.sockets
        if link is None:
            return self.message(size, worker, server)
        found = Duration(link.seconds(size), link.processor_seconds(size), size)
        same = self._cluster.host_of(worker) == self._cluster.host_of(server)
        return found if same else self._with_tokens(found, min(self._fast.seconds(size), found.seconds))

    @property
    def _fast(self) -> Link:
        """The link between hosts while their token buckets hold enough."""
        bucket = self._cluster.token_bucket
        return self._cluster.between if bucket is None else bucket.fast

    def _with_tokens(self, duration: Duration, fast: float) -> Duration:
        """A transfer between hosts, and its time if the token buckets hold enough."""
        if self._cluster.token_bucket is None:
            return duration
        return dataclasses.replace(duration, fast_seconds=fast, between=duration.sent)

    def _between(self, group: Group, link: Link | None = None) -> Link:
        """The link between hosts, as one of several groups that use it sees it.

        Args:
            group: The one.
            link: As measured; ``None``: with all-reduces.
        """
        link = link or self._cluster.between
        if group.sharing == 1:
            return link
        points = tuple(
            LinkPoint(one.sent, link.latency + group.sharing * (one.seconds - link.latency), one.processor_seconds)
            for one in link.points
        )
        return Link(points)

    def _ring(self, link: Link, size: float, ranks: int) -> Duration:
        """A ring all-reduce: 2 (n - 1) rounds, in each of which a rank sends an n-th of the tensor."""
        if ranks < 2:
            return Duration()
        sent = 2 * (ranks - 1) / ranks * size
        return Duration(self._rounds(link, sent, 2 * (ranks - 1)), self._processor_seconds(link, sent), sent)

    def _tree(self, link: Link, size: float, ranks: int) -> Duration:
        """A double binary tree (Sanders, Speck and Träff 2009), of logarithmic latency: each rank sends all twice."""
        sent = 2.0 * size
        rounds = 2 * math.ceil(math.log2(ranks))
        return Duration(self._rounds(link, sent, rounds), self._processor_seconds(link, sent), sent)

    def _rounds(self, link: Link, sent: float, rounds: int) -> float:
        """Seconds of a collective in which a rank sends so many bytes in several rounds.

        If collectives take longer in a step, ranks wait for each other, however many bytes they send. If they take less
        time, the measurement was disturbed as a whole.
        """
        alone = _in_rounds(link, sent, rounds)
        if self._latency_factor < 1:
            return self._latency_factor * alone
        return alone + (self._latency_factor - 1) * rounds * link.latency

    def _processor_seconds(self, link: Link, sent: float) -> float:
        """Processor time of such a collective. Waiting for each other takes none."""
        return min(self._latency_factor, 1.0) * link.processor_seconds(sent)


def _in_rounds(link: Link, sent: float, rounds: int) -> float:
    """Seconds in which a rank sends so many bytes in several messages, one after the other."""
    return link.seconds(sent) + (rounds - 1) * link.latency
