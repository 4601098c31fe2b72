"""Where servers listen, and how workers come in: with the run's token, once for each connection they need."""

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
from distrain.strategies.parameter_server.protocol import Connection, Kind, ProtocolError

#: A worker's connections to a server: parameters, everything else that is asked and answered, and signs of life.
CHANNELS = ("work", "talk", "pulse")
#: A stranger who connects and says nothing is let go after this many seconds.
_GREETING_SECONDS = 10.0
_LARGEST_GREETING = 4096
#: Linux's request for an interface's address.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        bind: Address to listen on.
        publish: Address, or name, that the other ranks connect to.
        family: ``AF_INET`` or ``AF_INET6``.
    """

    bind: str
    publish: str
    family: socket.AddressFamily


def own_address(hosts: Collection[str]) -> Address:
    """This host's address on the network that the job uses.

    That of gloo's interface where one was named; otherwise the one from which this host reaches ``MASTER_ADDR``.

    Args:
        hosts: Names of all ranks' hosts.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface and sys.platform == "linux":
        # Without an IPv4 address the route decides.
        with contextlib.suppress(OSError):
            address = _address_of(interface)
            return Address(address, address, socket.AF_INET)
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Sends nothing; the system only chooses a route.
        probe.connect(target)
        address = str(probe.getsockname()[0])
    if len(set(hosts)) > 1 and (address == "::1" or address.startswith("127.")):
        # This is the master's host, whose own name leads to its loopback. The others know it by that name.
        return Address("", master, family)
    return Address(address, address, family)


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


class Door:
    """Where workers come in; closed as soon as all are there.

    Args:
        address: Where to listen; the port is the system's choice.

    Attributes:
        port: Where it listens.
        token: What a worker must show; random, told to the ranks of this run alone.
    """

    def __init__(self, address: Address) -> None:
        self._socket = socket.create_server((address.bind, 0), family=address.family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(32)
        self._changed = threading.Condition()
        self._expected: dict[tuple[int, str], RankName] = {}
        self._greeted: dict[tuple[int, str], Connection] = {}

    def admit(self, peers: Iterable[RankName], seconds: float) -> dict[tuple[int, str], Connection]:
        """Waits until every peer has all its connections.

        Returns:
            Connections by rank and channel.

        Raises:
            RuntimeError: Somebody did not come in time.
        """
        self._expected = {(peer.rank, channel): peer for peer in peers for channel in CHANNELS}
        deadline = time.monotonic() + seconds
        self._socket.settimeout(0.1)
        try:
            while True:
                with self._changed:
                    if len(self._greeted) == len(self._expected):
                        return self._greeted
                if time.monotonic() > deadline:
                    missing = sorted({str(self._expected[key]) for key in self._expected if key not in self._greeted})
                    raise RuntimeError(f"{', '.join(missing)} did not connect within {seconds:g} s")
                # Looks up from time to time, since the last greeting ends in a thread of its own.
                with contextlib.suppress(TimeoutError):
                    sock, address = self._socket.accept()
                    # So that one who says nothing keeps nobody waiting.
                    threading.Thread(target=self._greet, args=(sock, str(address[0])), daemon=True).start()
        finally:
            self._socket.close()

    def _greet(self, sock: socket.socket, stranger: str) -> None:
        connection = Connection(sock, stranger)
        try:
            sock.settimeout(_GREETING_SECONDS)
            hello = connection.receive(Kind.HELLO, largest_meta=_LARGEST_GREETING)
            connection.read(hello, 0)
            if not hmac.compare_digest(hello.text("token").encode(), self.token.encode()):
                raise hello.refuse("wrong token")
            key = (hello.whole("rank"), hello.text("channel"))
            with self._changed:
                if key not in self._expected or key in self._greeted:
                    raise hello.refuse(f"nobody expects {key}")
                connection.peer = str(self._expected[key])
                sock.settimeout(None)
                connection.send(Kind.WELCOME)
                self._greeted[key] = connection
        except (OSError, ProtocolError, UnicodeEncodeError):
            # Whoever it was has no business here; a worker that is refused says so itself.
            connection.close()


def enter(server: RankName, address: str, port: int, token: str, rank: int, seconds: float) -> dict[str, Connection]:
    """Opens a worker's connections to a server.

    Args:
        server: Whom.
        address: Where it listens.
        port: At which port.
        token: What the server told this run's ranks.
        rank: This worker's.
        seconds: How long to try.

    Returns:
        Connections by channel.

    Raises:
        RuntimeError: The server can't be reached or refuses.
    """
    found: dict[str, Connection] = {}
    for channel in CHANNELS:
        try:
            sock = socket.create_connection((address, port), timeout=seconds)
            connection = Connection(sock, str(server))
            connection.send(Kind.HELLO, {"token": token, "rank": rank, "channel": channel})
            connection.receive(Kind.WELCOME)
            sock.settimeout(None)
        except OSError as error:
            raise RuntimeError(f"no connection to the server, {server}, at {address}:{port}: {error}") from error
        found[channel] = connection
    return found
