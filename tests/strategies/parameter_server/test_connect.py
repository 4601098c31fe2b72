"""A server accepts each connection of this run's workers once and nothing else, and listens at the right address."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from distrain.communication.types import RankName
from distrain.strategies.parameter_server import connect
from distrain.strategies.parameter_server.connect import Address, Listener, connect_to_server, listen_address
from distrain.strategies.parameter_server.protocol import Connection, FrameKind
from tests.harness import HANG_SECONDS

SERVER = RankName(1, "there")
LOOPBACK = Address("127.0.0.1", "127.0.0.1", socket.AF_INET)


def accepted(
    listener: Listener, connect_clients: Callable[[], Any], seconds: float = HANG_SECONDS
) -> dict[tuple[int, str], Connection]:
    """The connections that a listener for worker 0 accepts while clients connect."""
    thread = threading.Thread(target=connect_clients)
    thread.start()
    try:
        return listener.accept_workers([RankName(0, "here")], seconds)
    finally:
        thread.join()


def test_a_worker_opens_all_its_connections_and_then_the_server_stops_listening() -> None:
    listener = Listener(LOOPBACK)
    client_side: dict[str, Connection] = {}
    server_side = accepted(
        listener,
        lambda: client_side.update(
            connect_to_server(SERVER, "127.0.0.1", listener.port, listener.token, 0, HANG_SECONDS)
        ),
    )
    assert set(server_side) == {(0, channel) for channel in connect.CHANNELS}
    client_side["requests"].send(FrameKind.STATISTICS)
    assert server_side[0, "requests"].receive(FrameKind.STATISTICS).peer == "rank 0 on here"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.port), timeout=HANG_SECONDS)
    for connection in [*client_side.values(), *server_side.values()]:
        connection.close()


@pytest.mark.parametrize(
    "hello",
    [
        {"token": "guessed", "rank": 0, "channel": "parameters"},
        {"token": None, "rank": 0, "channel": "parameters"},
        {"token": "é", "rank": 0, "channel": "parameters"},
        {"rank": 5},
        {"channel": "other"},
        {"filler": "x" * 5000},
    ],
    ids=["wrong token", "no token", "token not in ASCII", "another rank", "another channel", "too long"],
)
def test_an_unknown_client_is_refused_and_does_not_block_others(hello: dict[str, Any]) -> None:
    listener = Listener(LOOPBACK)
    refused: list[bool] = []

    def connect_clients() -> None:
        with (
            socket.create_connection(("127.0.0.1", listener.port)) as sock,
            socket.create_connection(("127.0.0.1", listener.port)),  # sends nothing
        ):
            Connection(sock, "a server").send(
                FrameKind.HELLO, {"token": listener.token, "rank": 0, "channel": "parameters", **hello}
            )
            try:
                refused.append(sock.recv(1) == b"")
            except ConnectionResetError:
                refused.append(True)
            for connection in connect_to_server(
                SERVER, "127.0.0.1", listener.port, listener.token, 0, HANG_SECONDS
            ).values():
                connection.close()

    server_side = accepted(listener, connect_clients)
    assert refused == [True]
    assert len(server_side) == len(connect.CHANNELS)
    for connection in server_side.values():
        connection.close()


def test_each_connection_is_accepted_once() -> None:
    listener = Listener(LOOPBACK)
    opened_channels: list[str] = []

    def connect_second_client() -> None:
        client_side = connect_to_server(SERVER, "127.0.0.1", listener.port, listener.token, 0, HANG_SECONDS)
        opened_channels.extend(client_side)
        for connection in client_side.values():
            connection.close()

    def connect_clients() -> None:
        Connection(first, "a server").receive(FrameKind.WELCOME)
        with pytest.raises(RuntimeError, match="no connection to the server, rank 1 on there"):
            connect_second_client()

    # It asks before the server's time begins to run.
    with socket.create_connection(("127.0.0.1", listener.port)) as first:
        Connection(first, "a server").send(
            FrameKind.HELLO, {"token": listener.token, "rank": 0, "channel": "parameters"}
        )
        with pytest.raises(RuntimeError, match="rank 0 on here did not connect within 1 s"):
            accepted(listener, connect_clients, seconds=1)
    assert opened_channels == []


def test_a_server_listens_on_the_route_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert listen_address(["here", "here"]) == LOOPBACK


def test_the_masters_host_advertises_its_name_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    address = listen_address(["here", "there"])
    assert (address.bind, address.advertise) == ("", "localhost")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for an interface's address")
def test_a_server_listens_on_the_interface_of_gloo_socket_ifname(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert listen_address(["here", "there"]) == LOOPBACK
