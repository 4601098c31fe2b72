"""Links, collectives and machines by formulas that are calculated here by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics

import pytest

from distrain.tools.planning.cluster import Cluster, Link, LinkPoint, expected_maximum, slowdown_curve
from distrain.tools.planning.network import Group, Network
from tests.tools.planning.workloads import MB, cluster


def test_a_link_is_linear_between_and_beyond_its_points() -> None:
    link = Link((LinkPoint(100, 1.0, 0.1), LinkPoint(200, 3.0, 0.2), LinkPoint(400, 4.0, 0.4)))
    assert [link.seconds(size) for size in (0, 100, 150, 300, 800)] == pytest.approx([1.0, 1.0, 2.0, 3.5, 6.0])
    assert link.processor_seconds(800) == pytest.approx(0.8)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_ring_among_the_ranks_that_were_measured_takes_the_measured_time(ranks: int) -> None:
    times = {0.0: 1.0e-3, 5.0 * MB: 60e-3}
    link = Link.of_rounds([LinkPoint(sent, seconds) for sent, seconds in times.items()], 2 * (ranks - 1))
    network = Network(Cluster(ranks, 1, link, link))
    for sent, seconds in times.items():
        size = sent * ranks / (2 * (ranks - 1))
        assert network.all_reduce(size, network.group(ranks)).seconds == pytest.approx(seconds)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather"])
def test_parts_among_the_ranks_that_were_measured_take_the_measured_time(kind: str, ranks: int) -> None:
    times = {0.0: 3.0e-3, 5.0 * MB: 60e-3}
    link = Link.of_rounds([LinkPoint(sent, seconds) for sent, seconds in times.items()], ranks - 1)
    here = dataclasses.replace(cluster(ranks, latency=1e-3), scatters=link, gathers=link)

    def seconds_of(sent: float, network: Network) -> float:
        group = network.group(ranks)
        if kind == "all_gather":
            return network.all_gather(sent / (ranks - 1), group).seconds
        return network.reduce_scatter(sent * ranks / (ranks - 1), group).seconds

    for sent, seconds in times.items():
        assert seconds_of(sent, Network(here)) == pytest.approx(seconds)
    # Twice the latency: of each of the messages.
    assert seconds_of(0, Network(here, latency_factor=2.0)) == pytest.approx(6e-3)


def test_a_disturbed_small_message_does_not_slow_larger_ones() -> None:
    link = Link.of_rounds([LinkPoint(0, 0.1, 0.03), LinkPoint(100, 0.04, 0.01), LinkPoint(200, 0.06, 0.02)], 2)
    assert [link.seconds(size) for size in (0, 100, 200)] == pytest.approx([0.02, 0.02, 0.04])
    assert [link.processor_seconds(size) for size in (0, 100, 200)] == pytest.approx([0.01, 0.01, 0.02])


def test_a_ring_sends_each_part_twice_around() -> None:
    network = Network(cluster(5, latency=1e-3, bytes_per_second=10 * MB))
    duration = network.all_reduce(10 * MB, network.group(5))
    assert duration.sent == pytest.approx(16 * MB)
    assert duration.seconds == pytest.approx(8 * 1e-3 + 1.6)


def test_a_host_sends_as_much_as_one_rank() -> None:
    network = Network(cluster(4, 8, bytes_per_second=10 * MB))
    assert network.all_reduce(10 * MB, network.group(32)).seconds == pytest.approx(2 * 3 / 4, rel=1e-6)


def test_small_messages_take_a_tree_among_many_devices() -> None:
    network = Network(cluster(64, 8, latency=10e-6, bytes_per_second=10_000 * MB), "flat")
    group = network.group(512)
    # 2 log2(512) messages against 2 (512 - 1).
    assert network.all_reduce(8, group).seconds == pytest.approx(18 * 10e-6, rel=1e-3)
    large = network.all_reduce(1e11, group)
    assert large.seconds == pytest.approx(2 * 511 / 512 * 10 + 1022 * 10e-6, rel=1e-6)


def test_replicas_of_pipelines_share_the_network_of_their_hosts() -> None:
    network = Network(cluster(4, 4, bytes_per_second=10 * MB))
    # Pipelines of 4 ranks: one on each host. Each of the 4 groups of replicas has a rank on each host.
    group = network.group(4, stride=4)
    assert (group.hosts, group.per_host, group.sharing) == (4, 1, 4)
    alone = network.all_reduce(10 * MB, Group(4, 1))
    assert network.all_reduce(10 * MB, group).seconds == pytest.approx(4 * alone.seconds)


def test_sockets_within_a_host_say_nothing_of_those_between_hosts() -> None:
    fast = Link.of(0.0, 1e15)
    here = dataclasses.replace(cluster(1, 2, bytes_per_second=10 * MB), sockets=fast)
    assert here.with_hosts(1).sockets == fast
    assert Network(here.with_hosts(4)).to_server(10 * MB, 0, 7).seconds == pytest.approx(1)
    assert Network(here).to_server(10 * MB, 0, 1).seconds < 1e-6


def test_ranks_take_turns_on_too_few_processors() -> None:
    assert slowdown_curve(1.0, 2.4, 4, 2) == pytest.approx((1.0, 1.2, 1.8, 2.4))
    assert slowdown_curve(1.0, 1.3, 4, 8) == pytest.approx((1.0, 1.1, 1.2, 1.3))
    assert slowdown_curve(1.0, 0.9, 2, 2) == (1.0, 1.0)


def test_the_slowest_of_many_ranks() -> None:
    generator = random.Random(0)
    for ranks in (2, 8, 64):
        largest = statistics.mean(max(generator.gauss(0, 1) for _ in range(ranks)) for _ in range(4000))
        assert expected_maximum(ranks) == pytest.approx(largest, abs=0.05)
    assert expected_maximum(1) == 0
    rising = [expected_maximum(ranks) for ranks in (2, 4, 1024)]
    assert all(early < late for early, late in itertools.pairwise(rising))
