"""Measures the machines and links of these ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.link_model import LinkModel, measure_link
from distrain.gradients.bucket_sizes import BucketSizing, gradient_bytes_of
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.pipeline.block_costs import measure_point_to_point
from distrain.tools.planning.cluster import Cluster, Link, LinkPoint, slowdown_curve
from distrain.tools.planning.socket_link import measure_sockets
from distrain.tools.planning.token_bucket import measure_token_bucket

#: A message is sent so many times, or fewer in so many seconds.
_LINK_REPEATS, _LINK_SECONDS = 21, 0.3
#: Bytes of the largest message that is timed.
_MOST_BYTES = 32 * 2**20
#: Link between ranks of a host where each host has one rank, so that there is nothing to measure.
_SHARED_MEMORY = Link.of(50e-6, 5e9)


@dataclass(frozen=True)
class Rank:
    """One of the ranks that measure together.

    Attributes:
        runtime: Its process group and device.
        world: Its place.
        hosts: Number of hosts, each of which has as many ranks.
        machines: Number of machines, each of which may be several hosts of a test network.
        fewest_processors: Processors that each rank may use, on the host where these are fewest.
    """

    runtime: Runtime
    world: World
    hosts: int
    machines: int
    fewest_processors: int

    @property
    def per_machine(self) -> int:
        """Ranks that share the processors of one machine."""
        return self.world.size // self.machines

    @property
    def takes_turns(self) -> bool:
        """Whether a machine has more of the ranks than processors; the same on all ranks."""
        return self.per_machine > self.fewest_processors

    @property
    def per_host(self) -> int:
        """Ranks of each host."""
        return self.world.size // self.hosts


def measure_cluster(rank: Rank, model: nn.Module, alone: float, together: float, spread: float) -> Cluster:
    """Measures links, and describes the machines; all ranks call it together.

    Args:
        rank: This rank.
        model: Whose gradients are sent.
        alone: Seconds of the passes of one rank that computes alone.
        together: Seconds of the same passes while all ranks compute.
        spread: Standard deviation of the time that a rank computes in a step, relative to its mean.
    """
    everyone, device, world = rank.runtime.communicator(), rank.runtime.device, rank.world
    most = min(max(sum(p.numel() * p.element_size() for p in model.parameters()), 2**20), _MOST_BYTES)
    on_machine = rank.per_machine
    curve = slowdown_curve(alone, together, on_machine, processors()) if on_machine > 1 else ()
    # As much longer takes a processor that others use too, so much more of its time was measured.
    busy = curve[min(on_machine, processors()) - 1] if curve else 1.0
    within, between = _links(rank, most, busy)
    scatters = gathers = messages = sockets = bucket = cost = None
    if world.size > 1:
        # As a run measures it to choose the sizes of its buckets.
        cost = BucketSizing((None,) * 3, everyone, everyone, device, gradient_bytes_of(model)).cost
        if rank.hosts > 1 and rank.per_host == 1:
            bucket = measure_token_bucket(everyone, device, between)
            scatters, gathers = (
                Link.of_rounds(_points(_measured_link(everyone, device, most, kind), kind, busy), world.size - 1)
                for kind in ("reduce_scatter", "all_gather")
            )
        if rank.per_host > 1:
            messages = _message_link(everyone, device)
        sockets = measure_sockets(everyone, world, device, rank.runtime.config.runtime.setup_timeout_seconds)
    return Cluster(
        rank.hosts,
        rank.per_host,
        within,
        between,
        slowdown=curve,
        hosts_per_machine=rank.hosts // rank.machines,
        spread=spread,
        scatters=scatters,
        gathers=gathers,
        messages=messages,
        sockets=sockets,
        token_bucket=bucket,
        all_reduce_cost=cost,
    )


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _message_link(everyone: Communicator, device: torch.device) -> Link:
    """Messages between the first two ranks."""
    own = torch.tensor(measure_point_to_point(everyone, device), dtype=torch.float64, device=device)
    latency, per_byte = (everyone.all_reduce(own, "max") / 1000).tolist()
    return Link.of(latency, 1 / max(per_byte, 1e-12))


def _links(rank: Rank, most: int, busy: float) -> tuple[Link, Link]:
    """Links within a host and between hosts.

    Args:
        rank: This rank.
        most: Bytes of the largest message.
        busy: Factor by which computation takes longer while all processors compute.
    """
    everyone, device, size = rank.runtime.communicator(), rank.runtime.device, rank.world.size
    if size == 1:
        return _SHARED_MEMORY, _SHARED_MEMORY
    if rank.hosts == 1 or rank.per_host == 1:
        link = _link_of(_measured_link(everyone, device, most), size, busy)
        return (link, link) if rank.hosts == 1 else (_SHARED_MEMORY, link)
    mesh = rank.runtime.mesh({"host": rank.hosts, "local": rank.per_host})
    assert mesh is not None, "several ranks"
    within = _measured_link(Communicator(mesh.get_group("local")), device, most)
    everyone.barrier()
    between = within
    if rank.world.local_rank == 0:
        between = _measured_link(Communicator(mesh.get_group("host")), device, most)
    everyone.barrier()
    return _link_of(within, rank.per_host, busy), _link_of(between, rank.hosts, busy)


def _measured_link(group: Communicator, device: torch.device, most: int, kind: str = "all_reduce") -> LinkModel:
    """Times of collectives up to so many bytes; all ranks of the group call it together."""
    return measure_link(group, device, most, kinds=(kind,), max_seconds=_LINK_SECONDS, repeats=_LINK_REPEATS)


def _link_of(model: LinkModel, ranks: int, busy: float) -> Link:
    return Link.of_rounds(_points(model, "all_reduce", busy), 2 * (ranks - 1))


def _points(model: LinkModel, kind: str, busy: float) -> list[LinkPoint]:
    return [LinkPoint(sample.sent, sample.seconds, sample.processor_seconds / busy) for sample in model.samples(kind)]
