"""What the steps of several strategies have in common."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distrain.compression.autotune.compressor_cost import BucketCost
from distrain.gradients.bucket_sizes import DEFAULT_SIZES, MIB, ONE_BUCKET, AllReduceCost, BucketSizes, choose_sizes
from distrain.tools.planning.cluster import Cluster, expected_maximum
from distrain.tools.planning.network import Duration, Group, Network
from distrain.tools.planning.prediction import Memory
from distrain.tools.planning.simulation import Compute, Operation, Simulated, Start, Wait, simulate
from distrain.tools.planning.steps.shape import Shape
from distrain.tools.planning.workload import Workload, at, bucket_layout

#: Bytes of a small collective of a BatchNorm layer.
BATCHNORM_BYTES = 1024
#: Small collectives of each synchronised BatchNorm layer in a forward and in a backward pass.
BATCHNORM_FORWARD, BATCHNORM_BACKWARD = 2, 1
#: Channel of the collectives of ranks that train the same model, and of those that divide its layers.
REPLICAS, LAYERS = "replicas", "layers"
#: Bytes of the two all-reduces from which a run concludes the cost of all others.
_SMALL_BYTES, _LARGE_BYTES = 1024, 4 * MIB


@dataclass(frozen=True)
class Setting:
    """Where a step is taken.

    Attributes:
        workload: The training.
        cluster: The machines.
        network: Their links.
        layers: The ranks that divide layers, of which ``workload`` is one; ``None``: a rank has whole layers.
    """

    workload: Workload
    cluster: Cluster
    network: Network
    layers: Group | None = None

    def divided(self, shape: Shape) -> Setting:
        """The same for a rank of a mesh, which has its part of the layers alone.

        Args:
            shape: Of the mesh; how layers are divided in it has been measured.
        """
        if shape.tensor == 1:
            return self
        divided = self.workload.divided_among(shape.tensor, shape.pipeline)
        assert divided is not None, "it is no candidate without"
        return dataclasses.replace(
            self, workload=self.workload.of_rank(divided), layers=shape.layers_group(self.network)
        )

    @property
    def members(self) -> int:
        """Ranks that are simulated where all do the same, and take part in each transfer."""
        return len(self.representatives())

    def sums(
        self, name: str, sizes: Sequence[float], samples: float, members: int | None = None, channel: str = ""
    ) -> list[Operation]:
        """What ranks that divide layers add up in a pass, one tensor after the other, while they compute nothing.

        Args:
            name: Of the transfer.
            sizes: Bytes of each tensor for each sample.
            samples: In the pass.
            members: Simulated ranks that take part; ``None``: all.
            channel: Of the transfer; empty: that of the gradients if both go through the hosts' links.
        """
        if self.layers is None or not sizes:
            return []
        found = sum((self.network.all_reduce(samples * size, self.layers) for size in sizes), Duration())
        if self.workload.batchnorm_latency is not None:
            # As to the collectives of BatchNorm layers, ranks come to each of these at different times.
            small = self.network.all_reduce(BATCHNORM_BYTES, self.layers).seconds
            found += Duration(len(sizes) * max(self.workload.batchnorm_latency - 1, 0.0) * small)
        channel = channel or (REPLICAS if self.layers.hosts > 1 else LAYERS)
        return [Start(name, found, members or self.members, channel), Wait(name)]

    def stragglers_of_layers(self, computed: float, passes: float) -> float:
        """As :meth:`stragglers`, of ranks that divide layers: at each of their sums they wait for the slowest one.

        Where the collectives of BatchNorm layers were measured in passes, the times of these sums contain it.

        Args:
            computed: Seconds that a rank computes in a step.
            passes: Forward passes, each with its backward pass, of these layers in a step.
        """
        if self.layers is None or self.workload.batchnorm_latency is not None:
            return 0.0
        waits = passes * sum(len(block.forward_sums) + len(block.backward_sums) for block in self.workload.blocks)
        return self.stragglers(computed, self.layers.size, 1 / max(waits, 1))

    def stragglers(self, computed: float, ranks: int, steps: float = 1) -> float:
        """Seconds a step that ranks wait for the slowest one, beyond what a simulation without chance shows.

        Args:
            computed: Seconds that a rank computes in a step.
            ranks: How many wait for each other.
            steps: Steps after each of which they do. The deviations of several steps add up by their squares. Below 1
                where they wait several times in a step, in each part of which the deviation is smaller by as much.
        """
        return self.cluster.spread * computed * expected_maximum(ranks) / math.sqrt(steps)

    def memory(self, activations: float, other: float = 0.0) -> Memory:
        """Memory of a rank that has the whole model."""
        workload, gradients = self.workload, float(self.workload.gradient_bytes)
        # Sharpness-aware minimization keeps the parameters from before the second round; while it moves them, there
        # is another tensor of that size.
        moved = (workload.rounds - 1) * gradients
        return Memory(
            float(workload.held_bytes),
            gradients,
            workload.optimizer_bytes,
            max(activations, workload.update_bytes, moved),
            other + moved,
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
            bucket=self.cluster.token_bucket,
        )


def setting_of(workload: Workload, cluster: Cluster) -> Setting:
    """A training on a cluster, whose collectives are those of its devices."""
    flat = workload.accelerator is not None
    network = Network(cluster, "flat" if flat else "hierarchical", workload.latency_factor)
    return Setting(workload, cluster, network)


def forward_pass(setting: Setting, samples: int, factor: float = 1.0, name: str = "") -> Iterator[Operation]:
    """Forward passes of all blocks.

    Args:
        setting: Where.
        samples: In the pass.
        factor: By which passes take longer.
        name: Of the pass; each of a step has another one.
    """
    for index, block in enumerate(setting.workload.blocks):
        yield Compute("forward", factor * at(block.forward, samples))
        yield from setting.sums(f"sums forward {name} {index}", block.forward_sums, samples)


def backward_pass(setting: Setting, samples: int, factor: float = 1.0, name: str = "") -> Iterator[Operation]:
    """As :func:`forward_pass`; nothing of the gradients is sent."""
    yield Compute("backward", factor * setting.workload.backward_seconds(samples))
    sizes = [size for block in setting.workload.blocks for size in block.backward_sums]
    yield from setting.sums(f"sums backward {name}", sizes, samples)


def backward_sums_by_gradient(workload: Workload) -> dict[int, tuple[float, ...]]:
    """What ranks that divide layers add up in a backward pass just after a gradient, by its index."""
    found: dict[int, tuple[float, ...]] = {}
    first = len(workload.gradient_sizes)
    for block in reversed(workload.blocks):
        first -= len(block.gradients)
        if block.backward_sums:
            # A block whose parameters are frozen does so before the gradients of those before it.
            index = first if block.gradients else max(first - 1, 0)
            found[index] = (*found.get(index, ()), *block.backward_sums)
    return found


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


def bucket_sizes(setting: Setting, group: Group, given: Sequence[float | None] = (None, None, None)) -> BucketSizes:
    """The sizes of buckets that a run would choose by measuring an all-reduce.

    Args:
        setting: Where.
        group: The ranks that reduce gradients.
        given: Sizes in MiB that are configured; ``None``: chosen.
    """
    gradient_bytes = setting.workload.gradient_bytes
    if group.size < 2 or not gradient_bytes:
        return ONE_BUCKET
    if setting.workload.deterministic:
        return BucketSizes(*(own if mb is None else mb for mb, own in zip(given, DEFAULT_SIZES, strict=True)))
    cost = setting.cluster.all_reduce_cost
    if cost is None or group.size != setting.cluster.ranks:
        small, large = (setting.network.all_reduce(size, group) for size in (_SMALL_BYTES, _LARGE_BYTES))
        seconds = max(large.seconds - small.seconds, 1e-12)
        share = min(max((large.processor_seconds - small.processor_seconds) / seconds, 0.0), 1.0)
        cost = AllReduceCost(small.seconds, seconds / _LARGE_BYTES, share)
    chosen = choose_sizes(cost, gradient_bytes)
    return BucketSizes(*(own if mb is None else mb for mb, own in zip(given, chosen, strict=True)))


def backward_with_exchange(
    setting: Setting,
    samples: int,
    group: Group,
    sizes: BucketSizes,
    members: int,
    compressor: str,
    factor: float = 1.0,
    prefix: str = "",
    *,
    synchronised: bool = False,
) -> list[Operation]:
    """The last backward pass of a step, in which each complete bucket is sent, to the end of all exchanges.

    Collectives take place in the order in which ranks start them. So a BatchNorm layer whose backward pass communicates
    waits until the buckets before it have arrived, and they are less hidden.

    Args:
        setting: Where.
        samples: In the pass.
        group: The ranks that reduce gradients.
        sizes: Of the buckets.
        members: Simulated ranks that take part in each transfer.
        compressor: Name of the compressor.
        factor: By which passes take longer.
        prefix: Of the names of the transfers, which must be different if there are several such passes.
        synchronised: BatchNorm layers take their statistics over all ranks.
    """
    workload = setting.workload
    gradients = workload.gradient_sizes
    pieces = backward_pieces(workload, samples)
    layers, sums = batchnorms_by_gradient(workload) if synchronised else {}, backward_sums_by_gradient(workload)
    operations: list[Operation] = []
    under_way: list[_Exchange] = []
    for number, bucket in enumerate(bucket_layout(gradients, sizes)):
        seconds = 0.0
        for index in bucket:
            seconds += factor * pieces[index]
            if index in layers:
                operations.append(Compute("backward", seconds))
                seconds, name = 0.0, f"{prefix}statistics {index}"
                operations += batchnorm_collectives(setting, name, BATCHNORM_BACKWARD * layers[index], members, group)
            if index in sums:
                operations.append(Compute("backward", seconds))
                seconds, name = 0.0, f"{prefix}sums backward {index}"
                operations += setting.sums(name, sums[index], samples)
        operations.append(Compute("backward", seconds))
        # As distrain.gradients.exchange does it: before a bucket is started, all others begin their next collective.
        for exchange in under_way:
            operations += exchange.advance(members)
        name = f"{prefix}bucket {number}"
        exchange = _exchange(setting, group, name, sum(gradients[index] for index in bucket), compressor)
        under_way.append(exchange)
        operations += exchange.advance(members)
    while any(exchange.phases_left for exchange in under_way):
        for exchange in under_way:
            operations += exchange.advance(members)
    for exchange in under_way:
        operations += exchange.end()
    return operations


def batchnorms_by_gradient(workload: Workload) -> dict[int, int]:
    """Number of BatchNorm layers that communicate in a backward pass just after a gradient, by its index."""
    found: dict[int, int] = defaultdict(int)
    first, carried = len(workload.gradient_sizes), 0
    for block in reversed(workload.blocks):
        first -= len(block.gradients)
        for index in block.batchnorm_gradients:
            found[first + index] += 1
        # Layers without trained parameters, wherever they are.
        carried += block.batchnorms - len(block.batchnorm_gradients)
        if block.gradients and carried:
            found[first] += carried
            carried = 0
    return found


def batchnorm_collectives(
    setting: Setting, name: str, collectives: float, members: int, group: Group
) -> list[Operation]:
    """Some small collectives of BatchNorm layers, as one, which ranks wait for.

    Args:
        setting: Where.
        name: Of the transfer.
        collectives: Number of them.
        members: Simulated ranks that take part.
        group: The ranks that share their statistics.
    """
    one = setting.network.all_reduce(BATCHNORM_BYTES, group)
    if setting.workload.batchnorm_latency is not None:
        one = dataclasses.replace(one, seconds=setting.workload.batchnorm_latency * one.seconds, fast_seconds=None)
    return [Start(name, one.times(collectives), members, REPLICAS), Wait(name)]


def batchnorm_waits(workload: Workload) -> int:
    """Times in a pass that ranks wait for the slowest one at synchronised BatchNorm layers.

    Where the collectives of these layers were measured in passes, their times contain it.
    """
    if workload.batchnorm_latency is not None:
        return 0
    return (BATCHNORM_FORWARD + BATCHNORM_BACKWARD) * workload.batchnorms


class _Exchange:
    """A bucket's collectives, one after the other, with a compressor's work before, between and after them.

    Args:
        name: Of the bucket.
        work: Seconds of work, one more than phases.
        phases: The collectives that are started together, one after the other.
    """

    def __init__(self, name: str, work: Sequence[float], phases: Sequence[Sequence[Duration]]) -> None:
        self._name, self._work, self._phases = name, work, phases
        self._begun = 0

    @property
    def phases_left(self) -> int:
        """Number of phases that have not begun."""
        return len(self._phases) - self._begun

    def advance(self, members: int) -> Iterator[Operation]:
        """Ends the phase under way, and begins the next one; nothing after the last one has begun."""
        if self.phases_left:
            yield from self.end()
            for index, duration in enumerate(self._phases[self._begun]):
                yield Start(f"{self._name}.{self._begun}.{index}", duration, members, REPLICAS)
            self._begun += 1

    def end(self) -> Iterator[Operation]:
        """Waits for the phase under way, if there is one, and does the work after it."""
        if self._begun:
            for index in range(len(self._phases[self._begun - 1])):
                yield Wait(f"{self._name}.{self._begun - 1}.{index}")
        if self._work[self._begun]:
            yield Compute("compression", self._work[self._begun])


def _exchange(setting: Setting, group: Group, name: str, size: int, compressor: str) -> _Exchange:
    """The exchange of a bucket of so many bytes."""
    workload = setting.workload
    if compressor not in workload.compressors:
        return _Exchange(name, [0.0, 0.0], [[setting.network.all_reduce(size, group)]])
    bucket = workload.compressor_cost(compressor, size)
    work = work_seconds(bucket, workload.compressor_ranks, group.size)
    phases = [
        [_scaled(*one, workload.compressor_ranks, setting.network, group) for one in started]
        for started in bucket.collectives
    ]
    return _Exchange(name, work, phases)


def work_seconds(bucket: BucketCost, measured_ranks: int, ranks: int) -> list[float]:
    """A compressor's own work among some ranks, each of which decompresses what an all-gather brings from all others.

    Args:
        bucket: As measured.
        measured_ranks: Number of ranks for which it was measured.
        ranks: Number of ranks.

    Returns:
        Seconds before, between and after the collectives.
    """
    factors = [
        ranks / measured_ranks if any(kind == "all_gather" for kind, _ in before) else 1.0
        for before in [[], *bucket.collectives]
    ]
    return [factor * work for factor, work in zip(factors, bucket.work, strict=True)]


def _scaled(kind: str, sent: int, ranks: int, network: Network, group: Group) -> Duration:
    """A compressor's collective on other ranks than it was measured for."""
    if kind == "all_gather":
        return network.all_gather(sent / (ranks - 1), group)
    return network.all_reduce(sent * ranks / (2 * (ranks - 1)), group)


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
