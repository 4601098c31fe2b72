"""Frames arrive as sent, and unexpected ones are refused before memory is allocated for them."""

from __future__ import annotations

import json
import struct
import threading
from typing import Any

import pytest
import torch

from distrain.strategies.parameter_server.protocol import MAX_JSON_BYTES, Frame, FrameKind, ProtocolError
from tests.strategies.parameter_server.helpers import connected_pair

HEADER = struct.Struct("!4sBxxxIQ")


def test_a_frame_arrives_as_it_was_sent() -> None:
    body = torch.arange(10, dtype=torch.int32).view(torch.uint8)
    with connected_pair() as (near, far):
        near.send(FrameKind.PUSH, {"step": 3, "learning_rate": 0.1})
        near.send(FrameKind.BUCKET, {"index": 0}, body)
        frame = far.receive(FrameKind.PUSH, FrameKind.PULL)
        assert (frame.integer("step"), frame.number("learning_rate"), frame.size) == (3, 0.1, 0)
        assert torch.equal(far.read_body(far.receive(FrameKind.BUCKET), 40), body)


def test_a_frame_larger_than_the_socket_buffers_arrives() -> None:
    body = torch.arange(4_000_000, dtype=torch.int32).view(torch.uint8)
    with connected_pair() as (near, far):
        sender = threading.Thread(target=near.send, args=(FrameKind.PARAMETERS, {"version": 1}, body))
        sender.start()
        buffer = torch.zeros_like(body)
        far.read_body_into(far.receive(FrameKind.PARAMETERS), buffer)
        sender.join()
        assert torch.equal(buffer, body)


@pytest.mark.parametrize("size", [39, 41, 1 << 60])
def test_a_body_of_unexpected_size_is_not_read(size: int) -> None:
    with connected_pair() as (near, far):
        near.socket.sendall(HEADER.pack(b"dst1", FrameKind.BUCKET, 0, size))
        frame = far.receive(FrameKind.BUCKET)
        with pytest.raises(ProtocolError, match=f"BUCKET frame of the worker: {size} bytes, 40 were expected"):
            far.read_body(frame, 40)


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (HEADER.pack(b"HTTP", FrameKind.PUSH, 0, 0), "sent something that is not a frame"),
        (HEADER.pack(b"dst1", 99, 0, 0), "sent something that is not a frame"),
        (HEADER.pack(b"dst1", FrameKind.HELLO, 0, 0), "sent HELLO, not PUSH or PULL"),
        (HEADER.pack(b"dst1", FrameKind.PUSH, MAX_JSON_BYTES + 1, 0), f"{MAX_JSON_BYTES + 1} bytes of JSON"),
        (HEADER.pack(b"dst1", FrameKind.PUSH, 4, 0) + b"{nix", "invalid JSON"),
        (HEADER.pack(b"dst1", FrameKind.PUSH, 2, 0) + b"[]", "its JSON is not an object"),
        (HEADER.pack(b"dst1", FrameKind.PUSH, 100_000, 0) + b"[" * 100_000, "invalid JSON"),
    ],
)
def test_an_unexpected_or_invalid_frame_is_refused(sent: bytes, problem: str) -> None:
    with connected_pair() as (near, far):
        near.socket.sendall(sent)
        with pytest.raises(ProtocolError, match=problem):
            far.receive(FrameKind.PUSH, FrameKind.PULL)


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, [1]])
def test_a_field_of_the_wrong_type_is_refused(value: Any) -> None:
    frame = Frame(FrameKind.PUSH, json.loads(json.dumps({"step": value})), 0, "somebody")
    with pytest.raises(ProtocolError, match="PUSH frame of somebody: step is"):
        frame.integer("step")
    if not isinstance(value, float) and value != -1:
        with pytest.raises(ProtocolError):
            frame.number("step")
    if value != "1":
        with pytest.raises(ProtocolError):
            frame.string("step")


def test_a_connection_that_ends_within_a_frame_is_an_error() -> None:
    with connected_pair() as (near, far):
        near.socket.sendall(HEADER.pack(b"dst1", FrameKind.PUSH, 10, 0) + b"{")
        near.shut_down()
        with pytest.raises(ConnectionError, match="the worker closed the connection"):
            far.receive(FrameKind.PUSH)


def test_shutting_down_wakes_a_waiting_thread() -> None:
    with connected_pair() as (_, far):
        threading.Timer(0.1, far.shut_down).start()
        with pytest.raises(ConnectionError):
            far.receive(FrameKind.PUSH)
