"""On which addresses a job's own sockets listen: no more than its ranks need.

Neither torch's store nor gloo authenticates its peers: whoever can connect to their ports can take part. So neither
listens on all interfaces if the address that the ranks use is known, and a job on one host uses the loopback interface.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from distrain.runtime.world import World

log = logging.getLogger(__name__)

_GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
_BACKLOG = 2048
#: How much longer than its own time limit torch's store may take; its message says more about the cause.
_ANSWER_SECONDS = 1.0

#: The release of torch whose libuv server is known to take an open socket.
_LIBUV_TAKES_SOCKETS = (2, 13)

Connected = TypeVar("Connected")

#: The stores that this process serves to its end, by address and port. A process may run several times, as ``verify``
#: does; a store for each run could only begin when all ranks have left the one before, and no rank can know that.
_served: dict[tuple[str, int], TCPStore] = {}

#: Names of the loopback interface: on Linux; on macOS and the BSDs.
_LOOPBACK_NAMES = ("lo", "lo0")


def is_single_host(world: World) -> bool:
    """Whether the launcher says that all ranks run on this host; false if it says nothing."""
    return world.local_size == world.size and "LOCAL_WORLD_SIZE" in os.environ


def restrict_gloo_to_loopback(world: World) -> None:
    """Makes gloo listen on the loopback interface only, if all ranks run on this host. Call before any group is made.

    Otherwise gloo listens on the address that the host's own name resolves to. An interface set by the user is kept.
    """
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in _LOOPBACK_NAMES if name in interfaces), None)
    if loopback is not None and is_single_host(world):
        os.environ.setdefault(_GLOO_VARIABLE, loopback)


def open_store(address: str, port: int, world: World, *, serves: bool, timeout: datetime.timedelta) -> TCPStore:
    """Opens the store at which the ranks meet; a process that serves it does so to its end.

    Args:
        address: Name or IP address of the host that serves it.
        port: Its port.
        world: This rank's place.
        serves: Whether this process serves it, from now on if it doesn't yet.
        timeout: Time limit for connecting, and for every later request.

    Raises:
        RuntimeError: It cannot be reached, or the port is taken; torch.distributed.DistError of newer releases.
        TimeoutError: Something listens there, but does not answer as a store does.
    """
    serves = serves and (address, port) not in _served
    listener = _listen(address, port, world) if serves else None

    def connect() -> TCPStore:
        if listener is not None:
            return serve_store(listener, address, port, world.size, timeout)
        return TCPStore(address, port, world.size, is_master=serves, timeout=timeout, wait_for_workers=False)

    store = within_time(connect, timeout.total_seconds())
    if serves:
        _served[address, port] = store
    return store


def serve_store(
    listener: socket.socket, address: str, port: int, world_size: int | None, timeout: datetime.timedelta
) -> TCPStore:
    """Serves a store at an open socket; without one it would listen on all interfaces.

    Args:
        listener: The socket; the store takes it over.
        address: Its address, as this process connects to it.
        port: Its port.
        world_size: Number of ranks; ``None`` if it may change.
        timeout: Time limit of every request.
    """
    # Older releases can't give a socket to their newer server.
    legacy = {"use_libuv": False} if _torch_version() < _LIBUV_TAKES_SOCKETS else {}
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        **legacy,
    )


def _torch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def within_time(connect: Callable[[], Connected], seconds: float) -> Connected:
    """Calls a function in a thread of its own, and waits for it so long that signals are still handled.

    torch's store has no time limit for the first answer, so a program that never answers would block it forever.

    Args:
        connect: The function. If it takes longer, its thread stays behind, which does not keep the process from ending.
        seconds: The longest wait.

    Raises:
        TimeoutError: It took longer. What the function itself raises is raised too.
    """
    outcome: queue.SimpleQueue[tuple[Connected | None, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            outcome.put((connect(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=call, name="distrain-connect", daemon=True).start()
    try:
        connected, error = outcome.get(timeout=seconds + _ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast(Connected, connected)


def _listen(address: str, port: int, world: World) -> socket.socket | None:
    """Opens a socket on the one address that the other ranks connect to; ``None`` if that can't be determined."""
    try:
        resolved = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    listeners: list[socket.socket] = []
    # The order in which clients try the address families.
    for family in (socket.AF_INET6, socket.AF_INET):
        addresses = {socket_address for kind, _, _, _, socket_address in resolved if kind is family}
        for socket_address in sorted(addresses, key=str):
            try:
                listeners.append(socket.create_server(socket_address[:2], family=family, backlog=_BACKLOG))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return None  # the store then reports it
                # Any other error: the address belongs to another host, or leads here by address translation.
    chosen = _choose(address, listeners, is_single_host(world))
    for listener in listeners:
        if listener is not chosen:
            listener.close()
    if chosen is None:
        log.warning("the store listens on all interfaces: %s is not exactly one address of this host", address)
    return chosen


def _choose(address: str, listeners: list[socket.socket], single_host: bool) -> socket.socket | None:
    loopback = [ipaddress.ip_address(listener.getsockname()[0]).is_loopback for listener in listeners]
    if listeners and all(loopback):
        # On the host itself its own name often resolves to loopback, but on other hosts to its network address.
        return listeners[0] if single_host or _is_loopback(address) else None
    # With several addresses, each client might use another one.
    return listeners[0] if len(listeners) == 1 else None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
