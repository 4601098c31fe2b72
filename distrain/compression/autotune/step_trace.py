"""Notes when what happened in a step, while somebody wants to know."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from distrain.communication.collectives import Communicator

if TYPE_CHECKING:
    from distrain.compression.bucket import Bucket


class Observer:
    """Is told what happens to a compressor's buckets; this one does nothing with it.

    Attributes:
        holds: Whether exchanges wait for the end of the backward pass, which then runs as if nobody communicated.
    """

    holds = False

    def begin_step(self) -> None:
        """A step begins; nothing is under way."""

    def armed(self, communicator: Communicator) -> None:
        """The last backward pass before an exchange begins."""

    def ready(self, bucket: Bucket) -> None:
        """A bucket is complete."""

    def closed(self) -> None:
        """The backward pass is over and all buckets are complete."""

    def done(self) -> None:
        """All buckets hold their sums."""


@dataclass
class Segment:
    """One set of buckets' part of a step; a pipeline's rank has one a stage. Times are on this rank's clock."""

    armed: float
    ready: list[float] = field(default_factory=list)
    closed: float = 0.0
    done: float = 0.0


@dataclass
class Step:
    """When what happened in one step.

    Attributes:
        began: Its begin.
        segments: Its sets of buckets, in order.
        left: When the next step began.
    """

    began: float
    segments: list[Segment] = field(default_factory=list)
    left: float = 0.0

    @property
    def span(self) -> float:
        """Seconds from the begin until the last bucket held its sum."""
        return self.segments[-1].done - self.began

    @property
    def rest(self) -> float:
        """Seconds from there until the next step: the update, logging, data."""
        return self.left - self.segments[-1].done

    def compute(self) -> list[list[float]]:
        """Seconds of everything but exchanges: a list a segment.

        Before it was armed, before each bucket was complete, and until the backward pass was over. These are pure only
        if exchanges were held back.
        """
        found, before = [], self.began
        for segment in self.segments:
            marks = [before, segment.armed, *segment.ready, segment.closed]
            found.append([late - early for early, late in itertools.pairwise(marks)])
            before = segment.done
        return found

    @property
    def bare(self) -> float:
        """Seconds of everything but exchanges until the last backward pass was over."""
        return sum(map(sum, self.compute()))


class Recorder(Observer):
    """Keeps the times of each step.

    On a GPU the host runs ahead, so it waits for the current stream at each mark; collectives go on in their own.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.communicator: Communicator | None = None
        self.device = torch.device("cpu")
        self._open: Step | None = None

    def open(self) -> None:
        """A step begins now."""
        self._open = Step(now(self.device))

    def close(self) -> None:
        """The step that is open ends now, and counts if anything was exchanged in it."""
        if self._open is not None and self._open.segments and self._open.segments[-1].done:
            self._open.left = now(self.device)
            self.steps.append(self._open)
        self._open = None

    def armed(self, communicator: Communicator) -> None:
        """See the base class."""
        self.communicator = communicator
        if self._open is not None:
            self._open.segments.append(Segment(now(self.device)))

    def ready(self, bucket: Bucket) -> None:
        """See the base class."""
        self.device = bucket.flat.device
        if self._open is not None and self._open.segments:
            self._open.segments[-1].ready.append(now(self.device))

    def closed(self) -> None:
        """See the base class."""
        if self._open is not None and self._open.segments:
            self._open.segments[-1].closed = now(self.device)

    def done(self) -> None:
        """See the base class."""
        if self._open is not None and self._open.segments:
            self._open.segments[-1].done = now(self.device)

    def take(self) -> list[Step]:
        """The steps kept so far, which are forgotten."""
        steps, self.steps = self.steps, []
        return steps


def typical(spans: Sequence[float]) -> tuple[float, float]:
    """The median, and how far it may be off: two standard errors, by the median absolute deviation of normal noise."""
    middle = statistics.median(spans)
    deviation = 1.4826 * statistics.median(abs(span - middle) for span in spans)
    return middle, 2 * 1.2533 * deviation / math.sqrt(len(spans))


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done what was queued on its current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
