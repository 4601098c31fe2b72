"""Invalid messages from the network and invalid variables of a launcher are refused in one line."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import Any

import pytest
import torch

from distrain.communication.types import RankName
from distrain.runtime.world import World
from distrain.strategies.parameter_server.collectives import CollectiveServer
from distrain.strategies.parameter_server.connect import CHANNELS, Address, Listener, connect_to_server
from distrain.strategies.parameter_server.optimizer_wire import receive_optimizer_state
from distrain.strategies.parameter_server.protocol import Frame, FrameKind, ProtocolError
from tests.harness import HANG_SECONDS
from tests.security.helpers import (
    one_line_error,
)
from tests.strategies.parameter_server.helpers import connected_pair

HEADER = struct.Struct("!4sBxxxIQ")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        os.urandom(4096),
        HEADER.pack(b"dst1", FrameKind.HELLO, (1 << 32) - 1, 0),
        HEADER.pack(b"dst1", FrameKind.HELLO, 0, (1 << 64) - 1),
        HEADER.pack(b"dst1", FrameKind.HELLO, 4000, 0) + b"[" * 4000,
        HEADER.pack(b"dst1", FrameKind.HELLO, 17, 0) + b'{"token":"\\ud800"}'[:17],
        HEADER.pack(b"dst1", FrameKind.HELLO, 18, 0) + b'{"token":"\\ud800"}',
        HEADER.pack(b"dst1", FrameKind.HELLO, 13, 0) + b'{"token":[1]}',
        HEADER.pack(b"dst1", FrameKind.LOAD, 0, 8) + bytes(8),
        b"",
    ],
    ids=["http", "noise", "long", "large", "deep", "no JSON", "no text", "no string", "another kind", "nothing"],
)
def test_client_without_the_token_is_refused(sent: bytes) -> None:
    listener = Listener(Address("127.0.0.1", "127.0.0.1", socket.AF_INET))
    answers: list[bytes] = []

    def come() -> None:
        with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
            try:
                stranger.sendall(sent)
                stranger.shutdown(socket.SHUT_WR)
                answers.append(stranger.recv(100))
            except OSError:
                # Disconnected before everything was sent.
                answers.append(b"")
        for connection in connect_to_server(
            RankName(1, "there"), "127.0.0.1", listener.port, listener.token, 0, HANG_SECONDS
        ).values():
            connection.close()

    visitor = threading.Thread(target=come)
    visitor.start()
    connections = listener.accept_workers([RankName(0, "here")], HANG_SECONDS)
    visitor.join()
    assert answers == [b""]
    assert sorted(channel for _, channel in connections) == sorted(CHANNELS)
    for connection in connections.values():
        connection.close()


def test_client_that_sends_a_pickle_is_refused(planted: bytes) -> None:
    test_client_without_the_token_is_refused(planted)


@pytest.mark.parametrize(
    "meta",
    [
        {"operation": "broadcast", "dtype": "float32", "source": [0]},
        {"operation": "broadcast", "dtype": "float32"},
        {"operation": "accumulate", "dtype": "int64", "name": {}, "wait": True},
        {"operation": ["sum"], "dtype": "float32"},
        {"operation": "sum", "dtype": "load"},
        {"operation": "sum", "dtype": {}},
    ],
)
def test_worker_that_sends_an_invalid_collective_is_named(meta: dict[str, Any]) -> None:
    server = CollectiveServer([0], threading.Condition(threading.RLock()), 100)
    frame = Frame(FrameKind.COLLECTIVE, meta, 0, "rank 0 on here")
    empty = torch.empty(0, dtype=torch.uint8)
    message = one_line_error(lambda: server.join(0, frame, empty, lambda done, awaited: None), ProtocolError)
    assert message.startswith("COLLECTIVE frame of rank 0 on here: ")


@pytest.mark.parametrize("entry", [[["a"], "float32", []], ["a/b", ["float32"], []], ["a/b", "float32", [1 << 60]], {}])
def test_optimizer_state_of_the_wrong_kind_is_refused(entry: object) -> None:
    with connected_pair() as (server, worker):
        worker.send(FrameKind.STATE, {"tensors": [entry], "scalars": {}})
        parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
        assert "STATE frame of the server" in one_line_error(
            lambda: receive_optimizer_state(server, parameters), ProtocolError
        )


@pytest.mark.parametrize("value", ["²", "-1", "1e3", "", " 1", "9" * 5000])
def test_launcher_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert one_line_error(World.from_environment).startswith("WORLD_SIZE=")
