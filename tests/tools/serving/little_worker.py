"""Work for worker processes that starts quickly: it imports neither a server nor a model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path


def say_pid(folder: str, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Answers each connection with this process's number until SIGTERM, and then leaves a file of this name."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    bound.listen()
    bound.settimeout(0.05)
    on_start()
    while not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            connection, _ = bound.accept()
            with connection:
                connection.sendall(str(os.getpid()).encode())
    Path(folder, str(os.getpid())).touch()


def die(bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Is killed before it has accepted anything."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Ends without having accepted anything."""
    sys.exit(7)
