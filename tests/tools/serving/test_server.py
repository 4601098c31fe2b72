"""What slow, endless and broken connections get, and how a server stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop
from fastapi import FastAPI

from distrain.data.decode import decode_bytes
from distrain.tools.serving import server
from tests.harness import HANG_SECONDS
from tests.tools.serving.helpers import LIMITS, encoded, exchange, listening, png, until


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /predict?top=1 HTTP/1.1", "host: x", "content-type: image/png", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split()[1])


#: One byte more than is accepted: what a server leaves unread can break the connection before its answer is read.
HEADER = [b"GET / HTTP/1.1\r\n", b"a: ".ljust((1 << 16) - 15, b"b")]
IMPATIENT = dataclasses.replace(LIMITS, receive_seconds=0.2)
ANNOUNCED = post(b"").replace(b"length: 0", b"length: 9999999999")
#: What is sent, and the status that it gets; the client waits until the server ends the connection.
SENT = {
    "nothing": ([b""], IMPATIENT, 408),
    "empty lines": ([b"\r\n", b"\r\n"], IMPATIENT, 408),
    "half a header": ([b"POST /predict HTTP/1.1\r\nhost:"], IMPATIENT, 408),
    "half a body": ([post(png(1))[:-5]], IMPATIENT, 408),
    "a header without end": (HEADER, LIMITS, 431),
    "something else": ([b"\x16\x03\x01\x02\x00\x01\x00"], LIMITS, 400),
    "too much, which is announced": ([ANNOUNCED], LIMITS, 413),
    "too much": ([post(b"x" * 390_000)], LIMITS, 413),
    "a request to close": ([post(png(1), "connection: close")], LIMITS, 200),
}


@pytest.mark.parametrize("case", SENT)
def test_a_connection_ends_with_a_reason(case: str) -> None:
    pieces, limits, expected = SENT[case]

    async def ask() -> bytes:
        async with listening(limits) as (_, port, _):
            answer = await exchange(port, *pieces)
            if limits is LIMITS:
                assert status(await exchange(port, post(png(1), "connection: close"))) == 200
            return answer

    answer = asyncio.run(ask())
    assert status(answer) == expected
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert answer.endswith(b"}")


def test_a_body_that_nobody_reads_ends_the_connection() -> None:
    async def ask() -> bytes:
        async with listening() as (_, port, _):
            request = b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await reader.readuntil(b"}")
            writer.write(b"5\r\nhello\r\n" * 100)
            rest = await asyncio.wait_for(reader.read(), HANG_SECONDS)
            writer.close()
            return answer + rest

    assert status(asyncio.run(ask())) == 404


@pytest.mark.parametrize("behind", ["a request that waits", "the last piece of a body"])
def test_a_header_without_end_is_noticed_behind(behind: str) -> None:
    request, pieces = post(png(51)), HEADER
    if behind == "the last piece of a body":
        request = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"
        request += b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
        pieces = HEADER[1:] + HEADER[:1]

    async def ask() -> bytes:
        async with listening() as (served, port, model):
            model.may_go.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            # The request has arrived as a whole, and what follows is read by itself.
            await until(lambda: len(served.server_state.tasks) == 1)
            for piece in pieces:
                writer.write(piece)
            answer = await asyncio.wait_for(reader.read(), HANG_SECONDS)
            writer.close()
            return answer

    assert status(asyncio.run(ask())) == 431


def test_connections_beyond_the_limit_are_told_so() -> None:
    async def ask() -> tuple[bytes, bytes]:
        async with listening(dataclasses.replace(LIMITS, connections=1)) as (served, port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: len(served.server_state.connections) == 1)
            second = await exchange(port)
            writer.write(post(png(1)))
            first = await reader.readuntil(b"}")
            writer.close()
            return first, second

    first, second = asyncio.run(ask())
    assert (status(first), status(second)) == (200, 503)


def test_a_client_that_does_not_read_is_let_go() -> None:
    request = b"GET /page.css HTTP/1.1\r\nhost: x\r\n\r\n"

    async def send_for_ever(client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(client, request)
            await asyncio.sleep(0)

    async def ask() -> None:
        async with listening(IMPATIENT) as (served, port, _):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setblocking(False)
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(send_for_ever(client), HANG_SECONDS)
            await until(lambda: not served.server_state.connections)

    asyncio.run(ask())


def test_requests_of_clients_that_are_gone_leave_the_queue() -> None:
    async def ask() -> None:
        async with listening() as (served, port, model):
            model.may_go.clear()
            first = asyncio.create_task(exchange(port, post(png(51), "connection: close")))
            await until(model.works.is_set)
            others = [asyncio.create_task(exchange(port, post(png(51)))) for _ in range(3)]
            await until(lambda: len(served.server_state.tasks) == 4)
            for other in others:
                other.cancel()
            await until(lambda: len(served.server_state.tasks) == 1)
            model.may_go.set()
            assert status(await first) == 200
            assert status(await exchange(port, post(png(51), "connection: close"))) == 200
            assert model.batches == [1, 1]

    asyncio.run(ask())


def test_images_of_a_client_that_is_gone_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go, places = threading.Event(), threading.Event(), list[str]()

    def held(data: bytes, name: str, *rest: Any) -> Any:
        places.append(name)
        begun.set()
        assert may_go.wait(HANG_SECONDS)
        return decode_bytes(data, name, *rest)

    monkeypatch.setattr("distrain.tools.serving.content.decode_bytes", held)
    three = json.dumps({"images": [encoded(51)] * 3}).encode()

    async def ask() -> None:
        async with listening() as (served, port, _):
            client = asyncio.create_task(exchange(port, post(three).replace(b"image/png", b"application/json")))
            await until(begun.is_set)
            client.cancel()
            await until(lambda: not served.server_state.tasks)
            may_go.set()
            # It waits for the same thread.
            assert status(await exchange(port, post(png(51), "connection: close"))) == 200

    asyncio.run(ask())
    assert places == ["images[0]", "images[0]"]


def test_a_server_that_stops_answers_what_it_has_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait for the model, and one that arrives on an open connection after the request to stop."""
    monkeypatch.setattr(server, "_LAST_REQUESTS_SECONDS", HANG_SECONDS)

    async def ask() -> None:
        async with listening() as (served, port, model):
            model.may_go.clear()
            waiting = [asyncio.create_task(exchange(port, post(png(51)))) for _ in range(3)]
            await until(model.works.is_set)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: len(served.server_state.connections) == 4)
            served.should_exit = True
            await until(lambda: cast(FastAPI, served.config.app).state.is_stopping)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
            ready = await reader.read()
            assert (status(ready), b"connection: close" in ready) == (503, True)
            writer.close()
            await until_refused(port)
            model.may_go.set()
            assert [status(await task) for task in waiting] == [200, 200, 200]

    asyncio.run(ask())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_arrives_before_the_last_moment_is_answered(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel accepts it, and the event loop sees nothing of it before the server no longer listens."""
    late: list[socket.socket] = []

    async def ask() -> bytes:
        async with listening() as (served, port, _):
            stop_accepting = served._stop_accepting

            async def stop_later(sockets: list[socket.socket]) -> None:
                late.append(socket.create_connection(("127.0.0.1", port), HANG_SECONDS))
                late[0].sendall(post(png(51)))
                # A busy kernel may tell the client first that they are connected.
                assert select.select(sockets, [], [], HANG_SECONDS)[0]
                await stop_accepting(sockets)

            monkeypatch.setattr(served, "_stop_accepting", stop_later)
            served.should_exit = True
            await until(lambda: bool(late))
            late[0].setblocking(False)
            reader, writer = await asyncio.open_connection(sock=late[0])
            answer = await asyncio.wait_for(reader.read(), HANG_SECONDS)
            writer.close()
            return answer

    with contextlib.closing(new_loop()) as loop:
        answer = loop.run_until_complete(ask())
    assert (status(answer), b"connection: close" in answer) == (200, True)


def test_connections_are_taken_in_spite_of_clients_that_are_gone_and_too_many_open_files() -> None:
    ours, theirs = socket.socketpair()
    waiting = iter([ConnectionAbortedError(), (ours, None), OSError(errno.EMFILE, "too many open files")])

    class Listening(socket.socket):
        def accept(self) -> Any:
            result = next(waiting)
            if isinstance(result, OSError):
                raise result
            return result

    with ours, theirs:
        assert server._take_all(Listening()) == [ours]


async def until_refused(port: int) -> None:
    """Waits until connections are refused."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return
        writer.close()
        await asyncio.sleep(0.01)


def test_what_takes_too_long_is_cancelled_when_a_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LAST_REQUESTS_SECONDS", 0.0)

    async def ask() -> bytes:
        async with listening(stop_seconds=1) as (served, port, model):
            model.may_go.clear()
            task = asyncio.create_task(exchange(port, post(png(51))))
            await until(model.works.is_set)
            served.should_exit = True
            return await asyncio.wait_for(task, HANG_SECONDS)

    assert status(asyncio.run(ask())) == 500


def test_an_address_in_use_cannot_be_bound() -> None:
    with server.bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            server.bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(OSError, match="no name of a host"):
        server.bind("a" * 100, 0)
    with server.bind("0.0.0.0", 0) as everywhere:
        assert server.url(everywhere) == f"http://127.0.0.1:{everywhere.getsockname()[1]}"
