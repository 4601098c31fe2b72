"""Making items ready in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Done:
    pass


class _Producer(Generic[T]):
    """Fills ``ready`` from ``items``, at most ``depth`` ahead of what was taken."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.ready: SimpleQueue[T | _Failure | _Done] = SimpleQueue()
        self._items, self._slots, self._stopped = items, threading.Semaphore(depth), False
        self._thread = threading.Thread(target=self._run, name="distrain-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._slots.acquire()
            for item in self._items:
                self.ready.put(item)
                self._slots.acquire()
                if self._stopped:
                    return
            self.ready.put(_Done())
        except BaseException as error:  # the consumer raises it again
            self.ready.put(_Failure(error))

    def taken(self) -> None:
        """One more item may be made."""
        self._slots.release()

    def stop(self) -> None:
        """Ends the thread; waits for the item that is in the making."""
        self._stopped = True
        self._slots.release()
        self._thread.join()


def prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yields ``items`` while a background thread makes up to ``depth`` of them ready.

    What ``items`` raises is raised here, with its traceback. Closing the generator (or leaving its loop) ends the
    thread; an item that is being made is finished first.
    """
    producer = _Producer(items, depth)
    try:
        while True:
            item = producer.ready.get()
            if isinstance(item, _Failure):
                raise item.error
            if isinstance(item, _Done):
                return
            # Released before the yield: the next item is made while the consumer works on this one.
            producer.taken()
            yield item
    finally:
        producer.stop()
