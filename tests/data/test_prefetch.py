"""Items are prepared in a background thread in their order, and no thread is left behind."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from distrain.data.prefetch import prefetched
from tests.harness import HANG_SECONDS


def background_threads() -> int:
    return sum(thread.name == "distrain-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_yields_the_same_items_in_the_same_order(depth: int) -> None:
    assert list(prefetched(iter(range(20)), depth)) == list(range(20))
    assert background_threads() == 0


def test_at_most_depth_items_are_prepared_in_advance() -> None:
    prepared = []

    def items() -> Iterator[int]:
        for i in range(100):
            prepared.append(i)
            yield i

    stream = prefetched(items(), 3)
    assert next(stream) == 0
    deadline = time.monotonic() + HANG_SECONDS
    while len(prepared) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    # Time in which it must not prepare another one.
    time.sleep(0.1)
    assert prepared == [0, 1, 2, 3]
    stream.close()


def test_items_are_prepared_while_the_consumer_works() -> None:
    second_prepared = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        second_prepared.set()
        yield 1

    stream = prefetched(items(), 1)
    next(stream)
    assert second_prepared.wait(HANG_SECONDS)
    stream.close()


def broken() -> Iterator[int]:
    yield 1
    raise ValueError("the third image is broken")


def test_an_exception_reaches_the_consumer_with_its_traceback() -> None:
    stream = prefetched(broken(), 2)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="the third image is broken") as caught:
        next(stream)
    assert "in broken" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert background_threads() == 0


def test_a_consumer_that_stops_early_leaves_no_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    stream = prefetched(endless(), 2)
    next(stream)
    assert background_threads() == 1
    stream.close()
    assert background_threads() == 0


def test_a_stream_that_is_never_read_starts_no_thread() -> None:
    stream = prefetched(iter(range(3)), 2)
    assert background_threads() == 0
    stream.close()
