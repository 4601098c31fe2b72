"""Worker processes that read samples, in the order in which they are asked for, some batches ahead.

They are those of :class:`torch.utils.data.DataLoader`. This module adds what it leaves open: which process starts them,
one line for a sample that can't be read and for a worker that dies, and that a worker never outlives its rank.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distrain import torch_internals
from distrain.data.reading import CheckedReader, Failure, Request, Samples, read_samples
from distrain.errors import SampleError
from distrain.runtime.device import RandomState, available_cores
from distrain.runtime.world import World

#: Batches that each worker prepares ahead.
_AHEAD = 2
#: Most workers of a rank unless the user wants more.
_MOST_WORKERS = 8
#: Signals that ask a rank to end; a terminal and a batch system send them to its workers too, which must go on then.
_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1") if hasattr(signal, name)
]


class ItemWorkers:
    """Reads samples in worker processes, or in this process if there are none.

    The processes start when they are needed first, and stay until :meth:`close`. One reading can be in progress at a
    time: beginning another one ends it.

    Args:
        count: Number of processes; 0: read in this process. ``None``: one for each core of this rank, at most 8.
        prefetch: Batches that are prepared ahead by all processes together; ``None``: two by each.
    """

    def __init__(self, count: int | None = None, prefetch: int | None = None) -> None:
        self._count, self._prefetch = count, prefetch
        self._readers: list[CheckedReader] = []
        self._pool: _Pool | None = None
        self._lock = threading.RLock()
        self._reading = 0

    @property
    def count(self) -> int:
        """Number of processes."""
        if self._count is not None:
            return self._count
        return max(1, min(_MOST_WORKERS, available_cores() // World.from_environment().local_size))

    def add(self, reader: CheckedReader) -> int:
        """Adds a reader and returns its number for requests."""
        self.close()
        self._readers.append(reader)
        return len(self._readers) - 1

    def read(self, requests: Iterable[Request]) -> Generator[Samples, None, None]:
        """Yields what is asked for, in that order.

        Args:
            requests: Advanced some batches ahead.

        Raises:
            SampleError: A sample can't be read, or a worker died; or another reading has begun meanwhile.
        """
        with self._lock:
            self._reading += 1
            own = self._reading
            batches = self._begin(requests)
        while True:
            # Another thread may begin another reading; see `distrain.data.prefetch`.
            with self._lock:
                if self._reading != own:
                    raise SampleError("another reading of the same data set has begun")
                try:
                    result = next(batches, None)
                    if isinstance(result, Failure):
                        raise SampleError(result.line) from RuntimeError(result.stack)
                except SampleError:
                    self.close()
                    raise
            if result is None:
                return
            yield result

    def close(self) -> None:
        """Ends the processes."""
        with self._lock:
            self._reading += 1
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.close()

    def _begin(self, requests: Iterable[Request]) -> Iterator[Samples | Failure]:
        if not self.count:
            return self._read_here(requests)
        if self._pool is None:
            ahead = _AHEAD if self._prefetch is None else max(1, math.ceil(self._prefetch / self.count))
            self._pool = _Pool(self._readers, self.count, ahead)
        return self._pool.read(requests)

    def _read_here(self, requests: Iterable[Request]) -> Iterator[Samples | Failure]:
        for request in requests:
            before = RandomState.now()
            try:
                result = read_samples(self._readers, request)
            finally:
                before.restore()
            yield result


class _Board:
    """Shared memory between a rank and its workers.

    ``cells[0]`` is the number of the reading that is in progress: a worker drops what belongs to an earlier one. Two
    more cells of each worker tell which sample of which reader it is reading, so that its death can be explained.
    """

    def __init__(self, workers: int) -> None:
        self.cells = torch.full((1 + 2 * workers,), -1, dtype=torch.int64).share_memory_()

    def sample_of(self, worker: int) -> tuple[int, int]:
        reader, row = self.cells[1 + 2 * worker : 3 + 2 * worker].tolist()
        return reader, row

    def note(self, worker: int, reader: int, row: int) -> None:
        self.cells[1 + 2 * worker], self.cells[2 + 2 * worker] = reader, row


class _Requested(Dataset[Any]):
    """What worker processes hold: the readers. Its items are the answers to requests."""

    def __init__(self, readers: list[CheckedReader], board: _Board) -> None:
        self._readers, self._board, self._worker = readers, board, 0

    def begin(self, worker: int) -> None:
        self._worker = worker

    def __getitems__(self, numbered: tuple[int, Request]) -> Samples | Failure | None:
        """DataLoader calls it with an element of the batch sampler."""
        reading, request = numbered
        if reading != int(self._board.cells[0]):
            return None
        result = read_samples(self._readers, request, lambda row: self._board.note(self._worker, request.reader, row))
        self._board.note(self._worker, -1, -1)
        return result


class _Pool:
    """The worker processes."""

    def __init__(self, readers: list[CheckedReader], count: int, ahead: int) -> None:
        self._readers, self._board = list(readers), _Board(count)
        self._reading, self._in_progress = 0, False
        self._requests: Iterator[Request] = iter(())
        with warnings.catch_warnings():
            # That more workers than cores were asked for; it is right where reading means waiting.
            warnings.filterwarnings("ignore", message=".*worker processes in total.*")
            self._loader: DataLoader[Any] = DataLoader(
                _Requested(self._readers, self._board),
                batch_sampler=_Numbered(self),  # type: ignore[arg-type]
                num_workers=count,
                collate_fn=_unchanged,
                multiprocessing_context=_context(),
                persistent_workers=True,
                prefetch_factor=ahead,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # else torch's global one would be changed
            )
        self._batches: Iterator[Any] | None = None
        self._processes: list[Any] = []

    def numbered(self) -> Iterator[tuple[int, Request]]:
        """The requests of this reading with its number."""
        for request in self._requests:
            yield self._reading, request

    def read(self, requests: Iterable[Request]) -> Iterator[Samples | Failure]:
        """Answers requests; a reading that is in progress is given up."""
        self._requests = iter(requests)
        self._reading += 1
        self._board.cells[0] = self._reading
        if self._batches is None:
            self._start()
        else:
            self._batches = iter(self._loader)
        return self._answers()

    def _start(self) -> None:
        with _unseen_by_workers():
            try:
                self._batches = iter(self._loader)
            except Exception as error:
                problem = f"the data set can't be sent to worker processes ({type(error).__name__}: {error})"
                raise SampleError(f"{problem}; data.workers=0 reads it in the training process") from error
        self._processes = torch_internals.loader_processes(self._batches)
        # The interpreter would wait at its end for processes that take no notice of its request to end.
        atexit.register(self._kill)

    def _answers(self) -> Iterator[Samples | Failure]:
        assert self._batches is not None
        self._in_progress = True
        while True:
            try:
                answer = next(self._batches, None)
            except RuntimeError as error:
                raise self._explained(error) from error
            if answer is None:
                self._in_progress = False
                return
            yield answer

    def _explained(self, error: RuntimeError) -> Exception:
        """What to raise for an error of the data loader: which worker died, and at which sample."""
        for worker, process in enumerate(self._processes):
            if process.is_alive():
                continue
            reader, row = self._board.sample_of(worker)
            doing = f" while it read {self._readers[reader].reader.name(row)}" if reader >= 0 else ""
            return SampleError(f"a worker process that reads samples {_ending(process.exitcode)}{doing}")
        return error

    def close(self) -> None:
        """Ends the processes: at once if they are reading, for what they read is of no use any more."""
        if self._in_progress:
            self._kill()
        atexit.unregister(self._kill)
        self._batches = None
        del self._loader
        gc.collect()  # a data loader's iterator, which ends the rest of the processes, may be part of a circle

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


class _Numbered:
    """The pool's requests as DataLoader's batch sampler."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return self._pool.numbered()


