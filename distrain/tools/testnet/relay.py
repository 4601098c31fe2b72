"""A software switch that delays every frame and drops some: ``python relay.py SECONDS LOSS PORT...``.

Provides delay and loss on every kernel, because not all have netem. Port i leads to the host whose MAC address is
:func:`hardware_address` of i.
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
# Linux's options of packet sockets. With PACKET_VNET_HDR each frame comes with a header that describes pending
# segmentation and checksums, so that oversized frames without checksums pass unchanged between interfaces.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_HEADER_BYTES = 10
_MAX_FRAME_BYTES = 1 << 17
#: Most frames taken from one port before the next port is served.
_FRAMES_PER_TURN = 64


def hardware_address(port: int) -> str:
    """MAC address of the host behind a port, counted from 0."""
    return f"02:00:00:00:{port >> 8:02x}:{port & 255:02x}"


def _open(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    for forced, allowed in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            port.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
        except PermissionError:
            # Root of a user namespace is bound by the system's limit for all users.
            port.setsockopt(socket.SOL_SOCKET, allowed, _BUFFER)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def relay(names: list[str], delay: float, loss: float) -> None:
    """Forwards frames until the process is ended.

    Args:
        names: Interface of each port.
        delay: Seconds by which each frame is delayed.
        loss: Share of frames that are dropped, from 0 to 1.
    """
    ports = [_open(name) for name in names]
    print("ready", flush=True)
    waiting: collections.deque[tuple[float, list[socket.socket], bytes]] = collections.deque()
    while True:
        # All frames have the same delay, so they leave in order of arrival.
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], timeout)[0]:
            for _ in range(_FRAMES_PER_TURN):
                try:
                    frame = port.recv(_MAX_FRAME_BYTES)
                except OSError:
                    # No frame is waiting, or the host is gone.
                    break
                if random.random() >= loss:
                    waiting.append((time.monotonic() + delay, _targets(ports, port, frame), frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, targets, frame = waiting.popleft()
            for port in targets:
                # The host is gone or its buffer is full: the frame is dropped, as on a real link.
                with contextlib.suppress(OSError):
                    port.send(frame)


def _targets(ports: list[socket.socket], source: socket.socket, frame: bytes) -> list[socket.socket]:
    target = frame[_HEADER_BYTES : _HEADER_BYTES + 6]
    if target[0] & 1:
        return [port for port in ports if port is not source]
    number = target[4] << 8 | target[5]
    return [ports[number]] if number < len(ports) else []


if __name__ == "__main__":
    relay(sys.argv[3:], float(sys.argv[1]), float(sys.argv[2]))
