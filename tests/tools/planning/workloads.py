"""A training with round numbers, for calculations by hand."""

from __future__ import annotations

from distrain.tools.planning.cluster import Accelerator, Cluster, Link
from distrain.tools.planning.workload import BlockProfile, Workload

MB = 10**6


def workload(batch_size: int = 64, blocks: int = 4, batchnorms: int = 0) -> Workload:
    """Each block: 1 ms forward and 2 ms backward a sample, gradients of 10 MB, 1 MB of activations a sample."""
    profiles = tuple(
        BlockProfile(
            f"block{index}",
            (10 * MB,),
            {1: 1e-3, 10: 10e-3},
            {1: 2e-3, 10: 20e-3},
            activation_bytes=MB,
            output_bytes=0.1 * MB,
            flops=1e9,
            batchnorms=batchnorms,
        )
        for index in range(blocks)
    )
    return Workload(profiles, batch_size, {1: 0.0, 10: 0.0}, update_seconds=0.0, optimizer_bytes=blocks * 20.0 * MB)


def cluster(hosts: int, ranks_per_host: int = 1, latency: float = 0.0, bytes_per_second: float = 100.0 * MB) -> Cluster:
    """Hosts whose ranks talk to each other in no time, behind a network."""
    return Cluster(hosts, ranks_per_host, Link.of(0.0, 1e15), Link.of(latency, bytes_per_second))


ACCELERATOR = Accelerator(flops=100e12, bytes_per_second=2e12, launch_seconds=0.0)
