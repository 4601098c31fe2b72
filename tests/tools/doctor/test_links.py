"""Measuring a link, here over the loopback."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import pytest

from distrain.tools.doctor import links
from distrain.tools.doctor.links import LinkMeasurement, LinkServer


@pytest.fixture
def server() -> Iterator[LinkServer]:
    link_server = LinkServer()
    yield link_server
    link_server.close()


def test_latency_bandwidth_and_clock_are_measured(server: LinkServer) -> None:
    link = links.measure_host_link(0, 1, ["127.0.0.1"], server.port, server.token, bandwidth=True)
    assert link.errors == {}
    assert link.latency is not None
    assert 0 < link.latency < 0.05
    assert link.sent is not None
    assert link.received is not None
    # Bounds that any loopback is far from.
    assert 1e7 < link.sent < 1e12
    assert 1e7 < link.received < 1e12
    assert link.skew is not None
    assert abs(link.skew) < 0.05


def test_clock_offset_of_the_other_host_is_measured(server: LinkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ends read the same clock here, and the measuring end always reads it first.
    readings = itertools.cycle([1000.0, 1030.0])
    monkeypatch.setattr("distrain.tools.doctor.links.time.time", lambda: next(readings))
    link = links.measure_host_link(0, 1, ["127.0.0.1"], server.port, server.token, bandwidth=False)
    assert link.skew == pytest.approx(30, abs=0.05)
    assert link.sent is None


def test_address_that_refuses_is_reported(server: LinkServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    assert closed != server.port
    link = links.measure_host_link(0, 1, ["", "127.0.0.1"], closed, server.token, bandwidth=True)
    assert link == LinkMeasurement(0, 1, {"127.0.0.1": "refused: nobody listens there, or a firewall rejects"})


def test_client_without_the_token_is_rejected(server: LinkServer) -> None:
    link = links.measure_host_link(0, 1, ["127.0.0.1"], server.port, "0" * len(server.token), bandwidth=False)
    assert link.errors == {"127.0.0.1": "another program answers at this address"}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_each_pair_is_measured_once_and_no_host_twice_in_a_round(count: int) -> None:
    hosts = [3 * number for number in range(count)]
    rounds = links.pairing_rounds(hosts)
    for pairs in rounds:
        members = list(itertools.chain(*pairs))
        assert len(members) == len(set(members))
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(hosts, 2))


def test_rate_is_measured_in_the_second_half_of_a_transfer() -> None:
    # A burst of 1 MB, as a token bucket allows, then 1 kB every 10 ms.
    points = [(0.0, 1_000_000)] + [(0.01 * number, 1_000_000 + 1000 * number) for number in range(1, 41)]
    assert links.steady_rate(points) == pytest.approx(100_000)
    assert links.steady_rate([(0.0, 10), (1.0, 30)]) == 20
    assert links.steady_rate([(0.0, 10)]) == 0
