"""Where a job's own sockets listen: no wider than its ranks need.

Neither torch's store nor gloo asks who is there: whoever reaches their ports can take part. So nothing listens on all
interfaces where the address that the ranks use is known, and a job on one host stays on the loopback interface.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import socket
from typing import TYPE_CHECKING

from torch.distributed import TCPStore  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from distrain.runtime.world import World

log = logging.getLogger(__name__)

_GLOO = "GLOO_SOCKET_IFNAME"
_BACKLOG = 2048
#: Names of the loopback interface on Linux, and on macOS and the BSDs.
_LOOPBACK = ("lo", "lo0")


def is_single_host(world: World) -> bool:
    """Whether the launcher says that all ranks are here; a launcher that says nothing doesn't."""
    return world.local_size == world.size and "LOCAL_WORLD_SIZE" in os.environ


def restrict_gloo_to_loopback(world: World) -> None:
    """Lets gloo listen on the loopback interface alone where all ranks are on this host; before any group is made.

    Otherwise it listens at the address that the host's own name leads to. An interface that the user named stays.
    """
    there = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in _LOOPBACK if name in there), None)
    if loopback is not None and is_single_host(world):
        os.environ.setdefault(_GLOO, loopback)


def open_store(address: str, port: int, world: World, *, serves: bool, timeout: datetime.timedelta) -> TCPStore:
    """The store at which the ranks meet.

    Args:
        address: Name or number of the host that serves it.
        port: Its port.
        world: This rank's place.
        serves: This process serves it.
        timeout: For reaching it, and for every later request.

    Raises:
        torch.distributed.DistError: It can't be reached, or the port is taken.
    """
    bound = _bound(address, port, world) if serves else None
    return TCPStore(
        address,
        port,
        world.size,
        is_master=serves,
        timeout=timeout,
        wait_for_workers=False,
        # The store owns the socket from here on. Without one it would listen on all interfaces.
        master_listen_fd=None if bound is None else bound.detach(),
    )


def _bound(address: str, port: int, world: World) -> socket.socket | None:
    """A socket that listens where the other ranks come to, and nowhere else; ``None`` where that can't be known."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    here: list[socket.socket] = []
    # The order in which clients try them.
    for family in (socket.AF_INET6, socket.AF_INET):
        for place in sorted({place for kind, _, _, _, place in found if kind is family}, key=str):
            try:
                here.append(socket.create_server(place[:2], family=family, backlog=_BACKLOG))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return None  # the store will say so
                # Another host's address, or one that leads here by translation only.
    chosen = _choose(address, here, is_single_host(world))
    for other in here:
        if other is not chosen:
            other.close()
    if chosen is None:
        log.warning("the store listens on all interfaces: %s is not one address of this host", address)
    return chosen


def _choose(address: str, here: list[socket.socket], one_host: bool) -> socket.socket | None:
    loopback = [ipaddress.ip_address(each.getsockname()[0]).is_loopback for each in here]
    if here and all(loopback):
        # A host's own name often leads itself to its loopback, and the others to its network.
        return here[0] if one_host or _is_loopback(address) else None
    # Of several addresses each client may take another.
    return here[0] if len(here) == 1 else None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