def _unchanged(answer: Any) -> Any:
    return answer


def _begin_worker(number: int) -> None:
    """Runs in a new worker, before it reads."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Requested)
    info.dataset.begin(number)
    for ending in _ENDING:
        with contextlib.suppress(ValueError):
            signal.signal(ending, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _context() -> BaseContext:
    """How processes are started: never as a copy of this one, whose threads and connections a copy would break.

    A fork server, where there is one, imports torch once and starts each worker within milliseconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_resource_tracker()
    return context


def _start_resource_tracker() -> None:
    """Starts Python's process that removes the semaphores of one that was killed; it says nothing about it.

    What it says would be the last line of a rank that failed, instead of why it failed.
    """
    from multiprocessing import resource_tracker  # Windows has none

    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")


@contextlib.contextmanager
def _unseen_by_workers() -> Iterator[None]:
    """Inside this block processes can be started that neither run the user's script nor get this process's signals.

    A new process would run the main script again, to find its classes; a script without ``if __name__ == "__main__"``
    would then train again in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    mask: Callable[..., set[Any]] | None = getattr(signal, "pthread_sigmask", None)
    # A child inherits which signals are blocked.
    blocked = mask(signal.SIG_BLOCK, _ENDING) if mask is not None else set()
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if mask is not None:
            mask(signal.SIG_SETMASK, blocked)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    hints = {
        "SIGKILL": " (out of memory?)",
        "SIGBUS": " (is shared memory full? in Docker --shm-size=1g gives more)",
    }
    name = names.get(-code, f"signal {-code}")
    return f"was ended by {name}{hints.get(name, '')}"
