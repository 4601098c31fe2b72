"""Measures latency, bandwidth and clock difference between hosts over the doctor's own TCP connections."""

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

from distrain.tools.doctor.rendezvous import describe_connection_error

#: Seconds to wait for a connection, and for each answer on it.
_TIMEOUT = 3.0
#: Seconds of data in each direction. Only the second half is measured, when buffers on the way have filled.
_FLOW_SECONDS = 0.4
#: Bytes per second above which one measurement is enough. A lower rate may be due to a host that is briefly busy.
_FAST_ENOUGH = 125e6
_PINGS, _PING_SECONDS = 40, 0.5
_CHUNK = bytes(1 << 16)
_TOKEN_BYTES = 32
#: Requests of one byte: "tell me your clock", "send me data", "I send you data".
_PING, _PULL, _PUSH = b"i", b"l", b"s"


@dataclass(frozen=True)
class LinkMeasurement:
    """What one host measured towards another.

    Attributes:
        source: First rank of the host that measured.
        target: First rank of the other host.
        errors: Why connecting failed, by address of the other host; lacks the address that worked.
        latency: Median round-trip time in seconds; ``None`` without a connection.
        sent: Bytes per second towards the other host; ``None`` if not measured.
        received: Bytes per second from the other host; ``None`` if not measured.
        skew: Seconds by which the other host's clock is ahead, accurate to half of the shortest round trip.
    """

    source: int
    target: int
    errors: dict[str, str] = field(default_factory=dict)
    latency: float | None = None
    sent: float | None = None
    received: float | None = None
    skew: float | None = None


