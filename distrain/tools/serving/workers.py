"""Several server processes behind one socket: started, replaced when one dies, and stopped together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from typing import Any

from distrain.errors import EXIT_FAILED
from distrain.files.terminal import print_to_stderr
from distrain.tools.serving.metrics import SHARED_FOLDER

#: What a worker does: serves on the socket until a signal, and calls the function when it accepts connections.
Work = Callable[[socket.socket, Callable[[], None]], None]

#: Seconds between two looks at the workers, and before a worker that has died is replaced.
_LOOK_SECONDS, _PAUSE_SECONDS = 0.2, 1.0
#: Seconds beyond the limit for stopping after which a worker is killed.
_KILL_SECONDS = 5.0


@dataclass
class _Worker:
    process: SpawnProcess
    ready: Event


class Workers:
    """The workers of one server.

    Args:
        count: How many.
        work: What each does; it travels to new processes, so it must be possible to pickle it.
        listening: The bound socket that they share.
        stop_seconds: Time that a worker has to stop.
    """

    def __init__(self, count: int, work: Work, listening: socket.socket, stop_seconds: float) -> None:
        self._count, self._work, self._listening, self._stop_seconds = count, work, listening, stop_seconds
        self._context = multiprocessing.get_context("spawn")
        # No event: its lock may be held by the very thread that a signal's handler interrupts.
        self._is_stopping = False
        self._workers: list[_Worker] = []

    def run(self, on_start: Callable[[], None]) -> int:
        """Runs the workers until SIGTERM or SIGINT.

        Args:
            on_start: Called when all workers accept connections for the first time.

        Returns:
            0, or the exit code of a worker that could not start; 1 if a signal ended it.
        """
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        with tempfile.TemporaryDirectory(prefix="distrain-serve-") as folder:
            os.environ[SHARED_FOLDER] = folder
            try:
                self._workers = [self._start() for _ in range(self._count)]
                code = self._await_start()
                if code == 0 and not self._is_stopping:
                    on_start()
                    self._watch(folder)
                return code
            finally:
                self._end()
                del os.environ[SHARED_FOLDER]
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, *_: Any) -> None:
        self._is_stopping = True

    def _start(self) -> _Worker:
        ready = self._context.Event()
        process = self._context.Process(target=_run, args=(self._work, self._listening, ready), name="distrain-serve")
        process.start()
        return _Worker(process, ready)

    def _await_start(self) -> int:
        """Waits until all accept connections; returns the exit code of one that has ended instead."""
        while not self._is_stopping and not all(worker.ready.is_set() for worker in self._workers):
            for worker in self._workers:
                code = worker.process.exitcode
                if code is not None and code < 0:
                    print_to_stderr(
                        f"distrain: worker {worker.process.pid} has ended ({_cause(code)}) while it started"
                    )
                    return EXIT_FAILED
                if code is not None:
                    return code or EXIT_FAILED
            time.sleep(_LOOK_SECONDS)
        return 0

    def _watch(self, folder: str) -> None:
        """Replaces workers that have died, until the server is asked to stop."""
        from prometheus_client import multiprocess

        while not self._is_stopping:
            wait([worker.process.sentinel for worker in self._workers], timeout=_LOOK_SECONDS)
            for place, worker in enumerate(self._workers):
                code = worker.process.exitcode
                if code is None or self._is_stopping:
                    continue
                print_to_stderr(f"distrain: worker {worker.process.pid} has ended ({_cause(code)}); another one starts")
                multiprocess.mark_process_dead(worker.process.pid, folder)  # type: ignore[no-untyped-call]
                # A worker that dies at once would otherwise be started without end.
                time.sleep(_PAUSE_SECONDS)
                if not self._is_stopping:
                    self._workers[place] = self._start()

    def _end(self) -> None:
        # Connections that no worker has taken would wait as long as this socket is open.
        self._listening.close()
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + self._stop_seconds + _KILL_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.exitcode is None:
                print_to_stderr(f"distrain: worker {worker.process.pid} did not stop in time, and is killed")
                worker.process.kill()
                worker.process.join()


def _cause(code: int) -> str:
    """Why a process has ended, by its exit code as :mod:`multiprocessing` gives it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _run(work: Work, listening: socket.socket, ready: Event) -> None:
    """What a worker process runs."""
    # Ctrl-C comes to all processes of a terminal; the parent stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_stop_with, args=(parent.sentinel,), daemon=True).start()
    work(listening, ready.set)


def _stop_with(parent: int) -> None:
    """Stops this worker when its parent has died, which could not say so."""
    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)
