"""A worker reports the rank that it lost, and learns that it was excluded."""

from __future__ import annotations

import time

import pytest

from distrain.errors import PeerLost
from distrain.strategies.parameter_server.client import Expelled
from tests.strategies.parameter_server.helpers import running_server, server_policy


def test_a_worker_reports_which_server_it_lost() -> None:
    with running_server(2, server_policy()) as run:
        # It may only have been this worker's own connection.
        run.clients[1].abandon(PeerLost(7, "elsewhere", "silent"))
        run.push(0, 0.0)
        assert run.lost[0].loss_reason == "it lost rank 7 on elsewhere: silent"
        run.clients[0].abandon(PeerLost(7, "elsewhere", "silent"))
        run.join()
    (error,) = run.errors
    assert isinstance(error, PeerLost)
    assert (error.rank, error.host) == (7, "elsewhere")


def test_an_expelled_worker_is_told_so() -> None:
    with running_server(2, server_policy(heartbeat_timeout_seconds=2)) as run:
        # Sends no more heartbeats, as if the process were stopped.
        run.clients[1]._monitor._connection.send = lambda *_: None  # type: ignore[method-assign]
        while not run.lost:
            time.sleep(0.05)
        assert run.lost[0].loss_reason == "no sign of life for 2 s"
        with pytest.raises(Expelled, match=r"the server, rank 2 on here, excluded this worker: no sign of life"):
            run.push(1, 0.0)
        run.push(0, 0.25)
