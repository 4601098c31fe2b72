"""How workers connect to servers: where a server listens, and which connections it accepts."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from distrain.communication.types import RankName
from distrain.strategies.parameter_server.protocol import Connection, FrameKind, ProtocolError

#: A worker's connections to a server: one for pushes and pulls, one for all other requests, one for heartbeats.
CHANNELS = ("parameters", "requests", "heartbeat")
#: A client that connects and doesn't authenticate is disconnected after this many seconds.
_HANDSHAKE_SECONDS = 10.0
_MAX_HANDSHAKE_JSON_BYTES = 4096
#: Linux's ioctl request for the address of a network interface.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        bind: Address to listen on.
        advertise: Address, or host name, that the other ranks connect to.
        family: ``AF_INET`` or ``AF_INET6``.
    """

    bind: str
    advertise: str
    family: socket.AddressFamily


def listen_address(hosts: Collection[str]) -> Address:
    """Returns this host's address on the network that the job uses.

    It is the address of the interface that ``GLOO_SOCKET_IFNAME`` names, if any; otherwise the one from which this host
    reaches ``MASTER_ADDR``.

    Args:
        hosts: The host name of every rank.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface and sys.platform == "linux":
        # An interface without an IPv4 address is ignored; the route to the master then decides.
        with contextlib.suppress(OSError):
            address = _interface_address(interface)
            return Address(address, address, socket.AF_INET)
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only makes the system choose a route.
        probe.connect(target)
        address = str(probe.getsockname()[0])
    if len(set(hosts)) > 1 and (address == "::1" or address.startswith("127.")):
        # This host is the master, and its own name resolves to the loopback address. Other hosts reach it by its name.
        return Address("", master, family)
    return Address(address, address, family)


def _interface_address(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


class Listener:
    """Accepts the workers' connections to a server, and stops listening as soon as it has all of them.

    Args:
        address: Where to listen; the operating system chooses the port.

    Attributes:
        port: The port.
        token: A random string that a worker has to present; only the ranks of this run know it.
    """

    def __init__(self, address: Address) -> None:
        self._socket = socket.create_server((address.bind, 0), family=address.family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(32)
        self._lock = threading.Lock()
        self._expected: dict[tuple[int, str], RankName] = {}
        self._accepted: dict[tuple[int, str], Connection] = {}

    def accept_workers(self, workers: Iterable[RankName], seconds: float) -> dict[tuple[int, str], Connection]:
        """Waits until every worker has opened all its connections.

        Args:
            workers: The workers to wait for.
            seconds: How long to wait.

        Returns:
            Connections by rank and channel.

        Raises:
            RuntimeError: A worker did not connect in time.
        """
        self._expected = {(worker.rank, channel): worker for worker in workers for channel in CHANNELS}
        deadline = time.monotonic() + seconds
        # The last handshake ends in a thread of its own, so the loop has to look regularly whether it is over.
        self._socket.settimeout(0.1)
        try:
            while True:
                with self._lock:
                    if len(self._accepted) == len(self._expected):
                        return self._accepted
                if time.monotonic() > deadline:
                    missing = sorted({str(self._expected[key]) for key in self._expected if key not in self._accepted})
                    raise RuntimeError(f"{', '.join(missing)} did not connect within {seconds:g} s")
                with contextlib.suppress(TimeoutError):
                    sock, address = self._socket.accept()
                    # In a thread, so that a client that sends nothing doesn't block the others.
                    threading.Thread(target=self._handshake, args=(sock, str(address[0])), daemon=True).start()
        finally:
            self._socket.close()

    def _handshake(self, sock: socket.socket, client: str) -> None:
        connection = Connection(sock, client)
        try:
            sock.settimeout(_HANDSHAKE_SECONDS)
            hello = connection.receive(FrameKind.HELLO, max_json_bytes=_MAX_HANDSHAKE_JSON_BYTES)
            connection.read_body(hello, 0)
            if not hmac.compare_digest(hello.string("token").encode(), self.token.encode()):
                raise hello.protocol_error("wrong token")
            key = (hello.integer("rank"), hello.string("channel"))
            with self._lock:
                if key not in self._expected or key in self._accepted:
                    raise hello.protocol_error(f"rank and channel {key} are not expected")
                connection.peer = str(self._expected[key])
                sock.settimeout(None)
                connection.send(FrameKind.WELCOME)
                self._accepted[key] = connection
        except (OSError, ProtocolError, UnicodeEncodeError):
            # The server does not report a client that doesn't belong to the run; a refused worker raises an error.
            connection.close()


def connect_to_server(
    server: RankName, address: str, port: int, token: str, rank: int, seconds: float
) -> dict[str, Connection]:
    """Opens a worker's connections to a server.

    Args:
        server: The server, for messages.
        address: The address that the server advertises.
        port: The port on which it listens.
        token: The token that the server gave to this run's ranks.
        rank: This worker's rank.
        seconds: Timeout of each connection.

    Returns:
        Connections by channel.

    Raises:
        RuntimeError: The server can't be reached or refuses the connection.
    """
    connections: dict[str, Connection] = {}
    for channel in CHANNELS:
        try:
            sock = socket.create_connection((address, port), timeout=seconds)
            connection = Connection(sock, str(server))
            connection.send(FrameKind.HELLO, {"token": token, "rank": rank, "channel": channel})
            connection.receive(FrameKind.WELCOME)
            sock.settimeout(None)
        except OSError as error:
            raise RuntimeError(f"no connection to the server, {server}, at {address}:{port}: {error}") from error
        connections[channel] = connection
    return connections
