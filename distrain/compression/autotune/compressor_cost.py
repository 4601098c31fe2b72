"""Measures what a compressor costs in a step: the time of its own work, and the bytes that it sends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.communication.types import DONE, Pending
from distrain.compression.autotune.step_trace import synchronised_time
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket

#: Repeats after one to warm up, of which the fastest counts; fewer where they take more seconds than this.
_REPEATS, _MAX_SECONDS = 3, 1.0


class LoopbackCommunicator(Communicator):
    """A communicator that talks to nobody: collectives end at once, as if all ranks had sent the same.

    Args:
        original: The group whose rank and size it takes.

    Attributes:
        started: Kind of each collective started, and the bytes that a rank would have sent; the user may reset it.
    """

    def __init__(self, original: Communicator) -> None:
        super().__init__()
        self.rank, self.size = original.rank, original.size
        self.started: list[tuple[str, int]] = []

    @override
    def start_all_reduce(self, tensor: Tensor, reduction: str = "sum") -> Pending:
        self._record("all_reduce", ring_all_reduce_bytes(tensor.numel() * tensor.element_size(), self.size))
        return DONE

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    @override
    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        self._record("all_gather", (self.size - 1) * tensor.numel() * tensor.element_size())
        return [tensor.clone() for _ in range(self.size)], DONE

    def _record(self, kind: str, sent: int) -> None:
        self.ledger.sent[kind] += sent
        self.started.append((kind, sent))


@dataclass(frozen=True)
class BucketCost:
    """Cost of one bucket in a step.

    Attributes:
        work: Seconds of the compressor's own work before, between and after the collectives.
        collectives: The collectives started after each section of work but the last: kind, and bytes that a rank sends.
    """

    work: list[float]
    collectives: list[list[tuple[str, int]]]


@dataclass(frozen=True)
class CompressorCost:
    """Cost of a step, bucket by bucket in the order of their exchanges."""

    buckets: list[BucketCost]

    @property
    def seconds(self) -> float:
        """The compressor's own work."""
        return sum(sum(bucket.work) for bucket in self.buckets)

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        return sum(sent for bucket in self.buckets for started in bucket.collectives for _, sent in started)

    def to_plain(self) -> list[dict[str, Any]]:
        """The costs as plain data."""
        return [asdict(bucket) for bucket in self.buckets]

    @classmethod
    def from_plain(cls, rows: Sequence[Mapping[str, Any]]) -> CompressorCost:
        """The inverse of :meth:`to_plain`."""
        return cls(
            [
                BucketCost(row["work"], [[(kind, sent) for kind, sent in started] for started in row["collectives"]])
                for row in rows
            ]
        )


def uncompressed_cost(bucket_bytes: Sequence[int], ranks: int) -> CompressorCost:
    """The cost of a step without compression: one all-reduce per bucket, and no work.

    Args:
        bucket_bytes: Size of each bucket, in the order of their exchanges.
        ranks: Number of ranks that reduce them.
    """
    reductions = [("all_reduce", ring_all_reduce_bytes(size, ranks)) for size in bucket_bytes]
    return CompressorCost([BucketCost([0.0, 0.0], [[reduction]]) for reduction in reductions])


def measure_cost(compressor: Compressor, buckets: Sequence[Bucket], communicator: Communicator) -> CompressorCost:
    """Times a compressor's own work on a step's gradients, without communication.

    Args:
        compressor: Used for nothing else, since its state afterwards belongs to no training step.
        buckets: The gradients; they are not changed.
        communicator: The group in which it would work.
    """
    best: list[BucketCost] = []
    taken: list[float] = []
    while len(taken) <= _REPEATS and sum(taken) < _MAX_SECONDS:
        begin = time.perf_counter()
        compressor.begin_step()
        costs = [_bucket_cost(compressor, bucket.clone(), LoopbackCommunicator(communicator)) for bucket in buckets]
        # The first repeat allocates memory, so the second one replaces it.
        best = [_faster(a, b) for a, b in zip(best, costs, strict=True)] if len(taken) > 1 else costs
        taken.append(time.perf_counter() - begin)
    return CompressorCost(best)


def _bucket_cost(compressor: Compressor, bucket: Bucket, loopback: LoopbackCommunicator) -> BucketCost:
    device = bucket.flat.device
    work, collectives = [], []
    begin = synchronised_time(device)
    for _ in compressor.aggregate(bucket, loopback):
        work.append(synchronised_time(device) - begin)
        collectives.append(loopback.started)
        loopback.started = []
        begin = synchronised_time(device)
    work.append(synchronised_time(device) - begin)
    return BucketCost(work, collectives)


def _faster(a: BucketCost, b: BucketCost) -> BucketCost:
    return BucketCost([min(pair) for pair in zip(a.work, b.work, strict=True)], a.collectives)
