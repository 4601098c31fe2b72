"""Latency, bandwidth and clock difference between hosts, over sockets of the doctor's own."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from distrain.tools.doctor.meeting import meaning

#: Seconds for a connection, and for each answer on it.
_PATIENCE = 3.0
#: Seconds of data in each direction; what comes in the second half counts, after buffers on the way have filled.
_FLOW_SECONDS = 0.4
#: Bytes per second that are not measured twice; a lower rate may be this moment's, of a host that is busy.
_CONVINCING = 125e6
_PINGS, _PING_SECONDS = 40, 0.5
_CHUNK = bytes(1 << 16)
_TOKEN_BYTES = 32
_PING, _PULL, _PUSH = b"i", b"l", b"s"


@dataclass(frozen=True)
class Pair:
    """What one host measured towards another.

    Attributes:
        source: First rank of the host that measured.
        target: First rank of the other host.
        errors: By address of the other host, why no connection came about; an address that answered is not in it.
        latency: Seconds to the other host and back, the median; ``None`` without a connection.
        sent: Bytes per second towards the other host.
        received: Bytes per second from there.
        skew: Seconds by which the other's clock is ahead, give or take half of the shortest latency.
    """

    source: int
    target: int
    errors: dict[str, str] = field(default_factory=dict)
    latency: float | None = None
    sent: float | None = None
    received: float | None = None
    skew: float | None = None


def rounds(hosts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """All pairs, in rounds in which every host has at most one partner: the circle method of tournaments."""
    circle: list[int | None] = [*hosts, None] if len(hosts) % 2 else [*hosts]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle.insert(1, circle.pop())
    return found


class Listener:
    """Answers the other hosts, on a port that the system chooses, until it is closed.

    Attributes:
        port: Where it listens, on all addresses of this host.
        token: What a caller must know; others are cut off.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(_TOKEN_BYTES // 2)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Answers no more."""
        # Closing alone would leave the thread in accept.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(caller,), daemon=True).start()

    def _answer(self, caller: socket.socket) -> None:
        # A caller that breaks off has its reasons, and says them on its own host.
        with caller, contextlib.suppress(OSError):
            _prepare(caller)
            if not hmac.compare_digest(_read(caller, _TOKEN_BYTES), self.token.encode()):
                return
            caller.sendall(_PING)
            while True:
                wish = caller.recv(1)
                if wish == _PING:
                    caller.sendall(struct.pack("!d", time.time()))
                elif wish == _PUSH:
                    caller.sendall(struct.pack("!d", _take(caller)))
                    # The caller hangs up when it has read that.
                    while caller.recv(len(_CHUNK)):
                        pass
                    return
                elif wish == _PULL:
                    while True:
                        caller.sendall(_CHUNK)
                else:
                    return


def call(addresses: Sequence[str], port: int, token: str) -> tuple[socket.socket | None, dict[str, str]]:
    """Connects to a listener by the first of its addresses that answers.

    Returns:
        The connection, if any, and why the addresses before it failed.
    """
    errors: dict[str, str] = {}
    for address in dict.fromkeys(addresses):
        if not address:
            continue
        try:
            connection = socket.create_connection((address, port), timeout=_PATIENCE)
        except OSError as error:
            errors[address] = meaning(error)
            continue
        try:
            _prepare(connection)
            connection.sendall(token.encode())
            if _read(connection, 1) == _PING:
                return connection, errors
        except OSError:
            # Told below.
            pass
        connection.close()
        errors[address] = "somebody else answers at this address"
    return None, errors


def measure(source: int, target: int, addresses: Sequence[str], port: int, token: str, *, flow: bool) -> Pair:
    """Measures the way to another host's listener: in one to two seconds with ``flow``, at once without."""
    connection, errors = call(addresses, port, token)
    if connection is None:
        return Pair(source, target, errors)
    try:
        latency, skew = _ping(connection)
        if not flow:
            return Pair(source, target, errors, latency, None, None, skew)
        rates = []
        for wish, flow_of in ((_PUSH, _give), (_PULL, _take)):
            best = 0.0
            for _ in range(2):
                # What is under way from the last flow must not be in the way of the next.
                _hang_up(connection)
                connection, _ = call(addresses, port, token)
                if connection is None:
                    raise ConnectionResetError("the other end answers no more")
                connection.sendall(wish)
                best = max(best, flow_of(connection))
                if best >= _CONVINCING:
                    break
            rates.append(best)
        sent, received = rates
        return Pair(source, target, errors, latency, sent, received, skew)
    except OSError as error:
        return Pair(source, target, {**errors, "connection": f"broke off: {meaning(error)}"})
    finally:
        if connection is not None:
            _hang_up(connection)


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(_PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _hang_up(connection: socket.socket) -> None:
    """Closes at once and throws away what is still to be sent, which would be in the next measurement's way."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionResetError("the other end hung up")
        found += part
    return found


def _ping(connection: socket.socket) -> tuple[float, float]:
    """The median latency, and how far the other's clock is ahead by the exchange that took the shortest."""
    found: list[tuple[float, float]] = []
    end = time.monotonic() + _PING_SECONDS
    while len(found) < _PINGS and (time.monotonic() < end or not found):
        left, begun = time.time(), time.perf_counter()
        connection.sendall(_PING)
        (theirs,) = struct.unpack("!d", _read(connection, 8))
        taken = time.perf_counter() - begun
        found.append((taken, theirs - (left + taken / 2)))
    return statistics.median(taken for taken, _ in found), min(found)[1]


def _give(connection: socket.socket) -> float:
    """Sends until the other end says at what rate it came, and returns that."""
    deadline = time.monotonic() + _FLOW_SECONDS + _PATIENCE
    connection.setblocking(False)
    try:
        while time.monotonic() < deadline:
            readable, writable, _ = select.select([connection], [connection], [], _PATIENCE)
            if readable:
                connection.settimeout(_PATIENCE)
                (rate,) = struct.unpack("!d", _read(connection, 8))
                return float(rate)
            if writable:
                with contextlib.suppress(BlockingIOError):
                    connection.send(_CHUNK)
        raise TimeoutError
    finally:
        connection.settimeout(_PATIENCE)


def _take(connection: socket.socket) -> float:
    """Receives for a while and returns at what rate, in bytes per second."""
    total, points = 0, []
    end = None
    while end is None or time.monotonic() < end:
        part = connection.recv(1 << 18)
        if not part:
            break
        now = time.monotonic()
        end = end or now + _FLOW_SECONDS
        total += len(part)
        points.append((now, total))
    return steady_rate(points)


def steady_rate(points: Sequence[tuple[float, int]]) -> float:
    """Bytes per second in the second half of the time.

    Args:
        points: Times in seconds and the bytes that had come by then.
    """
    if len(points) < 2:
        return 0.0
    middle = (points[0][0] + points[-1][0]) / 2
    # Data may come in few large lumps: from one to another, not from a moment between them.
    start = max(point for point in points[:-1] if point[0] <= middle)
    seconds = points[-1][0] - start[0]
    return (points[-1][1] - start[1]) / seconds if seconds > 0 else 0.0
