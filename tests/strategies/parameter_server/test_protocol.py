"""Frames: what was sent arrives, and what was not expected is refused before memory is taken for it."""

from __future__ import annotations

import json
import struct
import threading
from typing import Any

import pytest
import torch

from distrain.strategies.parameter_server.protocol import LARGEST_META, Frame, Kind, ProtocolError
from tests.strategies.parameter_server.helpers import pair

HEADER = struct.Struct("!4sBxxxIQ")


def test_a_frame_arrives_as_it_was_sent() -> None:
    body = torch.arange(10, dtype=torch.int32).view(torch.uint8)
    with pair() as (near, far):
        near.send(Kind.PUSH, {"step": 3, "rate": 0.1})
        near.send(Kind.BUCKET, {"index": 0}, body)
        frame = far.receive(Kind.PUSH, Kind.PULL)
        assert (frame.whole("step"), frame.real("rate"), frame.size) == (3, 0.1, 0)
        assert torch.equal(far.read(far.receive(Kind.BUCKET), 40), body)


def test_a_frame_larger_than_any_buffer_arrives() -> None:
    body = torch.arange(4_000_000, dtype=torch.int32).view(torch.uint8)
    with pair() as (near, far):
        sender = threading.Thread(target=near.send, args=(Kind.PARAMETERS, {"version": 1}, body))
        sender.start()
        room = torch.zeros_like(body)
        far.read_into(far.receive(Kind.PARAMETERS), room)
        sender.join()
        assert torch.equal(room, body)


@pytest.mark.parametrize("size", [39, 41, 1 << 60])
def test_bytes_of_another_number_than_expected_are_not_read(size: int) -> None:
    with pair() as (near, far):
        near.socket.sendall(HEADER.pack(b"dst1", Kind.BUCKET, 0, size))
        frame = far.receive(Kind.BUCKET)
        with pytest.raises(ProtocolError, match=f"BUCKET frame of the worker: {size} bytes, 40 were expected"):
            far.read(frame, 40)


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (HEADER.pack(b"HTTP", Kind.PUSH, 0, 0), "sent something that is no frame"),
        (HEADER.pack(b"dst1", 99, 0, 0), "sent something that is no frame"),
        (HEADER.pack(b"dst1", Kind.HELLO, 0, 0), "sent HELLO, not PUSH or PULL"),
        (HEADER.pack(b"dst1", Kind.PUSH, LARGEST_META + 1, 0), f"{LARGEST_META + 1} bytes of JSON"),
        (HEADER.pack(b"dst1", Kind.PUSH, 4, 0) + b"{nix", "no JSON"),
        (HEADER.pack(b"dst1", Kind.PUSH, 2, 0) + b"[]", "its JSON is no object"),
        (HEADER.pack(b"dst1", Kind.PUSH, 100_000, 0) + b"[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_expected_frame_is_refused(sent: bytes, problem: str) -> None:
    with pair() as (near, far):
        near.socket.sendall(sent)
        with pytest.raises(ProtocolError, match=problem):
            far.receive(Kind.PUSH, Kind.PULL)


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, [1]])
def test_a_number_is_checked(value: Any) -> None:
    frame = Frame(Kind.PUSH, json.loads(json.dumps({"step": value})), 0, "somebody")
    with pytest.raises(ProtocolError, match="PUSH frame of somebody: step is"):
        frame.whole("step")
    if not isinstance(value, float) and value != -1:
        with pytest.raises(ProtocolError):
            frame.real("step")
    if value != "1":
        with pytest.raises(ProtocolError):
            frame.text("step")


def test_an_end_in_the_middle_of_a_frame_is_an_error() -> None:
    with pair() as (near, far):
        near.socket.sendall(HEADER.pack(b"dst1", Kind.PUSH, 10, 0) + b"{")
        near.cut()
        with pytest.raises(ConnectionError, match="the worker closed the connection"):
            far.receive(Kind.PUSH)


def test_a_cut_wakes_whoever_waits() -> None:
    with pair() as (_, far):
        threading.Timer(0.1, far.cut).start()
        with pytest.raises(ConnectionError):
            far.receive(Kind.PUSH)
