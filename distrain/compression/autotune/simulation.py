"""What a training step would take with some compressor: its own work, measured, and its messages, on a timeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.communication.types import DONE, Pending
from distrain.compression.autotune.link_model import Link
from distrain.compression.autotune.step_trace import Step, now
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket

#: Repeats of a candidate's work, after one to warm up; the fastest counts. Slow ones are repeated less.
_REPEATS, _PATIENCE = 3, 1.0


# --- a compressor's own work -----------------------------------------------------------------------------------------


class Loopback(Communicator):
    """A group of which only this rank is there: collectives are done at once, as if all others sent the same.

    Args:
        like: The group whose place it takes.
    """

    def __init__(self, like: Communicator) -> None:
        super().__init__()
        self.rank, self.size = like.rank, like.size
        #: Collectives started since somebody looked: kind, and bytes that a rank would have put on the wire.
        self.started: list[tuple[str, int]] = []

    def start_all_reduce(self, tensor: Tensor, reduction: str = "sum") -> Pending:
        """Leaves the tensor as it is."""
        self._note("all_reduce", ring_all_reduce_bytes(tensor.numel() * tensor.element_size(), self.size))
        return DONE

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Leaves the tensor as it is."""
        return tensor

    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        """Gives as many copies as there are ranks."""
        self._note("all_gather", (self.size - 1) * tensor.numel() * tensor.element_size())
        return [tensor.clone() for _ in range(self.size)], DONE

    def _note(self, kind: str, sent: int) -> None:
        self.ledger.sent[kind] += sent
        self.started.append((kind, sent))


@dataclass(frozen=True)
class BucketCost:
    """What a compressor does about one bucket in a step.

    Attributes:
        sections: Seconds of its own work before, between and after the collectives.
        sent: The collectives that each section but the last starts: kind, and bytes that a rank puts on the wire.
    """

    sections: list[float]
    sent: list[list[tuple[str, int]]]


@dataclass(frozen=True)
class Cost:
    """What a compressor does in a step, bucket by bucket in the order in which they leave."""

    buckets: list[BucketCost]

    @property
    def seconds(self) -> float:
        """Its own work."""
        return sum(sum(bucket.sections) for bucket in self.buckets)

    @property
    def sent(self) -> int:
        """Bytes that a rank puts on the wire."""
        return sum(sent for bucket in self.buckets for section in bucket.sent for _, sent in section)

    def to_plain(self) -> list[dict[str, Any]]:
        """As plain data."""
        return [asdict(bucket) for bucket in self.buckets]

    @classmethod
    def from_plain(cls, rows: Sequence[Mapping[str, Any]]) -> Cost:
        """What :meth:`to_plain` gave."""
        return cls(
            [
                BucketCost(row["sections"], [[(kind, sent) for kind, sent in each] for each in row["sent"]])
                for row in rows
            ]
        )


def measure_cost(compressor: Compressor, buckets: Sequence[Bucket], like: Communicator) -> Cost:
    """Times a compressor's own work on a step's gradients, which stay as they are; nobody is talked to.

    Args:
        compressor: Used for this alone, since what it keeps afterwards comes from no training step.
        buckets: The gradients.
        like: The group among which it would work.
    """
    best: list[BucketCost] = []
    taken: list[float] = []
    while len(taken) <= _REPEATS and sum(taken) < _PATIENCE:
        begin = time.perf_counter()
        compressor.begin_step()
        found = [_bucket_cost(compressor, bucket.clone(), Loopback(like)) for bucket in buckets]
        # Memory is new the first time.
        best = [_faster(a, b) for a, b in zip(best, found, strict=True)] if len(taken) > 1 else found
        taken.append(time.perf_counter() - begin)
    return Cost(best)


