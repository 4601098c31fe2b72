"""A port that belongs to a program which is no store: the rank ends in time and names the address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from distrain.runtime.bind_address import within_time
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import HANG_SECONDS
from tests.runs import small

Answer = Callable[[socket.socket, threading.Event], object]


def reset(connection: socket.socket, _: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def repeat(data: bytes, pause: float) -> Answer:
    def answer(connection: socket.socket, closing: threading.Event) -> None:
        while not closing.wait(pause):
            connection.sendall(data)

    return answer


def once(data: bytes, *, close: bool) -> Answer:
    def answer(connection: socket.socket, closing: threading.Event) -> None:
        connection.recv(1)
        connection.sendall(data)
        if close:
            connection.close()
        closing.wait()

    return answer


def echo(connection: socket.socket, _: threading.Event) -> None:
    while data := connection.recv(1000):
        connection.sendall(data)


ANSWERS: dict[str, Answer | None] = {
    "is silent": lambda _, closing: closing.wait(),
    "closes at once": lambda connection, _: connection.close(),
    "resets at once": reset,
    "speaks HTTP": once(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", close=True),
    "speaks HTTP and stays": once(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", close=False),
    "sends garbage": once(bytes(range(256)) * 100, close=False),
    "sends a banner": once(b"SSH", close=False),
    "answers a byte at a time": repeat(b"\0", 0.3),
    "floods": repeat(b"\xff" * 10_000, 0.001),
    "echoes": echo,
    "lets nobody in": None,
}


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port at which something answers in the way that the test names."""
    answer, closing = ANSWERS[request.param], threading.Event()
    connections: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0 if answer is None else 20))
        number = int(server.getsockname()[1])

        def run(connection: socket.socket, answer: Answer) -> None:
            with contextlib.suppress(OSError):
                answer(connection, closing)

        def accept(answer: Answer) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(server.accept()[0])
                    threading.Thread(target=run, args=(connections[-1], answer), daemon=True).start()

        if answer is None:
            # The backlog is full, so the system drops what else wants to connect.
            for _ in range(3):
                connections.append(socket.socket())
                connections[-1].setblocking(False)
                connections[-1].connect_ex(("127.0.0.1", number))
        else:
            threading.Thread(target=accept, args=(answer,), daemon=True).start()
        yield number
        closing.set()
        # This also ends the thread that waits for an answer.
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@pytest.mark.parametrize("port", ANSWERS, indirect=True)
def test_a_program_that_is_no_store_is_named_in_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    configuration = small("strategy=ddp", "runtime.setup_timeout_seconds=0.2")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"can't reach the store at 127\.0\.0\.1:{port}: .+another program's"):
        Runtime(configuration, World(1, 2, 1, 2, "here"))._connect(serves=False)
    assert time.monotonic() - began < HANG_SECONDS


def test_ctrl_c_is_handled_while_a_store_does_not_answer() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before, released = signal.signal(signal.SIGUSR2, interrupt), threading.Event()
    try:
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        timer.start()
        with pytest.raises(Interrupted):
            within_time(released.wait, HANG_SECONDS)
    finally:
        released.set()
        signal.signal(signal.SIGUSR2, before)