def pairing_rounds(hosts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Groups all pairs of hosts into rounds in which each host has at most one partner.

    This is the circle method of round-robin tournaments.
    """
    circle: list[int | None] = [*hosts, None] if len(hosts) % 2 else [*hosts]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle.insert(1, circle.pop())
    return rounds


class LinkServer:
    """Serves the measurements of other hosts, on a port that the system chooses, until it is closed.

    Attributes:
        port: Its TCP port, open on all addresses of this host.
        token: Secret that a client must send first; connections without it are closed.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(_TOKEN_BYTES // 2)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stops accepting connections."""
        # close() alone would leave the thread waiting in accept().
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A broken connection is reported by the client.
        with client, contextlib.suppress(OSError):
            _configure(client)
            if not hmac.compare_digest(_read(client, _TOKEN_BYTES), self.token.encode()):
                return
            client.sendall(_PING)
            while True:
                request = client.recv(1)
                if request == _PING:
                    client.sendall(struct.pack("!d", time.time()))
                elif request == _PUSH:
                    client.sendall(struct.pack("!d", _receive_flow(client)))
                    # The client closes the connection once it has read the rate.
                    while client.recv(len(_CHUNK)):
                        pass
                    return
                elif request == _PULL:
                    while True:
                        client.sendall(_CHUNK)
                else:
                    return


def connect(addresses: Sequence[str], port: int, token: str) -> tuple[socket.socket | None, dict[str, str]]:
    """Connects to a :class:`LinkServer` at the first of its addresses that answers.

    Returns:
        The connection, if any, and why each address before it failed.
    """
    errors: dict[str, str] = {}
    for address in dict.fromkeys(addresses):
        if not address:
            continue
        try:
            connection = socket.create_connection((address, port), timeout=_TIMEOUT)
        except OSError as error:
            errors[address] = describe_connection_error(error)
            continue
        # Any error of the handshake means that another program listens there.
        with contextlib.suppress(OSError):
            _configure(connection)
            connection.sendall(token.encode())
            if _read(connection, 1) == _PING:
                return connection, errors
        connection.close()
        errors[address] = "another program answers at this address"
    return None, errors


def measure_host_link(
    source: int, target: int, addresses: Sequence[str], port: int, token: str, *, bandwidth: bool
) -> LinkMeasurement:
    """Measures the link from this host to another host's :class:`LinkServer`.

    Args:
        source: First rank of this host.
        target: First rank of the other host.
        addresses: Addresses of the other host, in the order in which to try them.
        port: Port of its server.
        token: Secret of its server.
        bandwidth: Whether to measure bandwidth as well, which takes one to two seconds.
    """
    connection, errors = connect(addresses, port, token)
    if connection is None:
        return LinkMeasurement(source, target, errors)
    try:
        latency, skew = _ping(connection)
        if not bandwidth:
            return LinkMeasurement(source, target, errors, latency, None, None, skew)
        rates = []
        for request, measure_flow in ((_PUSH, _send_flow), (_PULL, _receive_flow)):
            best = 0.0
            for _ in range(2):
                # A new connection, so that data in flight from the last measurement does not disturb this one.
                _abort(connection)
                connection, _ = connect(addresses, port, token)
                if connection is None:
                    raise ConnectionResetError("the other host no longer answers")
                connection.sendall(request)
                best = max(best, measure_flow(connection))
                if best >= _FAST_ENOUGH:
                    break
            rates.append(best)
        sent, received = rates
        return LinkMeasurement(source, target, errors, latency, sent, received, skew)
    except OSError as error:
        return LinkMeasurement(
            source, target, {**errors, "connection": f"broke off: {describe_connection_error(error)}"}
        )
    finally:
        if connection is not None:
            _abort(connection)


def _configure(connection: socket.socket) -> None:
    connection.settimeout(_TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _abort(connection: socket.socket) -> None:
    """Closes a connection at once and discards unsent data, which would disturb the next measurement."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the other host closed the connection")
        data += part
    return data


def _ping(connection: socket.socket) -> tuple[float, float]:
    """Returns the median round-trip time and the clock offset by the fastest round trip, both in seconds."""
    samples: list[tuple[float, float]] = []
    deadline = time.monotonic() + _PING_SECONDS
    while len(samples) < _PINGS and (time.monotonic() < deadline or not samples):
        sent_at, started = time.time(), time.perf_counter()
        connection.sendall(_PING)
        (remote_clock,) = struct.unpack("!d", _read(connection, 8))
        round_trip = time.perf_counter() - started
        samples.append((round_trip, remote_clock - (sent_at + round_trip / 2)))
    return statistics.median(round_trip for round_trip, _ in samples), min(samples)[1]


def _send_flow(connection: socket.socket) -> float:
    """Sends data until the other host reports the rate at which it arrived, and returns that rate."""
    deadline = time.monotonic() + _FLOW_SECONDS + _TIMEOUT
    connection.setblocking(False)
    try:
        while time.monotonic() < deadline:
            readable, writable, _ = select.select([connection], [connection], [], _TIMEOUT)
            if readable:
                connection.settimeout(_TIMEOUT)
                (rate,) = struct.unpack("!d", _read(connection, 8))
                return float(rate)
            if writable:
                with contextlib.suppress(BlockingIOError):
                    connection.send(_CHUNK)
        raise TimeoutError
    finally:
        connection.settimeout(_TIMEOUT)


def _receive_flow(connection: socket.socket) -> float:
    """Receives data for a while and returns its rate in bytes per second."""
    total, points = 0, []
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        part = connection.recv(1 << 18)
        if not part:
            break
        now = time.monotonic()
        deadline = deadline or now + _FLOW_SECONDS
        total += len(part)
        points.append((now, total))
    return steady_rate(points)


def steady_rate(points: Sequence[tuple[float, int]]) -> float:
    """Returns the bytes per second in the second half of a transfer.

    Args:
        points: Pairs of a time in seconds and the bytes received by then.
    """
    if len(points) < 2:
        return 0.0
    middle = (points[0][0] + points[-1][0]) / 2
    # Data may arrive in few large pieces, so the measured span starts at the arrival of one, not exactly in the middle.
    start = max(point for point in points[:-1] if point[0] <= middle)
    seconds = points[-1][0] - start[0]
    return (points[-1][1] - start[1]) / seconds if seconds > 0 else 0.0
