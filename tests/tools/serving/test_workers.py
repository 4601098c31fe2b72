"""Workers that share a socket are started, replaced and stopped together."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from distrain.tools.serving import server
from distrain.tools.serving.workers import Work, Workers
from tests.harness import HANG_SECONDS
from tests.tools.serving.little_worker import die, fail, say_pid


def ask(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as connection:
        return int(connection.recv(100))


def test_a_worker_that_dies_is_replaced_and_all_stop_together(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bound = server.bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    seen: list[int] = []

    def use() -> None:
        first = ask(port)
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + HANG_SECONDS
        while time.monotonic() < until and len(seen) < 2:
            with contextlib.suppress(ConnectionError, ValueError):
                pid = ask(port)
                if pid not in (first, *seen):
                    seen.append(pid)
        os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=use)
    workers = Workers(2, functools.partial(say_pid, str(tmp_path)), bound, HANG_SECONDS)
    assert workers.run(client.start) == 0
    client.join(HANG_SECONDS)
    assert len(seen) == 2
    # Both ended by themselves.
    assert {int(path.name) for path in tmp_path.iterdir()} == set(seen)
    assert "(SIGKILL); another one starts" in capfd.readouterr().err


@pytest.mark.parametrize(("work", "code", "said"), [(fail, 7, ""), (die, 1, "has ended (SIGKILL) while it started")])
def test_a_worker_that_cannot_start_ends_the_server_with_an_exit_code(
    work: Work, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[bool] = []
    assert Workers(1, work, server.bind("127.0.0.1", 0), 1).run(lambda: started.append(True)) == code
    assert not started
    assert said in capfd.readouterr().err
