"""Prepares items in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
#: How long the end of an iteration waits for the item that is being prepared.
_STOP_SECONDS = 5.0


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Done:
    pass


class _Producer(Generic[T]):
    """Fills the queue ``ready`` from ``items`` in a thread, at most ``depth`` items ahead of the consumer."""

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
        except BaseException as error:  # raised again in the consumer's thread
            self.ready.put(_Failure(error))

    def release_slot(self) -> None:
        """Allows one more item to be prepared."""
        self._slots.release()

    def stop(self) -> None:
        """Ends the thread; waits for a while until the item that is being prepared is finished."""
        self._stopped = True
        self._slots.release()
        # A read from a disk that no longer answers must not keep a failed run from ending.
        self._thread.join(_STOP_SECONDS)


def prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yields items while a background thread prepares up to ``depth`` of them in advance.

    An exception in ``items`` is raised here with its traceback. Closing the generator, or leaving the loop over it,
    ends the thread; an item that is being prepared is finished first, unless that takes too long.

    Args:
        items: Where the items come from; advanced in the background thread only.
        depth: Largest number of items that are prepared in advance.
    """
    producer = _Producer(items, depth)
    try:
        while True:
            item = producer.ready.get()
            if isinstance(item, _Failure):
                raise item.error
            if isinstance(item, _Done):
                return
            # Released before the yield, so that the next item is prepared while the consumer works on this one.
            producer.release_slot()
            yield item
    finally:
        producer.stop()
