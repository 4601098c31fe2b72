"""Tensors over TCP in frames of known kinds and checked sizes.

A frame is a header of fixed size, a JSON object, and bytes. Nothing is pickled, so nothing that a peer sends can run
code, and no memory is taken for bytes before their number was compared with what the receiver expects.

Sockets and not a process group, because a dead peer poisons a whole gloo group, and because they are faster: between
two processes of one host a round trip of 4 kB took 0.01 ms by socket and 0.1 to 2.9 ms by gloo's send and receive, one
of 490 kB 0.08 and 0.6 to 3.3 ms, one of 45 MB 61 to 99 and 62 to 87 ms (medians).
"""

from __future__ import annotations

import enum
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAGIC = b"dst1"
# Magic, kind, bytes of JSON, bytes after it.
_HEADER = struct.Struct("!4sBxxxIQ")
#: Longest JSON of a frame, in bytes; optimizer state names every parameter in it.
LARGEST_META = 1 << 24
#: Frames up to this size leave in one piece.
_SMALL = 1 << 16


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    WELCOME = 2
    PUSH = 3
    BUCKET = 4
    PULL = 5
    PARAMETERS = 6
    NORM = 7
    COLLECTIVE = 8
    RESULT = 9
    SEND = 10
    RECEIVE = 11
    TELL = 12
    STATE = 13
    LOAD = 14
    DONE = 15
    BEAT = 16
    NOTICE = 17
    BYE = 18


class ProtocolError(RuntimeError):
    """A peer sent what it must not send; the message says what and who."""


@dataclass(frozen=True)
class Frame:
    """A received frame, whose bytes are still to be read.

    Attributes:
        kind: What it is for.
        meta: Its JSON object.
        size: Bytes that follow.
        peer: Who sent it, for messages.
    """

    kind: Kind
    meta: dict[str, Any]
    size: int
    peer: str

    def whole(self, name: str) -> int:
        """A whole number of at least 0.

        Raises:
            ProtocolError: It is missing or something else; so do the other methods.
        """
        value = self.meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refuse(f"{name} is {value!r}, no whole number")
        return value

    def real(self, name: str) -> float:
        """A number, which may be infinite or NaN as gradients may."""
        value = self.meta.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(f"{name} is {value!r}, no number")
        return float(value)

    def text(self, name: str) -> str:
        """A string."""
        value = self.meta.get(name)
        if not isinstance(value, str):
            raise self.refuse(f"{name} is {value!r}, no text")
        return value

    def refuse(self, problem: str) -> ProtocolError:
        """What to raise about this frame."""
        return ProtocolError(f"{self.kind.name} frame of {self.peer}: {problem}")


class Connection:
    """One end of a TCP connection; several threads may send, one receives.

    Args:
        sock: Connected.
        peer: Who is at the other end, for messages.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket = sock
        self.peer = peer
        self._sending = threading.Lock()
        # A frame waits for an answer more often than for another frame.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: Kind, meta: Mapping[str, Any] | None = None, body: Tensor | None = None) -> None:
        """Sends a frame.

        Args:
            kind: What it is for.
            meta: What JSON can hold.
            body: uint8 ``[bytes]``, contiguous, on the CPU.

        Raises:
            OSError: The connection is gone.
        """
        text = json.dumps(meta).encode() if meta else b""
        size = 0 if body is None else body.numel()
        head = _HEADER.pack(_MAGIC, kind, len(text), size) + text
        with self._sending:
            if body is not None and size > _SMALL:
                self.socket.sendall(head)
                self.socket.sendall(body.numpy().data)
            else:
                self.socket.sendall(head if body is None else head + body.numpy().tobytes())

    def receive(self, *expected: Kind, largest_meta: int = LARGEST_META) -> Frame:
        """Waits for a frame of one of the expected kinds.

        Raises:
            ProtocolError: It is another kind, no frame, or its JSON is too long or none.
            OSError: The connection is gone.
        """
        magic, number, length, size = _HEADER.unpack(self._exactly(_HEADER.size))
        if magic != _MAGIC or number not in [*Kind]:
            raise ProtocolError(f"{self.peer} sent something that is no frame")
        kind = Kind(number)
        if kind not in expected:
            raise ProtocolError(f"{self.peer} sent {kind.name}, not {' or '.join(each.name for each in expected)}")
        if length > largest_meta:
            raise ProtocolError(f"{kind.name} frame of {self.peer}: {length} bytes of JSON, {largest_meta} are allowed")
        meta: Any = {}
        if length:
            try:
                meta = json.loads(bytes(self._exactly(length)))
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"{kind.name} frame of {self.peer}: no JSON ({error})") from error
        if not isinstance(meta, dict):
            raise ProtocolError(f"{kind.name} frame of {self.peer}: its JSON is no object")
        return Frame(kind, meta, size, self.peer)

    def read(self, frame: Frame, size: int) -> Tensor:
        """The bytes of a frame, uint8 ``[size]``.

        Raises:
            ProtocolError: It brings another number of bytes; none of them is read.
            OSError: The connection is gone.
        """
        if frame.size != size:
            raise frame.refuse(f"{frame.size} bytes, {size} were expected")
        return self.read_into(frame, torch.empty(size, dtype=torch.uint8))

    def read_into(self, frame: Frame, room: Tensor) -> Tensor:
        """The same into memory that is there already, uint8 ``[size]``, contiguous, on the CPU."""
        if frame.size != room.numel():
            raise frame.refuse(f"{frame.size} bytes, {room.numel()} were expected")
        if frame.size:
            self._fill(room.numpy().data)
        return room

    def cut(self) -> None:
        """Ends the connection for both ends and for every thread that waits in it; what has arrived can be read."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end was faster.
            return

    def close(self) -> None:
        """Gives the socket back; no thread may be waiting in it."""
        self.socket.close()

    def _exactly(self, size: int) -> bytearray:
        room = bytearray(size)
        self._fill(memoryview(room))
        return room

    def _fill(self, room: memoryview) -> None:
        while room:
            count = self.socket.recv_into(room)
            if not count:
                raise ConnectionError(f"{self.peer} closed the connection")
            room = room[count:]
