"""Times of collectives by message size, measured once over the ranks that exchange gradients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.autotune.step_trace import synchronised_time

#: No larger message is timed after one that took so many seconds; it has shown the bandwidth.
_LONG_ENOUGH = 0.05
#: Bytes of the first message, which shows the latency, and of the second; each further one is larger by the factor.
_SMALLEST, _SECOND = 1024, 64 * 1024
_GROWTH = 4
#: Repeats of a message; fewer where they take more seconds than this.
_REPEATS, _MAX_SECONDS = 5, 0.2


@dataclass(frozen=True)
class LinkSample:
    """Times of one message size.

    Attributes:
        sent: Bytes that each rank sends.
        seconds: Duration of the collective, on the slowest rank.
        processor_seconds: Processor time that a rank spends on it, which concurrent computation does not have.
    """

    sent: int
    seconds: float
    processor_seconds: float


class LinkModel:
    """Predicts how long a collective takes from the bytes that each rank sends.

    Args:
        samples: Measurements of each kind of collective, at least one, in ascending order of size.
    """

    def __init__(self, samples: Mapping[str, Sequence[LinkSample]]) -> None:
        self._samples = samples

    def samples(self, kind: str) -> Sequence[LinkSample]:
        """The measurements of a kind of collective, in ascending order of size."""
        return self._samples[kind]

    def seconds(self, kind: str, sent: int) -> float:
        """Seconds from the start of a collective on all ranks to its end on all ranks."""
        return self._interpolate(kind, sent, lambda sample: sample.seconds)

    def processor_seconds(self, kind: str, sent: int) -> float:
        """Seconds by which a collective delays computation that runs meanwhile."""
        return self._interpolate(kind, sent, lambda sample: sample.processor_seconds)

    @property
    def latency(self) -> float:
        """Seconds of the smallest all-reduce."""
        return self._samples["all_reduce"][0].seconds

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth: bytes that a rank sends in the largest all-reduce, by its duration less the latency."""
        last = self._samples["all_reduce"][-1]
        return last.sent / max(last.seconds - self.latency, last.seconds / 2)

    def __str__(self) -> str:
        rate = 8 * self.bytes_per_second
        bandwidth = f"{rate / 1e9:.1f} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:.0f} Mbit/s"
        return f"{1000 * self.latency:.2g} ms, {bandwidth}"

    def _interpolate(self, kind: str, sent: int, value: Callable[[LinkSample], float]) -> float:
        """Linear between two sizes; beyond the largest, the line through the last two continues."""
        samples = self._samples[kind]
        if sent <= samples[0].sent or len(samples) == 1:
            return value(samples[0])
        after = next((index for index, sample in enumerate(samples) if sample.sent >= sent), len(samples) - 1)
        low, high = samples[after - 1], samples[after]
        slope = max(value(high) - value(low), 0.0) / (high.sent - low.sent)
        return value(low) + slope * (sent - low.sent)


def measure_link(
    communicator: Communicator,
    device: torch.device,
    max_bytes: int,
    *,
    kinds: Sequence[str] = ("all_reduce", "all_gather"),
    long_enough: float = _LONG_ENOUGH,
    max_seconds: float = _MAX_SECONDS,
    repeats: int = _REPEATS,
) -> LinkModel:
    """Times collectives of increasing size; all ranks of the group call it together.

    Args:
        communicator: The group, of more than one rank. Its ledger counts what is sent.
        device: Where messages are stored.
        max_bytes: Size of the largest message.
        kinds: The kinds of collectives to time: ``all_reduce``, ``all_gather``, ``reduce_scatter``.
        long_enough: Seconds; after a message that takes so long no larger one is timed.
        max_seconds: Seconds after which a message is not repeated any more.
        repeats: Number of times that each message is timed, of which the median is taken.

    Returns:
        The same model on all ranks: each time is the slowest rank's.
    """
    samples: dict[str, list[LinkSample]] = {kind: [] for kind in kinds}
    for kind, measured in samples.items():
        # In an all-gather every rank receives the messages of all ranks.
        largest = max(max_bytes // communicator.size if kind == "all_gather" else max_bytes, _SECOND)
        size = _SMALLEST
        while True:
            measured.append(_measure(communicator, device, kind, size, repeats, max_seconds))
            if measured[-1].seconds >= long_enough or size >= largest:
                break
            size = min(max(_GROWTH * size, _SECOND), largest)
    return LinkModel(samples)


def _measure(
    communicator: Communicator, device: torch.device, kind: str, size: int, repeats: int, max_seconds: float
) -> LinkSample:
    # Of a reduce-scatter each rank gets an equal part.
    message = torch.zeros(-(-size // 4 // communicator.size) * communicator.size, device=device)

    def start() -> Pending:
        if kind == "reduce_scatter":
            return communicator.start_reduce_scatter(message[: len(message) // communicator.size].clone(), message)
        if kind == "all_gather":
            return communicator.start_all_gather(message)[1]
        return communicator.start_all_reduce(message)

    sent = communicator.ledger.total()
    start().wait()
    sent = communicator.ledger.total() - sent
    times: list[list[float]] = []
    while len(times) < repeats and sum(seconds for seconds, _ in times) < max_seconds:
        begin, processor_begin = synchronised_time(device), time.process_time()
        start().wait()
        own = [synchronised_time(device) - begin, time.process_time() - processor_begin]
        # All ranks continue with the same times, or they would stop after different numbers of repeats.
        longest = communicator.all_reduce(torch.tensor(own, dtype=torch.float64, device=device), "max")
        times.append(longest.tolist())
    seconds, processor_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return LinkSample(sent, seconds, min(processor_seconds, seconds) if device.type == "cpu" else 0.0)
