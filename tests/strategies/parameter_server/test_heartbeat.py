"""A peer that ends, stops sending heartbeats, or reports a failure is noticed, with the right reason."""

from __future__ import annotations

import threading

import pytest

from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.strategies.parameter_server.heartbeat import Farewell, HeartbeatMonitor, failure_reason
from distrain.strategies.parameter_server.protocol import Connection, FrameKind
from tests.harness import HANG_SECONDS
from tests.strategies.parameter_server.helpers import connected_pair


class Recorder:
    """A heartbeat monitor that records the farewell."""

    def __init__(self, connection: Connection, timeout: float = 20) -> None:
        self.farewells: list[Farewell] = []
        self._ended = threading.Event()
        self.monitor = HeartbeatMonitor(connection, timeout, self._record)

    def _record(self, farewell: Farewell) -> None:
        self.farewells.append(farewell)
        self._ended.set()

    def wait(self) -> Farewell:
        """Waits for the farewell and returns it."""
        assert self._ended.wait(HANG_SECONDS)
        assert len(self.farewells) == 1
        assert self.monitor.wait_for_farewell(0) == self.farewells[0]
        return self.farewells[0]


def test_heartbeats_keep_two_living_peers_connected_beyond_the_timeout() -> None:
    with connected_pair() as (near, far):
        first, second = Recorder(near, 1), Recorder(far, 1)
        threading.Event().wait(1.5)
        assert first.farewells == second.farewells == []
        first.monitor.leave()
        assert second.wait() == Farewell("it finished", finished=True)
        assert first.wait() == Farewell("it finished", finished=True)


def test_a_connection_that_ends_is_noticed_at_once() -> None:
    with connected_pair() as (near, far):
        recorder = Recorder(near)
        far.shut_down()
        assert recorder.wait() == Farewell("the connection broke off")


def test_missing_heartbeats_are_noticed_in_time() -> None:
    with connected_pair() as (near, _):
        assert Recorder(near, 0.3).wait() == Farewell("no sign of life for 0.3 s")


def test_a_peer_that_stops_within_a_frame_is_noticed_in_time() -> None:
    with connected_pair() as (near, far):
        recorder = Recorder(near, 0.3)
        far.socket.sendall(b"dst")
        assert recorder.wait() == Farewell("no sign of life for 0.3 s")


def test_a_peer_reports_its_failure_and_the_culprit() -> None:
    with connected_pair() as (near, far):
        recorder, other = Recorder(near), Recorder(far)
        other.monitor.report_failure("ValueError: wrong", culprit=RankName(2, "elsewhere"))
        other.monitor.shut_down()
        assert recorder.wait() == Farewell("ValueError: wrong", RankName(2, "elsewhere"))
        other.wait()


def test_an_expelled_worker_is_told_so() -> None:
    with connected_pair() as (near, far):
        recorder, other = Recorder(near), Recorder(far)
        other.monitor.report_failure("silent", expelled=True)
        assert recorder.wait() == Farewell("silent", expelled=True)
        other.monitor.wait_for_farewell(0)


def test_an_unexpected_frame_ends_the_connection() -> None:
    with connected_pair() as (near, far):
        recorder = Recorder(near)
        far.send(FrameKind.PUSH)
        assert recorder.wait() == Farewell("the server sent PUSH, not HEARTBEAT or FAILURE or FAREWELL")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("wrong\nwith more"), ("ValueError: wrong", None)),
        (KeyboardInterrupt(), ("KeyboardInterrupt", None)),
        (PeerLost(3, "there", "silent"), ("silent", RankName(3, "there"))),
    ],
)
def test_the_reported_reason_names_the_error_and_the_culprit(
    error: BaseException, expected: tuple[str, RankName | None]
) -> None:
    assert failure_reason(error) == expected
