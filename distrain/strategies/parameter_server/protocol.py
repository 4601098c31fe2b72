"""The wire protocol between workers and servers: frames over TCP, of known kinds and checked sizes.

A frame is a header of fixed size, a JSON object and a body of raw bytes. Nothing is pickled, so a peer can't make the
receiver run code. The receiver compares the size of the body with the size that it expects before it allocates memory.

The protocol uses sockets instead of a process group for two reasons. A gloo group fails as a whole when one rank dies.
And sockets are faster: between two processes on one host a round trip of 4 kB took 0.01 ms over a socket and 0.1 to
2.9 ms with gloo's send and receive; 490 kB took 0.08 ms and 0.6 to 3.3 ms; 45 MB took 61 to 99 ms and 62 to 87 ms
(medians).
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
# Magic, kind, bytes of JSON, bytes of the body.
_HEADER = struct.Struct("!4sBxxxIQ")
#: Maximum size of a frame's JSON, in bytes. The JSON that describes optimizer state lists every parameter by name.
MAX_JSON_BYTES = 1 << 24
#: A body up to this size, in bytes, is sent together with its header in one call.
_SINGLE_SEND_BYTES = 1 << 16


class FrameKind(enum.IntEnum):
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
    STATISTICS = 12
    STATE = 13
    LOAD = 14
    DONE = 15
    HEARTBEAT = 16
    FAILURE = 17
    FAREWELL = 18
    TRAINED = 19


class ProtocolError(RuntimeError):
    """A peer violated the protocol; the message names the peer and the violation."""


@dataclass(frozen=True)
class Frame:
    """A received frame whose body has not been read yet.

    Attributes:
        kind: What it is for.
        meta: Its JSON object.
        size: Size of the body, in bytes.
        peer: The sender, for error messages.
    """

    kind: FrameKind
    meta: dict[str, Any]
    size: int
    peer: str

    def integer(self, name: str) -> int:
        """Returns the field ``name``, an integer of at least 0.

        Raises:
            ProtocolError: The field is missing or has another type or range.
        """
        value = self.meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.protocol_error(f"{name} is {value!r}, not an integer of at least 0")
        return value

    def number(self, name: str) -> float:
        """Returns the field ``name``, a number, which may be infinite or NaN.

        Raises:
            ProtocolError: The field is missing or has another type.
        """
        value = self.meta.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.protocol_error(f"{name} is {value!r}, not a number")
        return float(value)

    def string(self, name: str) -> str:
        """Returns the field ``name``, a string.

        Raises:
            ProtocolError: The field is missing or has another type.
        """
        value = self.meta.get(name)
        if not isinstance(value, str):
            raise self.protocol_error(f"{name} is {value!r}, not a string")
        return value

    def protocol_error(self, problem: str) -> ProtocolError:
        """Returns an error, to be raised by the caller, that says what is wrong with this frame."""
        return ProtocolError(f"{self.kind.name} frame of {self.peer}: {problem}")


class Connection:
    """One end of a TCP connection. Several threads may send; only one thread may receive.

    Args:
        sock: A connected socket.
        peer: Name of the other end, for error messages.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket = sock
        self.peer = peer
        self._send_lock = threading.Lock()
        # Most frames are followed by a wait for the answer, so delaying them to join them with others only costs time.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: FrameKind, meta: Mapping[str, Any] | None = None, body: Tensor | None = None) -> None:
        """Sends a frame.

        Args:
            kind: What it is for.
            meta: The JSON object.
            body: uint8 ``[bytes]``, contiguous, on the CPU.

        Raises:
            OSError: The connection is closed.
        """
        text = json.dumps(meta).encode() if meta else b""
        size = 0 if body is None else body.numel()
        head = _HEADER.pack(_MAGIC, kind, len(text), size) + text
        with self._send_lock:
            if body is not None and size > _SINGLE_SEND_BYTES:
                self.socket.sendall(head)
                self.socket.sendall(body.numpy().data)
            else:
                self.socket.sendall(head if body is None else head + body.numpy().tobytes())

    def receive(self, *expected: FrameKind, max_json_bytes: int = MAX_JSON_BYTES) -> Frame:
        """Waits for a frame of one of the expected kinds.

        Raises:
            ProtocolError: The peer sent a frame of another kind, something that is not a frame, or JSON that is too
                long or invalid.
            OSError: The connection is closed.
        """
        magic, number, length, size = _HEADER.unpack(self._receive_exactly(_HEADER.size))
        if magic != _MAGIC or number not in [*FrameKind]:
            raise ProtocolError(f"{self.peer} sent something that is not a frame")
        kind = FrameKind(number)
        if kind not in expected:
            names = " or ".join(expected_kind.name for expected_kind in expected)
            raise ProtocolError(f"{self.peer} sent {kind.name}, not {names}")
        if length > max_json_bytes:
            raise ProtocolError(f"{kind.name} frame of {self.peer}: {length} bytes of JSON, {max_json_bytes} allowed")
        meta: Any = {}
        if length:
            try:
                meta = json.loads(bytes(self._receive_exactly(length)))
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"{kind.name} frame of {self.peer}: invalid JSON ({error})") from error
        if not isinstance(meta, dict):
            raise ProtocolError(f"{kind.name} frame of {self.peer}: its JSON is not an object")
        return Frame(kind, meta, size, self.peer)

    def read_body(self, frame: Frame, size: int) -> Tensor:
        """Reads the body of a received frame.

        Args:
            frame: The frame that was received last.
            size: Expected size of the body, in bytes.

        Returns:
            uint8 ``[size]``.

        Raises:
            ProtocolError: The body has another size; none of it is read.
            OSError: The connection is closed.
        """
        if frame.size != size:
            raise frame.protocol_error(f"{frame.size} bytes, {size} were expected")
        return self.read_body_into(frame, torch.empty(size, dtype=torch.uint8))

    def read_body_into(self, frame: Frame, buffer: Tensor) -> Tensor:
        """Reads the body of a received frame into existing memory and returns it.

        Args:
            frame: The frame that was received last.
            buffer: uint8 ``[size]``, contiguous, on the CPU.

        Raises:
            ProtocolError: The body has another size; none of it is read.
            OSError: The connection is closed.
        """
        if frame.size != buffer.numel():
            raise frame.protocol_error(f"{frame.size} bytes, {buffer.numel()} were expected")
        if frame.size:
            self._receive_into(buffer.numpy().data)
        return buffer

    def shut_down(self) -> None:
        """Ends the connection for both peers and wakes every thread that waits in it.

        Data that has already arrived can still be received.
        """
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The peer has already ended the connection.
            return

    def close(self) -> None:
        """Releases the socket; no thread may be waiting in it."""
        self.socket.close()

    def _receive_exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        self._receive_into(memoryview(buffer))
        return buffer

    def _receive_into(self, buffer: memoryview) -> None:
        while buffer:
            count = self.socket.recv_into(buffer)
            if not count:
                raise ConnectionError(f"{self.peer} closed the connection")
            buffer = buffer[count:]
