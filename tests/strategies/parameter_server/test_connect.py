"""Who may come in: ranks of this run, by the token, each connection once; and where servers listen."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from distrain.communication.types import RankName
from distrain.strategies.parameter_server import connect
from distrain.strategies.parameter_server.connect import Address, Door, enter, own_address
from distrain.strategies.parameter_server.protocol import Connection, Kind

SERVER = RankName(1, "there")
LOOPBACK = Address("127.0.0.1", "127.0.0.1", socket.AF_INET)


def admitted(door: Door, comes: Callable[[], Any], seconds: float = 10) -> dict[tuple[int, str], Connection]:
    """Whom a door for worker 0 admits while something happens."""
    visitor = threading.Thread(target=comes)
    visitor.start()
    try:
        return door.admit([RankName(0, "here")], seconds)
    finally:
        visitor.join()


def test_a_worker_comes_in_with_all_its_connections() -> None:
    door = Door(LOOPBACK)
    opened: dict[str, Connection] = {}
    found = admitted(door, lambda: opened.update(enter(SERVER, "127.0.0.1", door.port, door.token, 0, 10)))
    assert set(found) == {(0, channel) for channel in connect.CHANNELS}
    opened["talk"].send(Kind.TELL)
    assert found[0, "talk"].receive(Kind.TELL).peer == "rank 0 on here"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", door.port), timeout=5)
    for connection in [*opened.values(), *found.values()]:
        connection.close()


@pytest.mark.parametrize(
    "hello",
    [
        {"token": "guessed", "rank": 0, "channel": "work"},
        {"token": None, "rank": 0, "channel": "work"},
        {"token": "é", "rank": 0, "channel": "work"},
        {"rank": 5},
        {"channel": "other"},
        {"filler": "x" * 5000},
    ],
    ids=["wrong token", "no token", "no ASCII", "another rank", "another channel", "too long"],
)
def test_a_stranger_is_refused_and_keeps_nobody_waiting(hello: dict[str, Any]) -> None:
    door = Door(LOOPBACK)
    refused: list[bool] = []

    def stranger() -> None:
        with (
            socket.create_connection(("127.0.0.1", door.port)) as sock,
            socket.create_connection(("127.0.0.1", door.port)),  # says nothing
        ):
            Connection(sock, "a server").send(Kind.HELLO, {"token": door.token, "rank": 0, "channel": "work", **hello})
            try:
                refused.append(sock.recv(1) == b"")
            except ConnectionResetError:
                refused.append(True)
            for connection in enter(SERVER, "127.0.0.1", door.port, door.token, 0, 10).values():
                connection.close()

    found = admitted(door, stranger)
    assert refused == [True]
    assert len(found) == len(connect.CHANNELS)
    for connection in found.values():
        connection.close()


def test_a_connection_is_admitted_once() -> None:
    door = Door(LOOPBACK)
    seen: list[str] = []

    def twice() -> None:
        opened = enter(SERVER, "127.0.0.1", door.port, door.token, 0, 10)
        seen.extend(opened)
        for connection in opened.values():
            connection.close()

    def comes() -> None:
        with socket.create_connection(("127.0.0.1", door.port)) as first:
            Connection(first, "a server").send(Kind.HELLO, {"token": door.token, "rank": 0, "channel": "work"})
            Connection(first, "a server").receive(Kind.WELCOME)
            with pytest.raises(RuntimeError, match="no connection to the server, rank 1 on there"):
                twice()

    with pytest.raises(RuntimeError, match="rank 0 on here did not connect within 1 s"):
        admitted(door, comes, seconds=1)
    assert seen == []


def test_a_server_listens_where_the_master_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address(["here", "here"]) == LOOPBACK


def test_on_the_masters_host_the_others_go_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    found = own_address(["here", "there"])
    assert (found.bind, found.publish) == ("", "localhost")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for an interface's address")
def test_a_server_listens_at_the_interface_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert own_address(["here", "there"]) == LOOPBACK
