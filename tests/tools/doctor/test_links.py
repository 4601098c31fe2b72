"""Measuring a link: over the loopback, which is there everywhere."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import pytest

from distrain.tools.doctor import links
from distrain.tools.doctor.links import Listener, Pair


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def test_measures_latency_both_directions_and_the_clock(listener: Listener) -> None:
    pair = links.measure(0, 1, ["127.0.0.1"], listener.port, listener.token, flow=True)
    assert pair.errors == {}
    assert pair.latency is not None
    assert 0 < pair.latency < 0.05
    assert pair.sent is not None
    assert pair.received is not None
    # The loopback is far from both.
    assert 1e7 < pair.sent < 1e12
    assert 1e7 < pair.received < 1e12
    assert pair.skew is not None
    assert abs(pair.skew) < 0.05


def test_clock_of_the_other_is_ahead(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ends ask the same clock here, and this one always first.
    readings = itertools.cycle([1000.0, 1030.0])
    monkeypatch.setattr("distrain.tools.doctor.links.time.time", lambda: next(readings))
    pair = links.measure(0, 1, ["127.0.0.1"], listener.port, listener.token, flow=False)
    assert pair.skew == pytest.approx(30, abs=0.05)
    assert pair.sent is None


def test_address_that_refuses_is_named_and_the_next_one_tried(listener: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    assert closed != listener.port
    pair = links.measure(0, 1, ["", "127.0.0.1"], closed, listener.token, flow=True)
    assert pair == Pair(0, 1, {"127.0.0.1": "refused: nobody listens there, or a firewall rejects"})


def test_stranger_gets_nothing(listener: Listener) -> None:
    pair = links.measure(0, 1, ["127.0.0.1"], listener.port, "0" * len(listener.token), flow=False)
    assert pair.errors == {"127.0.0.1": "somebody else answers at this address"}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_each_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    hosts = [3 * number for number in range(count)]
    found = links.rounds(hosts)
    for games in found:
        players = list(itertools.chain(*games))
        assert len(players) == len(set(players))
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(hosts, 2))


def test_rate_is_that_of_the_second_half() -> None:
    # A bucket's burst of 1 MB at once, then 1 kB every 10 ms.
    points = [(0.0, 1_000_000)] + [(0.01 * number, 1_000_000 + 1000 * number) for number in range(1, 41)]
    assert links.steady_rate(points) == pytest.approx(100_000)
    assert links.steady_rate([(0.0, 10), (1.0, 30)]) == 20
    assert links.steady_rate([(0.0, 10)]) == 0
