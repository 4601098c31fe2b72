"""One server process: accepts connections until it is asked to stop, then answers all requests that it has accepted."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from typing_extensions import override

from distrain.tools.serving.limits import Limits
from distrain.tools.serving.protocol import LimitedProtocol

#: Seconds in which requests that are on their way on open connections still arrive after a request to stop.
_LAST_REQUESTS_SECONDS = 1.0
#: Seconds between two looks at what is left.
_LOOK_SECONDS = 0.02
#: Seconds that a connection without requests stays open.
_KEEP_ALIVE_SECONDS = 30


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which also answers requests that are on their way when it is asked to stop.

    Args:
        config: uvicorn's.
        on_start: Called when connections are accepted.
        on_stop: Called when no more are.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        self._announce_end()
        await self._stop_accepting(sockets or [])
        await self._answer_last_requests()
        await super().shutdown(sockets)

    def _announce_end(self) -> None:
        """Lets each connection end with the next answer. A client that sees it end sooner can't tell what was done."""
        state = self.server_state
        state.default_headers = [*state.default_headers, (b"connection", b"close")]
        for connection in cast("set[LimitedProtocol]", state.connections):
            if connection.is_busy:
                connection.shutdown()

    async def _stop_accepting(self, sockets: list[socket.socket]) -> None:
        """Closes the sockets that listen, but first takes the connections that the kernel has accepted.

        The loop may be busy for long before it closes a socket, and what has arrived until then would be reset. So a
        copy of the socket keeps it open until nothing waits there.
        """
        copies = [listening.dup() for listening in sockets]
        for server in self.servers:
            server.close()
        connections = [connection for copy in copies for connection in _take_all(copy)]
        loop = asyncio.get_running_loop()
        # One whose client is gone already may fail.
        await asyncio.gather(
            *(loop.connect_accepted_socket(self._protocol, connection) for connection in connections),
            return_exceptions=True,
        )

    def _protocol(self) -> asyncio.Protocol:
        """For a connection that the loop has not accepted itself; as uvicorn makes them."""
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def _answer_last_requests(self) -> None:
        """Waits for requests that are on their way on open connections; those without one end a little later."""
        loop = asyncio.get_running_loop()
        until = loop.time() + min(_LAST_REQUESTS_SECONDS, self.config.timeout_graceful_shutdown or 0)
        while self.server_state.connections and loop.time() < until and not self.force_exit:
            await asyncio.sleep(_LOOK_SECONDS)


def _take_all(listening: socket.socket) -> list[socket.socket]:
    """Accepts the connections that wait at a socket, and closes it."""
    connections: list[socket.socket] = []
    with listening:
        listening.setblocking(False)
        while True:
            try:
                connection, _ = listening.accept()
            except ConnectionError:
                # This client is gone already; others may wait behind it.
                continue
            except OSError:
                # None waits any more, or this process may open no more files.
                return connections
            connection.setblocking(False)
            connections.append(connection)


def make_server(app: FastAPI, limits: Limits, stop_seconds: float, on_start: Callable[[], None]) -> GracefulServer:
    """A server for an application.

    Args:
        app: The application.
        limits: Those of connections.
        stop_seconds: Time to answer accepted requests when it is asked to stop; what takes longer is cancelled.
        on_start: Called when connections are accepted.
    """
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", functools.partial(LimitedProtocol, limits=limits)),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(stop_seconds)),
    )

    def on_stop() -> None:
        app.state.is_stopping = True

    return GracefulServer(config, on_start, on_stop)


def run(server: GracefulServer, listening: socket.socket) -> None:
    """Serves on a bound socket until SIGTERM or SIGINT; in the main thread."""
    # uvicorn restores these handlers when it has stopped, and then raises the signals it has got once more.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(*_: Any) -> None:
    """A handler of a signal that has been obeyed already."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; connections are refused until a server listens.

    Raises:
        OSError: The address is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:
        raise OSError("no name of a host") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def url(bound: socket.socket) -> str:
    """How a browser on this machine reaches a socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - the address of all interfaces
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
