"""Drives the exchanges of a step's buckets, so that they overlap with the backward pass and with each other."""

from __future__ import annotations

from collections.abc import Iterator

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.reporting.metrics import Stopwatch


class Exchanges:
    """The exchanges under way, in order.

    An exchange of several collectives begins its next one when the bucket after it is started. Waiting for whichever is
    done first would hide more, but ranks would issue their collectives in different orders, and those must match.

    Args:
        compressor: How buckets travel; its observer, if it has one, is told what happens when.
        communicator: Among whom.
        stopwatch: Where the time spent compressing is booked.
    """

    def __init__(self, compressor: Compressor, communicator: Communicator, stopwatch: Stopwatch) -> None:
        self._compressor = compressor
        self._communicator = communicator
        self._stopwatch = stopwatch
        self._under_way: list[_Exchange] = []
        self._held: list[Bucket] = []

    def begin_last_backward(self) -> None:
        """The last backward pass of a step begins, and with it the first bucket fills up."""
        if self._compressor.observer is not None:
            self._compressor.observer.armed(self._communicator)

    def start(self, bucket: Bucket) -> None:
        """Starts a bucket's exchange; its content must not be touched until :meth:`finish`."""
        observer = self._compressor.observer
        if observer is not None:
            observer.ready(bucket)
            if observer.holds:
                self._held.append(bucket)
                return
        self._start(bucket)

    def finish(self) -> None:
        """Waits until all buckets hold their sums."""
        observer = self._compressor.observer
        if observer is not None:
            observer.closed()
        for bucket in self._held:
            self._start(bucket)
        self._held.clear()
        while any(exchange.left for exchange in self._under_way):
            self._begin_next()
        for exchange in self._under_way:
            self._advance(exchange)
            assert exchange.pending is None, "a compressor starts more collectives than it says"
        self._under_way.clear()
        if observer is not None:
            observer.done()

    def _start(self, bucket: Bucket) -> None:
        self._begin_next()
        exchange = _Exchange(self._compressor.aggregate(bucket, self._communicator), self._compressor.phases)
        self._under_way.append(exchange)
        self._advance(exchange)

    def _begin_next(self) -> None:
        for exchange in self._under_way:
            if exchange.left:
                self._advance(exchange)

    def _advance(self, exchange: _Exchange) -> None:
        if exchange.pending is not None:
            exchange.pending.wait()
        with self._stopwatch.compression():
            exchange.pending = next(exchange.phases, None)
        exchange.left -= 1


class _Exchange:
    """One bucket's exchange: what is still to do, what it waits for, and how many collectives it has yet to begin."""

    def __init__(self, phases: Iterator[Pending], collectives: int) -> None:
        self.phases = phases
        self.pending: Pending | None = None
        self.left = collectives