def _bucket_cost(compressor: Compressor, bucket: Bucket, loopback: Loopback) -> BucketCost:
    device = bucket.flat.device
    sections, sent = [], []
    begin = now(device)
    for _ in compressor.aggregate(bucket, loopback):
        sections.append(now(device) - begin)
        sent.append(loopback.started)
        loopback.started = []
        begin = now(device)
    sections.append(now(device) - begin)
    return BucketCost(sections, sent)


def _faster(a: BucketCost, b: BucketCost) -> BucketCost:
    return BucketCost([min(pair) for pair in zip(a.sections, b.sections, strict=True)], a.sent)


# --- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backdrop:
    """A step without its exchanges, on one rank.

    Attributes:
        compute: For each set of buckets seconds of compute before it is armed, before each bucket is complete, and
            until the backward pass is over.
        rest: Seconds after the last exchange.
    """

    compute: list[list[float]]
    rest: float

    @classmethod
    def of(cls, step: Step) -> Backdrop:
        """From a step whose exchanges were held back."""
        return cls(step.compute(), step.rest)


def predicted(steps: Sequence[Sequence[Backdrop]], costs: Sequence[Cost], link: Link) -> float:
    """The median of :func:`step_seconds` over several steps, in each of which other ranks may be the slowest.

    Args:
        steps: For each rank its steps.
        costs: Each rank's, of the compressor in question.
        link: What carries the messages.
    """
    return statistics.median(step_seconds(step, costs, link) for step in zip(*steps, strict=True))


def step_seconds(backdrops: Sequence[Backdrop], costs: Sequence[Cost], link: Link) -> float:
    """Plays a step's exchanges on a timeline, as :class:`~distrain.gradients.exchange.Exchanges` would do them.

    The link carries one collective after the other, each from when the last rank has started it. A backward pass that
    runs meanwhile loses the time that the processors spend on carrying.

    Args:
        backdrops: Each rank's.
        costs: Each rank's, of the compressor in question.
        link: What carries the messages.

    Returns:
        Seconds from a step's begin to the next one's, of the slowest rank.
    """
    timeline = _Timeline(len(backdrops), link)
    left = iter(range(len(costs[0].buckets)))
    for segment in range(len(backdrops[0].compute)):
        spans = np.array([each.compute[segment] for each in backdrops])
        timeline.clocks += spans[:, 0]
        under_way: list[_Exchange] = []
        for column in range(1, spans.shape[1] - 1):
            timeline.clocks += spans[:, column]
            index = next(left)
            timeline.begin_next(under_way)
            under_way.append(_Exchange([cost.buckets[index] for cost in costs]))
            timeline.advance(under_way[-1])
        timeline.clocks += spans[:, -1]
        while any(exchange.left for exchange in under_way):
            timeline.begin_next(under_way)
        for exchange in under_way:
            timeline.advance(exchange)
    timeline.clocks += [each.rest for each in backdrops]
    return float(timeline.clocks.max())


class _Exchange:
    """One bucket's exchange, on all ranks."""

    def __init__(self, costs: Sequence[BucketCost]) -> None:
        self.sections: Iterator[NDArray[np.float64]] = iter(np.array([cost.sections for cost in costs]).T)
        self.sent = iter(costs[0].sent)
        self.left = len(costs[0].sent)
        self.done = 0.0


class _Timeline:
    """Each rank's clock, and when the link is free."""

    def __init__(self, ranks: int, link: Link) -> None:
        self.clocks = np.zeros(ranks)
        self._link = link
        self._free = 0.0

    def begin_next(self, under_way: Sequence[_Exchange]) -> None:
        for exchange in under_way:
            if exchange.left:
                self.advance(exchange)

    def advance(self, exchange: _Exchange) -> None:
        self.clocks = np.maximum(self.clocks, exchange.done) + next(exchange.sections)
        for kind, sent in next(exchange.sent, ()):
            self._free = max(self._free, float(self.clocks.max())) + self._link.seconds(kind, sent)
            exchange.done = self._free
            # Where nothing is computed meanwhile the rank waits longer than that anyway.
            self.clocks += self._link.stolen(kind, sent)
        exchange.left -= 1
