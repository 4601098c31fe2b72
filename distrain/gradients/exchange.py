"""Exchanges buckets of gradients while the backward pass is still running."""

from __future__ import annotations

from collections.abc import Iterator

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.reporting.metrics import Stopwatch


class BucketExchanger:
    """Runs the exchanges of a step's buckets, overlapped with the backward pass and with each other.

    Where an exchange consists of several collectives, its next one begins when the following bucket is started. To wait
    for whichever collective ends first would hide more, but ranks would then issue their collectives in different
    orders, and those must match.

    Args:
        compressor: Sums the buckets over the ranks; its observer, if set, receives the events.
        communicator: The ranks.
        stopwatch: Records the time spent on compression.
    """

    def __init__(self, compressor: Compressor, communicator: Communicator, stopwatch: Stopwatch) -> None:
        self._compressor = compressor
        self._communicator = communicator
        self._stopwatch = stopwatch
        self._under_way: list[_BucketExchange] = []
        self._held_back: list[Bucket] = []

    def begin_last_backward(self) -> None:
        """Call when the last backward pass of a step begins, after which buckets become complete."""
        if self._compressor.observer is not None:
            self._compressor.observer.last_backward_began(self._communicator)

    def start(self, bucket: Bucket) -> None:
        """Starts a bucket's exchange; its content must not be touched until :meth:`finish` returns."""
        observer = self._compressor.observer
        if observer is not None:
            observer.bucket_ready(bucket)
            if observer.holds_exchanges:
                self._held_back.append(bucket)
                return
        self._start(bucket)

    def finish(self) -> None:
        """Waits until all buckets hold their sums over the ranks."""
        observer = self._compressor.observer
        if observer is not None:
            observer.backward_ended()
        for bucket in self._held_back:
            self._start(bucket)
        self._held_back.clear()
        while any(exchange.phases_left for exchange in self._under_way):
            self._begin_next_phases()
        for exchange in self._under_way:
            self._advance(exchange)
            assert exchange.pending is None, "a compressor starts more collectives than its `phases`"
        self._under_way.clear()
        if observer is not None:
            observer.exchanges_ended()

    def _start(self, bucket: Bucket) -> None:
        self._begin_next_phases()
        exchange = _BucketExchange(self._compressor.aggregate(bucket, self._communicator), self._compressor.phases)
        self._under_way.append(exchange)
        self._advance(exchange)

    def _begin_next_phases(self) -> None:
        for exchange in self._under_way:
            if exchange.phases_left:
                self._advance(exchange)

    def _advance(self, exchange: _BucketExchange) -> None:
        if exchange.pending is not None:
            exchange.pending.wait()
        with self._stopwatch.compression():
            exchange.pending = next(exchange.collectives, None)
        exchange.phases_left -= 1


class _BucketExchange:
    """One bucket's exchange.

    Attributes:
        collectives: Starts the next collective at each call of ``next``.
        pending: The collective under way.
        phases_left: Number of collectives still to be started.
    """

    def __init__(self, collectives: Iterator[Pending], phases: int) -> None:
        self.collectives = collectives
        self.pending: Pending | None = None
        self.phases_left = phases
