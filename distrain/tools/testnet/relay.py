"""A switch that holds every frame back and loses some: ``python relay.py SECONDS LOSS PORT...``.

For kernels without netem, and the same on those that have it. Port number i leads to the host with the address
``02:00:00:00:xx:xx`` that :func:`hardware_address` gives.
"""

from __future__ import annotations

import collections
import contextlib
import random
import select
import socket
import sys
import time

_ETH_P_ALL = 3
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 32 << 20
# Linux's options of packet sockets. With a header that says what is left to do, frames larger than the wire's pass
# whole and without their checksums, as the interfaces of one machine hand them to each other.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_HEADER = 10
_LARGEST = 1 << 17
#: Frames taken from one port before the others have their turn.
_TURN = 64


def hardware_address(port: int) -> str:
    """The address of the interface behind a port, counted from 0."""
    return f"02:00:00:00:{port >> 8:02x}:{port & 255:02x}"


def _open(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    for forced, allowed in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            port.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
        except PermissionError:
            # The root of a user namespace gets what the system allows everybody.
            port.setsockopt(socket.SOL_SOCKET, allowed, _BUFFER)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def relay(names: list[str], delay: float, loss: float) -> None:
    """Passes frames on until the process is ended.

    Args:
        names: The interface of each port.
        delay: Seconds by which each frame is held back.
        loss: Share of the frames that go nowhere, from 0 to 1.
    """
    ports = [_open(name) for name in names]
    print("ready", flush=True)
    waiting: collections.deque[tuple[float, list[socket.socket], bytes]] = collections.deque()
    while True:
        # The delay is one for all, so what came first leaves first.
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], timeout)[0]:
            for _ in range(_TURN):
                try:
                    frame = port.recv(_LARGEST)
                except OSError:
                    # Empty, or its host has gone.
                    break
                if random.random() >= loss:
                    waiting.append((time.monotonic() + delay, _targets(ports, port, frame), frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, targets, frame = waiting.popleft()
            for port in targets:
                # A host that is gone or can't keep up: the frame is lost, as on a wire.
                with contextlib.suppress(OSError):
                    port.send(frame)


def _targets(ports: list[socket.socket], source: socket.socket, frame: bytes) -> list[socket.socket]:
    target = frame[_HEADER : _HEADER + 6]
    if target[0] & 1:
        return [port for port in ports if port is not source]
    number = target[4] << 8 | target[5]
    return [ports[number]] if number < len(ports) else []


if __name__ == "__main__":
    relay(sys.argv[3:], float(sys.argv[1]), float(sys.argv[2]))
