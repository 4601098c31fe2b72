"""What the steps of several strategies have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distrain.compression.autotune.compressor_cost import CompressorCost
from distrain.gradients.bucket_sizes import MIB, ONE_BUCKET, AllReduceCost, BucketSizes, choose_sizes
from distrain.tools.planning.cluster import Cluster, expected_maximum
from distrain.tools.planning.network import Duration, Group, Network
from distrain.tools.planning.prediction import Memory
from distrain.tools.planning.simulation import Compute, Operation, Simulated, Start, Wait, simulate
from distrain.tools.planning.workload import Workload, at, bucket_layout

#: Bytes of a small collective of a BatchNorm layer.
BATCHNORM_BYTES = 1024
#: Bytes of the two all-reduces from which a run concludes the cost of all others.
_SMALL_BYTES, _LARGE_BYTES = 1024, 4 * MIB


@dataclass(frozen=True)
class Setting:
    """Where a step is taken.

    Attributes:
        workload: The training.
        cluster: The machines.
        network: Their links.
    """

    workload: Workload
    cluster: Cluster
    network: Network

    def stragglers(self, computed: float, ranks: int, steps: int = 1) -> float:
        """Seconds a step that ranks wait for the slowest one, beyond what a simulation without chance shows.

        Args:
            computed: Seconds that a rank computes in a step.
            ranks: How many wait for each other.
            steps: Steps after each of which they do. The deviations of several steps add up by their squares.
        """
        return self.cluster.spread * computed * expected_maximum(ranks) / math.sqrt(steps)

    def memory(self, activations: float, other: float = 0.0) -> Memory:
        """Memory of a rank that has the whole model."""
        workload = self.workload
        return Memory(
            float(workload.held_bytes), float(workload.gradient_bytes), workload.optimizer_bytes, activations, other
        )

    def representatives(self) -> list[int]:
        """One rank of each speed, each of which stands for all like it."""
        speeds = [self.cluster.speed_of(host * self.cluster.ranks_per_host) for host in range(self.cluster.hosts)]
        return [speeds.index(speed) * self.cluster.ranks_per_host for speed in dict.fromkeys(speeds)]

    def simulate(self, programs: Sequence[Sequence[Operation]], ranks: Sequence[int]) -> Simulated:
        """Simulates representatives, each on a machine where all other ranks do the same."""
        return simulate(
            programs,
            list(range(len(programs))),
            self.cluster.slowdown_of,
            [self.cluster.speed_of(rank) for rank in ranks],
            alike=[min(self.cluster.ranks_per_machine, self.cluster.ranks)] * len(programs),
        )


def forward_pass(setting: Setting, samples: int, factor: float = 1.0) -> Iterator[Compute]:
    """Forward passes of all blocks."""
    for block in setting.workload.blocks:
        yield Compute("forward", factor * at(block.forward, samples))


def backward_pieces(workload: Workload, samples: int) -> list[float]:
    """Seconds of a backward pass before the gradient of each parameter is complete, in the model's order.

    A block's time is spread evenly over its gradients; that of blocks without any belongs to the blocks before.
    """
    times: list[float] = []
    carried = 0.0
    for block in reversed(workload.blocks):
        seconds = carried + at(block.backward, samples)
        if not block.gradients:
            carried = seconds
            continue
        carried = 0.0
        times += [seconds / len(block.gradients)] * len(block.gradients)
    if times:
        times[-1] += carried
    return times[::-1]


def bucket_sizes(
    network: Network, group: Group, gradient_bytes: int, given: Sequence[float | None] = (None, None, None)
) -> BucketSizes:
    """The sizes of buckets that a run would choose by measuring an all-reduce.

    Args:
        network: Has the links.
        group: The ranks that reduce gradients.
        gradient_bytes: Of all gradients.
        given: Sizes in MiB that are configured; ``None``: chosen.
    """
    if group.size < 2 or not gradient_bytes:
        return ONE_BUCKET
    small, large = network.all_reduce(_SMALL_BYTES, group), network.all_reduce(_LARGE_BYTES, group)
    seconds = max(large.seconds - small.seconds, 1e-12)
    share = min(max((large.processor_seconds - small.processor_seconds) / seconds, 0.0), 1.0)
    chosen = choose_sizes(AllReduceCost(small.seconds, seconds / _LARGE_BYTES, share), gradient_bytes)
    return BucketSizes(*(own if mb is None else mb for mb, own in zip(given, chosen, strict=True)))


def backward_with_exchange(
    setting: Setting,
    samples: int,
    group: Group,
    sizes: BucketSizes,
    members: int,
    compressor: str,
    factor: float = 1.0,
) -> tuple[list[Operation], list[str]]:
    """The last backward pass of a step, in which each complete bucket is sent.

    Args:
        setting: Where.
        samples: In the pass.
        group: The ranks that reduce gradients.
        sizes: Of the buckets.
        members: Simulated ranks that take part in each transfer.
        compressor: Name of the compressor.
        factor: By which passes take longer.

    Returns:
        The operations, and the transfers to wait for.
    """
    workload = setting.workload
    gradients = workload.gradient_sizes
    pieces = backward_pieces(workload, samples)
    layout = bucket_layout(gradients, sizes)
    operations: list[Operation] = []
    transfers: list[str] = []
    total = max(workload.gradient_bytes, 1)
    for number, bucket in enumerate(layout):
        operations.append(Compute("backward", factor * sum(pieces[index] for index in bucket)))
        size = sum(gradients[index] for index in bucket)
        cost = workload.compressors.get(compressor)
        if cost is None:
            durations = [setting.network.all_reduce(size, group)]
        else:
            work = compression_seconds(cost, workload.compressor_ranks, group.size)
            operations.append(Compute("compression", work * size / total))
            durations = list(_scaled(cost, size / total, workload.compressor_ranks, setting.network, group))
        for phase, duration in enumerate(durations):
            name = f"bucket {number}.{phase}"
            operations.append(Start(name, duration, members, "replicas"))
            transfers.append(name)
    return operations, transfers


def compression_seconds(cost: CompressorCost, measured_ranks: int, ranks: int) -> float:
    """A compressor's own work among some ranks, each of which decompresses what an all-gather brings from all others.

    Args:
        cost: As measured.
        measured_ranks: Number of ranks for which it was measured.
        ranks: Number of ranks.
    """
    seconds = 0.0
    for bucket in cost.buckets:
        for before, work in zip([[], *bucket.collectives], bucket.work, strict=True):
            gathered = any(kind == "all_gather" for kind, _ in before)
            seconds += work * (ranks / measured_ranks if gathered else 1.0)
    return seconds


def _scaled(cost: CompressorCost, share: float, ranks: int, network: Network, group: Group) -> Iterator[Duration]:
    """The collectives of a compressor for a part of the gradients, on other ranks than it was measured for."""
    for bucket in cost.buckets:
        for started in bucket.collectives:
            for kind, sent in started:
                if kind == "all_gather":
                    yield network.all_gather(share * sent / (ranks - 1), group)
                else:
                    yield network.all_reduce(share * sent * ranks / (2 * (ranks - 1)), group)


def waits(transfers: Sequence[str]) -> list[Wait]:
    """Waits for all transfers, in order."""
    return [Wait(transfer) for transfer in transfers]


def parts_of(simulated: Simulated, stragglers: float) -> dict[str, float]:
    """Seconds of a step by what they are spent on, on the rank that waits least.

    Args:
        simulated: The step.
        stragglers: Seconds to be added.
    """
    slowest = min(range(len(simulated.waited)), key=lambda rank: simulated.waited[rank])
    return parts_of_rank(simulated, slowest, stragglers)


def parts_of_rank(simulated: Simulated, rank: int, stragglers: float) -> dict[str, float]:
    """As :func:`parts_of`, on one rank.

    Args:
        simulated: The step.
        rank: Index of the rank among those that were simulated.
        stragglers: Seconds to be added.
    """
    kinds = simulated.computed[rank]
    total = sum(kinds.values())
    other = {kind: kinds.get(kind, 0.0) for kind in ("compression", "update")}
    return {
        "compute": total - sum(other.values()),
        **other,
        "waiting": simulated.seconds - total,
        "stragglers": stragglers,
    }
