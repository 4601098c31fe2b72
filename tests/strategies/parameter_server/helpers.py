"""What tests of serving share: connections inside one process, and a worker's links to servers of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distrain.communication.collectives import Communicator, Ledger
from distrain.communication.types import RankName
from distrain.compression.none import NoCompression
from distrain.config.schema import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.parameter_server.client import Link
from distrain.strategies.parameter_server.connect import Door, enter, own_address
from distrain.strategies.parameter_server.protocol import Connection
from distrain.strategies.parameter_server.server import Rules, Server, Shard, Worker

HERE = "here"
CPU = torch.device("cpu")


@contextlib.contextmanager
def pair() -> Iterator[tuple[Connection, Connection]]:
    """Two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        yield Connection(first, "the server"), Connection(second, "the worker")


def rules(**changes: Any) -> Rules:
    """Rules of a server with some changed."""
    values: dict[str, Any] = {
        "mode": "async",
        "staleness": None,
        "in_flight": 0,
        "clip": None,
        "on_nonfinite": "stop",
        "timeout_seconds": 20.0,
        "silence_seconds": 20.0,
        "largest": 1 << 20,
    }
    return Rules(**{**values, **changes})


def layer() -> nn.Linear:
    """A model of 2 parameters with 8 numbers, of ones."""
    made = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.0)
    return made


def gradients(model: nn.Module, link: Link | None) -> Gradients:
    """The model's gradients, carried by a link on a worker."""
    return Gradients(model.named_parameters(), Communicator(), compressor(), Stopwatch(CPU), carrier=link)


def compressor() -> NoCompression:
    """None."""
    return NoCompression(CompressionConfig("none"))


@dataclass
class Running:
    """A server in threads of this process, and links of its workers.

    Attributes:
        server: The server.
        model: What it holds.
        links: One a worker.
        models: Each worker's copy.
        lost: Workers that the server gave up.
        ended: What ``serve`` raised.
        thread: Where it serves.
        gradients: Each worker's.
    """

    server: Server
    model: nn.Linear
    links: list[Link]
    models: list[nn.Linear]
    lost: list[Worker]
    ended: list[BaseException] = field(default_factory=list)
    thread: threading.Thread | None = None
    gradients: list[Gradients] = field(init=False)

    def __post_init__(self) -> None:
        self.gradients = [gradients(model, link) for model, link in zip(self.models, self.links, strict=True)]

    def push(self, worker: int, value: float, count: int = 1, rate: float = 1.0, share: float = 1.0) -> None:
        """Pushes a gradient of equal numbers and takes the parameters that answer it."""
        link = self.links[worker]
        link.begin(1, rate, count, share)
        held = self.gradients[worker]
        for bucket in held.buckets:
            bucket.flat.fill_(value)
        held.begin_last_backward()
        held.finish()
        link.ask()
        link.take()

    def join(self) -> None:
        """Waits until the server ends."""
        assert self.thread is not None
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(
    workers: int, chosen: Rules, optimizer: Callable[..., torch.optim.Optimizer] | None = None
) -> Iterator[Running]:
    """A server of one layer for so many workers, with plain SGD; ended however the test ends."""
    model = layer()
    made = (optimizer or torch.optim.SGD)(model.parameters(), lr=1.0)
    shard = Shard(dict(model.named_parameters()), gradients(model, None), made, compressor())
    door = Door(own_address([HERE]))
    peers = [RankName(rank, HERE) for rank in range(workers)]
    me = RankName(workers, HERE)
    opened: list[dict[str, Connection]] = []

    def come() -> None:
        opened.extend(enter(me, "127.0.0.1", door.port, door.token, peer.rank, 10) for peer in peers)

    coming = threading.Thread(target=come)
    coming.start()
    connections = door.admit(peers, 10)
    coming.join()
    lost: list[Worker] = []
    server = Server(me, shard, chosen, peers, connections, lost.append)
    models = [layer() for _ in peers]
    links = [
        Link(me, each, dict(copy.named_parameters()), compressor(), Stopwatch(CPU), Ledger(), chosen.silence_seconds)
        for each, copy in zip(opened, models, strict=True)
    ]
    run = Running(server, model, links, models, lost)

    def serve() -> None:
        try:
            server.serve()
        except BaseException as error:
            run.ended.append(error)

    run.thread = threading.Thread(target=serve)
    run.thread.start()
    try:
        yield run
    finally:
        for link in links:
            link.abandon(RuntimeError("the test is over"))
        run.join()
