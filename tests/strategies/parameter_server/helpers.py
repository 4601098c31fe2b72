"""Helpers of the parameter server's tests: connections and servers inside one process."""

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
from distrain.config.groups import CompressionConfig
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.parameter_server.client import ServerClient
from distrain.strategies.parameter_server.connect import Listener, connect_to_server, listen_address
from distrain.strategies.parameter_server.protocol import Connection
from distrain.strategies.parameter_server.server import Server
from distrain.strategies.parameter_server.server_policy import ServerPolicy
from distrain.strategies.parameter_server.server_shard import ServerShard
from distrain.strategies.parameter_server.worker_record import WorkerRecord
from tests.harness import HANG_SECONDS

HERE = "here"
CPU = torch.device("cpu")
#: The JSON of a push's first frame.
PUSH_HEADER = {"step": 1, "learning_rate": 1.0, "share": 1.0, "samples": 1, "version": 0, "requests": 0}


@contextlib.contextmanager
def connected_pair() -> Iterator[tuple[Connection, Connection]]:
    """Yields both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        yield Connection(first, "the server"), Connection(second, "the worker")


def server_policy(**changes: Any) -> ServerPolicy:
    """A server's policy with some values changed."""
    values: dict[str, Any] = {
        "mode": "async",
        "staleness": None,
        "in_flight": 0,
        "max_gradient_norm": None,
        "on_nonfinite": "stop",
        "timeout_seconds": HANG_SECONDS,
        "heartbeat_timeout_seconds": HANG_SECONDS,
        "max_collective_bytes": 1 << 20,
    }
    return ServerPolicy(**{**values, **changes})


def layer_of_ones() -> nn.Linear:
    """A model of two parameters, which together hold 8 ones."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    return layer


def common_value(model: torch.nn.Linear) -> float:
    """The value of all parameters, which have to be equal."""
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert bool((values == values[0]).all())
    return float(values[0])


def make_gradients(model: nn.Module, client: ServerClient | None) -> Gradients:
    """The model's gradients; on a worker its client carries them to the server."""
    return Gradients(model.named_parameters(), Communicator(), no_compression(), Stopwatch(CPU), carrier=client)


def no_compression() -> NoCompression:
    """A compressor that does not compress."""
    return NoCompression(CompressionConfig("none"))


@dataclass
class RunningServer:
    """A server that runs in threads of this process, and its workers' clients.

    Attributes:
        server: The server.
        model: The model whose parameters it holds.
        clients: One for each worker.
        models: Each worker's copy of the model.
        lost: Records of the workers that the server lost.
        errors: What ``serve`` raised.
        thread: The thread that runs ``serve``.
        gradients: Each worker's gradients.
    """

    server: Server
    model: nn.Linear
    clients: list[ServerClient]
    models: list[nn.Linear]
    lost: list[WorkerRecord]
    errors: list[BaseException] = field(default_factory=list)
    thread: threading.Thread | None = None
    gradients: list[Gradients] = field(init=False)

    def __post_init__(self) -> None:
        self.gradients = [
            make_gradients(model, client) for model, client in zip(self.models, self.clients, strict=True)
        ]

    def push(self, worker: int, value: float, samples: int = 1, learning_rate: float = 1.0, share: float = 1.0) -> None:
        """Pushes a gradient whose values are all ``value`` and takes the parameters that answer it."""
        client = self.clients[worker]
        client.begin_push(1, learning_rate, samples, share)
        gradients = self.gradients[worker]
        for bucket in gradients.buckets:
            bucket.flat.fill_(value)
        gradients.begin_last_backward()
        gradients.finish()
        client.start_receiving()
        client.take_parameters()

    def join(self) -> None:
        """Waits until the server ends."""
        assert self.thread is not None
        self.thread.join(HANG_SECONDS)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running_server(
    workers: int, policy: ServerPolicy, optimizer: Callable[..., torch.optim.Optimizer] | None = None
) -> Iterator[RunningServer]:
    """Runs a server of one layer, by default with plain SGD, until the test ends."""
    model = layer_of_ones()
    server_optimizer = (optimizer or torch.optim.SGD)(model.parameters(), lr=1.0)
    shard = ServerShard(dict(model.named_parameters()), make_gradients(model, None), server_optimizer, no_compression())
    listener = Listener(listen_address([HERE]))
    names = [RankName(rank, HERE) for rank in range(workers)]
    server_name = RankName(workers, HERE)
    worker_connections: list[dict[str, Connection]] = []

    def connect_workers() -> None:
        worker_connections.extend(
            connect_to_server(server_name, "127.0.0.1", listener.port, listener.token, worker.rank, HANG_SECONDS)
            for worker in names
        )

    connecting = threading.Thread(target=connect_workers)
    connecting.start()
    server_connections = listener.accept_workers(names, HANG_SECONDS)
    connecting.join()
    lost: list[WorkerRecord] = []
    server = Server(server_name, shard, policy, names, server_connections, lost.append)
    models = [layer_of_ones() for _ in names]
    clients = [
        ServerClient(
            server_name,
            connections,
            dict(copy.named_parameters()),
            no_compression(),
            Stopwatch(CPU),
            Ledger(),
            policy.heartbeat_timeout_seconds,
        )
        for connections, copy in zip(worker_connections, models, strict=True)
    ]
    run = RunningServer(server, model, clients, models, lost)

    def serve() -> None:
        try:
            server.serve()
        except BaseException as error:
            run.errors.append(error)

    run.thread = threading.Thread(target=serve)
    run.thread.start()
    try:
        yield run
    finally:
        for client in clients:
            client.abandon(RuntimeError("the test is over"))
        run.join()
