"""Times the connections of a parameter server, which are sockets and not the process group's."""

from __future__ import annotations

import statistics
import time

import torch

from distrain.communication.collectives import Communicator
from distrain.communication.types import RankName
from distrain.runtime.world import World
from distrain.strategies.parameter_server.connect import Listener, connect_to_server, listen_address
from distrain.strategies.parameter_server.protocol import Connection, FrameKind
from distrain.tools.planning.cluster import Link, LinkPoint

#: Sizes of the messages in bytes, and how often each goes there and back after a first time.
_SIZES, _REPEATS = (0, 64 * 1024, 4 * 2**20), 5


def measure_sockets(everyone: Communicator, world: World, device: torch.device, seconds: float) -> Link:
    """Times messages between the first rank, as a worker, and the last one, as a server; all ranks call it together.

    Args:
        everyone: All ranks, at least two.
        world: This rank's place.
        device: Of the process group's tensors.
        seconds: How long to wait for a connection.

    Returns:
        The link, the same on all ranks.
    """
    last = world.size - 1
    hosts = [str(row["host"]) for row in everyone.all_gather_json({"host": world.host}, device)]
    listener: Listener | None = None
    endpoint: dict[str, object] = {}
    if world.rank == last:
        address = listen_address(hosts)
        listener = Listener(address)
        endpoint = {"address": address.advertise, "port": listener.port, "token": listener.token}
    endpoint = everyone.all_gather_json(endpoint, device)[last]
    times = [0.0] * len(_SIZES)
    connections: list[Connection] = []
    if listener is not None:
        accepted = listener.accept_workers([RankName(0, hosts[0])], seconds)
        connections = list(accepted.values())
        _answer(accepted[0, "parameters"])
    elif world.rank == 0:
        server, port = RankName(last, hosts[last]), int(str(endpoint["port"]))
        opened = connect_to_server(server, str(endpoint["address"]), port, str(endpoint["token"]), 0, seconds)
        connections = list(opened.values())
        times = [_round_trip(opened["parameters"], size) / 2 for size in _SIZES]
    everyone.barrier()
    for connection in connections:
        connection.close()
    times = everyone.all_gather_json({"times": times}, device)[0]["times"]
    return Link(tuple(LinkPoint(size, one) for size, one in zip(_SIZES, times, strict=True)))


def _round_trip(connection: Connection, size: int) -> float:
    body = torch.zeros(size, dtype=torch.uint8)
    taken = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        connection.send(FrameKind.BUCKET, None, body)
        connection.read_body(connection.receive(FrameKind.BUCKET), size)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def _answer(connection: Connection) -> None:
    """Sends back what :func:`_round_trip` sends."""
    for size in _SIZES:
        for _ in range(_REPEATS + 1):
            body = connection.read_body(connection.receive(FrameKind.BUCKET), size)
            connection.send(FrameKind.BUCKET, None, body)
