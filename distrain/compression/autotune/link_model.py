"""What a link takes to carry a message: measured once, over the gradient's own group of ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.autotune.step_trace import now

#: A message that takes so long tells the bandwidth; on slow links larger ones would only cost time.
_LONG_ENOUGH = 0.05
#: Bytes of the message that tells the latency, and of the first that tells something about the bandwidth.
_SMALLEST, _SECOND = 1024, 64 * 1024
_GROWTH = 4
#: A message is repeated so often at most, and no more once all its repeats took this many seconds.
_REPEATS, _PATIENCE = 5, 0.2


@dataclass(frozen=True)
class Point:
    """One message size.

    Attributes:
        sent: Bytes each rank puts on the wire.
        seconds: What the collective takes, on the slowest rank.
        stolen: How much of that the processors spend on it, which a backward pass that runs meanwhile does not have.
    """

    sent: int
    seconds: float
    stolen: float


class Link:
    """What each kind of collective takes, by the bytes that a rank sends.

    Args:
        points: At least one for each kind of collective, by growing size.
    """

    def __init__(self, points: Mapping[str, Sequence[Point]]) -> None:
        self._points = points

    def points(self, kind: str) -> Sequence[Point]:
        """What was measured, by growing size."""
        return self._points[kind]

    def seconds(self, kind: str, sent: int) -> float:
        """What a collective takes from its start on all ranks until all are done."""
        return self._at(kind, sent, lambda point: point.seconds)

    def stolen(self, kind: str, sent: int) -> float:
        """Seconds by which it delays computation that goes on meanwhile."""
        return self._at(kind, sent, lambda point: point.stolen)

    @property
    def latency(self) -> float:
        """Seconds of an all-reduce of next to nothing."""
        return self._points["all_reduce"][0].seconds

    @property
    def bytes_per_second(self) -> float:
        """What a rank sends in the largest all-reduce, its latency aside."""
        last = self._points["all_reduce"][-1]
        return last.sent / max(last.seconds - self.latency, last.seconds / 2)

    def __str__(self) -> str:
        rate = 8 * self.bytes_per_second
        told = f"{rate / 1e9:.1f} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:.0f} Mbit/s"
        return f"{1000 * self.latency:.2g} ms, {told}"

    def _at(self, kind: str, sent: int, what: Callable[[Point], float]) -> float:
        """Between two sizes on a line, and beyond the largest on the line through the last two."""
        points = self._points[kind]
        if sent <= points[0].sent or len(points) == 1:
            return what(points[0])
        after = next((index for index, point in enumerate(points) if point.sent >= sent), len(points) - 1)
        low, high = points[after - 1], points[after]
        slope = max(what(high) - what(low), 0.0) / (high.sent - low.sent)
        return what(low) + slope * (sent - low.sent)


def measure_link(
    communicator: Communicator,
    device: torch.device,
    most: int,
    *,
    kinds: Sequence[str] = ("all_reduce", "all_gather"),
    long_enough: float = _LONG_ENOUGH,
    patience: float = _PATIENCE,
) -> Link:
    """Times collectives of growing size; all ranks of the group call it together.

    Args:
        communicator: The group, of more than one rank; what is sent is counted as any other bytes.
        device: Where messages lie.
        most: Size in bytes of the largest message that anybody would send.
        kinds: Which collectives.
        long_enough: Seconds; after a message that takes so long there are no larger ones.
        patience: Seconds after which a message is repeated no more.

    Returns:
        The same on all ranks: each figure is the slowest rank's.
    """
    points: dict[str, list[Point]] = {kind: [] for kind in kinds}
    for kind, found in points.items():
        # Of what is gathered everybody gets all ranks' parts.
        largest = max(most if kind == "all_reduce" else most // communicator.size, _SECOND)
        size = _SMALLEST
        while True:
            found.append(_measure(communicator, device, kind, size, patience))
            if found[-1].seconds >= long_enough or size >= largest:
                break
            size = min(max(_GROWTH * size, _SECOND), largest)
    return Link(points)


def _measure(communicator: Communicator, device: torch.device, kind: str, size: int, patience: float) -> Point:
    message = torch.zeros(size // 4, device=device)

    def start() -> Pending:
        return (
            communicator.start_all_reduce(message)
            if kind == "all_reduce"
            else communicator.start_all_gather(message)[1]
        )

    sent = communicator.ledger.total()
    start().wait()
    sent = communicator.ledger.total() - sent
    taken: list[list[float]] = []
    while len(taken) < _REPEATS and sum(seconds for seconds, _ in taken) < patience:
        begin, worked = now(device), time.process_time()
        start().wait()
        mine = [now(device) - begin, time.process_time() - worked]
        # All ranks go on with the same figures, or they would stop after different numbers of repeats.
        worst = communicator.all_reduce(torch.tensor(mine, dtype=torch.float64, device=device), "max")
        taken.append(worst.tolist())
    seconds, stolen = (statistics.median(column) for column in zip(*taken, strict=True))
    return Point(sent, seconds, min(stolen, seconds) if device.type == "cpu" else 0.0)
