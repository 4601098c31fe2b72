"""Records timestamps of a step's events: the backward pass, the buckets and their exchanges."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.compression.bucket import Bucket
from distrain.compression.observer import ExchangeObserver


@dataclass
class SegmentTrace:
    """Times of one set of buckets in a step, in seconds of this rank's clock; a pipeline's rank has one set per stage.

    Attributes:
        last_backward_began: Begin of the last backward pass.
        buckets_ready: When each bucket was complete.
        backward_ended: End of the backward pass.
        exchanges_ended: When the last bucket held its sum.
    """

    last_backward_began: float
    buckets_ready: list[float] = field(default_factory=list)
    backward_ended: float = 0.0
    exchanges_ended: float = 0.0


@dataclass
class StepTrace:
    """Times of one step, in seconds of this rank's clock.

    Attributes:
        began: Begin of the step.
        label: Says how the step was run, for example with which compressor.
        segments: Its sets of buckets, in order.
        bucket_bytes: Size of each bucket, in the order in which they were ready.
        ended: Begin of the next step.
    """

    began: float
    label: str = ""
    segments: list[SegmentTrace] = field(default_factory=list)
    bucket_bytes: list[int] = field(default_factory=list)
    ended: float = 0.0

    @property
    def exchange_span(self) -> float:
        """Seconds from the step's begin until the last bucket held its sum."""
        return self.segments[-1].exchanges_ended - self.began

    @property
    def after_exchange(self) -> float:
        """Seconds from the last bucket's sum until the next step: update, logging, data."""
        return self.ended - self.segments[-1].exchanges_ended

    def compute_intervals(self) -> list[list[float]]:
        """Seconds of everything but exchanges, one list per segment.

        Each list holds the time before the last backward pass, the time before each bucket was complete, and the time
        until the end of the backward pass. They contain no communication only if exchanges were held back.
        """
        intervals, before = [], self.began
        for segment in self.segments:
            marks = [before, segment.last_backward_began, *segment.buckets_ready, segment.backward_ended]
            intervals.append([late - early for early, late in itertools.pairwise(marks)])
            before = segment.exchanges_ended
        return intervals

    @property
    def compute_seconds(self) -> float:
        """Seconds of everything but exchanges, from the step's begin to the end of its last backward pass."""
        return sum(map(sum, self.compute_intervals()))


class StepRecorder(ExchangeObserver):
    """Records a :class:`StepTrace` of each step in which something was exchanged.

    On a GPU the host runs ahead of the device, so each timestamp first waits for the current stream. Collectives run in
    other streams and continue meanwhile.

    Attributes:
        traces: The recorded steps.
        communicator: The ranks of the last exchange; a group of one rank before the first.
        device: Where the buckets of the last exchange are stored.
    """

    def __init__(self) -> None:
        self.traces: list[StepTrace] = []
        self.communicator = Communicator()
        self.device = torch.device("cpu")
        self._open: StepTrace | None = None

    def open_step(self, label: str = "") -> None:
        """A step begins now."""
        self._open = StepTrace(synchronised_time(self.device), label)

    def close_step(self) -> None:
        """The open step ends now; its trace is kept if an exchange ended in it."""
        if self._open is not None and self._open.segments and self._open.segments[-1].exchanges_ended:
            self._open.ended = synchronised_time(self.device)
            self.traces.append(self._open)
        self._open = None

    @override
    def last_backward_began(self, communicator: Communicator) -> None:
        self.communicator = communicator
        if self._open is not None:
            self._open.segments.append(SegmentTrace(synchronised_time(self.device)))

    @override
    def bucket_ready(self, bucket: Bucket) -> None:
        self.device = bucket.flat.device
        if self._open is not None and self._open.segments:
            self._open.segments[-1].buckets_ready.append(synchronised_time(self.device))
            self._open.bucket_bytes.append(bucket.bytes)

    @override
    def backward_ended(self) -> None:
        if self._open is not None and self._open.segments:
            self._open.segments[-1].backward_ended = synchronised_time(self.device)

    @override
    def exchanges_ended(self) -> None:
        if self._open is not None and self._open.segments:
            self._open.segments[-1].exchanges_ended = synchronised_time(self.device)

    def take_traces(self) -> list[StepTrace]:
        """Returns the recorded steps and forgets them."""
        traces, self.traces = self.traces, []
        return traces


def median_with_error(spans: Sequence[float]) -> tuple[float, float]:
    """The median and its uncertainty.

    Returns:
        The median, and two standard errors of it: the standard deviation is estimated by the median absolute deviation
        under normal noise, and the standard error of a median is 1.2533 times that of a mean.
    """
    middle = statistics.median(spans)
    deviation = 1.4826 * statistics.median(abs(span - middle) for span in spans)
    return middle, 2 * 1.2533 * deviation / math.sqrt(len(spans))


def synchronised_time(device: torch.device) -> float:
    """Seconds of the host's clock, after the device has finished all work queued on its current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
