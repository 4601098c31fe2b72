"""What a run measures: sums of losses and counts, and where the time of a step went."""

from __future__ import annotations

import resource
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

Events = tuple[torch.cuda.Event, torch.cuda.Event]


class Stopwatch:
    """Where this rank's training time goes, without making the device wait for the host.

    On a CPU spans are host times. On a GPU the host only queues work, so spans are pairs of CUDA events in the stream
    and are read at :meth:`collect`, which is called where the host waits anyway. Exposed communication is what the
    compute stream waits for a collective; hidden communication costs nothing and is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._step_events: list[Events] = []
        self._communication_events: list[Events] = []
        self._compression_events: list[Events] = []
        self._host_step = 0.0
        self._step = 0.0
        self._communication = 0.0
        self._compression = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The span of one training step."""
        start = time.perf_counter()
        with _cuda_span(self._step_events) if self._cuda else nullcontext():
            yield
        self._host_step += time.perf_counter() - start

    @contextmanager
    def communication(self) -> Iterator[None]:
        """A span inside a step in which the rank only waits for others."""
        start = time.perf_counter()
        with _cuda_span(self._communication_events) if self._cuda else nullcontext():
            yield
        if not self._cuda:
            self._communication += time.perf_counter() - start

    @contextmanager
    def compression(self) -> Iterator[None]:
        """A span inside a step in which the rank compresses or decompresses."""
        start = time.perf_counter()
        with _cuda_span(self._compression_events) if self._cuda else nullcontext():
            yield
        if not self._cuda:
            self._compression += time.perf_counter() - start

    def flush(self) -> None:
        """Waits until the device has done what was queued, and reads its events."""
        if self._cuda:
            torch.cuda.synchronize()
            self._step += _seconds(self._step_events)
            self._communication += _seconds(self._communication_events)
            self._compression += _seconds(self._compression_events)

    def compressing(self) -> float:
        """Seconds spent compressing and decompressing since the start; part of compute or exposed communication."""
        self.flush()
        return self._compression

    def collect(self) -> tuple[float, float, float]:
        """Seconds since the last call: of steps, of exposed communication in them, and of the host in steps."""
        self.flush()
        step, communication, host = self._step if self._cuda else self._host_step, self._communication, self._host_step
        self._step = self._communication = self._host_step = 0.0
        return step, communication, host


@contextmanager
def _cuda_span(spans: list[Events]) -> Iterator[None]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    yield
    end.record()
    spans.append((start, end))


def _seconds(spans: list[Events]) -> float:
    """Length of all spans, which are forgotten."""
    milliseconds = [float(start.elapsed_time(end)) for start, end in spans]
    spans.clear()
    return sum(milliseconds) / 1000


@dataclass
class TimeShares:
    """Seconds of a stretch of training: its whole length and its parts.

    ``compute`` is the steps less their exposed communication. What lies between steps is split between ``data`` and
    ``other`` as the host spent it, so the four always add up to the whole.
    """

    compute: float = 0.0
    communication: float = 0.0
    data: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Length of the stretch."""
        return self.compute + self.communication + self.data + self.other

    @classmethod
    def of(cls, wall: float, step: float, communication: float, host_data: float, host_other: float) -> TimeShares:
        """Divides ``wall`` seconds, of which the device spent ``step`` in steps."""
        between = max(wall - step, 0.0)
        host = host_data + host_other
        data = between * host_data / host if host > 0 else 0.0
        return cls(max(step - communication, 0.0), communication, data, between - data)

    def add(self, more: TimeShares) -> None:
        """Adds another stretch to this one."""
        self.compute += more.compute
        self.communication += more.communication
        self.data += more.data
        self.other += more.other

    def shares(self) -> dict[str, float]:
        """Each part as a share of the whole, adding up to 1."""
        whole = self.total or 1.0
        parts = {"compute": self.compute, "communication": self.communication, "data": self.data, "other": self.other}
        return {name: seconds / whole for name, seconds in parts.items()}


class Totals:
    """Sums of losses, metrics and samples that stay on the device until they are read.

    Args:
        device: Where the sums of the steps are.
        metrics: Number of the task's metrics.
    """

    def __init__(self, device: torch.device, metrics: int) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._metrics = torch.zeros(metrics, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, loss_sum: Tensor, metric_sums: Tensor, count: int) -> None:
        """Adds one step's sums."""
        self._loss += loss_sum
        self._metrics += metric_sums
        self._count += count

    def take(self) -> Tensor:
        """``[loss, *metrics, count]`` as float64 (counts stay exact below 2**53); the sums start again from zero."""
        count = self._loss.new_full((1,), self._count)
        taken = torch.cat([self._loss.unsqueeze(0), self._metrics, count])
        self._loss.zero_()
        self._metrics.zero_()
        self._count = 0
        return taken


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory this rank has used, in MiB: allocated by torch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass
class Stretch:
    """A number of steps, timed together.

    Attributes:
        steps: How many.
        samples: Samples of their global batches.
        time: Seconds they took, evaluation and saving left out.
    """

    steps: int = 0
    samples: int = 0
    time: TimeShares = field(default_factory=TimeShares)

    def add(self, more: Stretch) -> None:
        """Adds another stretch to this one."""
        self.steps += more.steps
        self.samples += more.samples
        self.time.add(more.time)

    @property
    def samples_per_second(self) -> float:
        """Images per second of the whole job."""
        return self.samples / self.time.total if self.time.total else 0.0

    @property
    def step_ms(self) -> float:
        """Mean milliseconds a step."""
        return 1000 * self.time.total / self.steps if self.steps else 0.0


class Durations:
    """How long steps took: all of them summed, and an even sample whose size has a limit, whatever the run's.

    Every step is kept at first; when there is no room, every second that was kept goes, and from then on half as many
    are kept as before.

    Args:
        most: How many are kept, an even number.
    """

    def __init__(self, most: int = 1 << 16) -> None:
        self._most = most
        self._kept = array("d")
        self._every = 1
        self._count = 0
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more step."""
        if self._count % self._every == 0:
            if len(self._kept) == self._most:
                del self._kept[1::2]
                self._every *= 2
            self._kept.append(seconds)
        self._count += 1
        self._sum += seconds

    def milliseconds(self) -> dict[str, float]:
        """``mean`` of all, ``p50`` and ``p95`` of the sample, in milliseconds; 0 where there were none."""
        p50, p95 = np.percentile(self._kept or [0.0], [50, 95])
        return {"mean": 1000 * self._sum / max(self._count, 1), "p50": 1000 * float(p50), "p95": 1000 * float(p95)}


class _HasCount(Protocol):
    @property
    def global_count(self) -> int: ...


BatchT = TypeVar("BatchT", bound=_HasCount)


class StepClock:
    """Times a loop over batches; evaluation and saving don't count.

    Args:
        stopwatch: The strategy's, which times the inside of the steps.
        warmup_steps: The first steps of a run (allocation, compilation) that are left out of :attr:`overall`.
    """

    def __init__(self, stopwatch: Stopwatch, warmup_steps: int) -> None:
        self._stopwatch = stopwatch
        self._warmup = warmup_steps
        self._taken = 0
        self._durations = Durations()
        self._data = 0.0
        self._now = Stretch()
        self._began = self._last = self._stopped = time.perf_counter()
        #: All steps since warm-up.
        self.overall = Stretch()
        #: All steps of this epoch since warm-up; the trainer resets it.
        self.epoch = Stretch()

    def steps(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """Yields the batches; a step lasts until the loop asks for the next one."""
        self._last = time.perf_counter()
        self._began += self._last - self._stopped
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                self._data += time.perf_counter() - start
                self._now.steps += 1
                self._now.samples += batch.global_count
                yield batch
                end = time.perf_counter()
                self._taken += 1
                if self._taken > self._warmup:
                    self._durations.add(end - self._last)
                self._last = end
                if self._taken == self._warmup:
                    self._close()
        finally:
            self._stopped = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time; asks the device to finish the steps first."""
        self._stopwatch.flush()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._began += seconds
        self._last += seconds

    def lap(self) -> Stretch:
        """The steps since the last lap, which it ends."""
        stretch = self._close()
        if self._taken >= self._warmup:
            self.overall.add(stretch)
            self.epoch.add(stretch)
        return stretch

    def _close(self) -> Stretch:
        step, communication, host_step = self._stopwatch.collect()
        now = time.perf_counter()
        wall = now - self._began
        stretch, self._now = self._now, Stretch()
        stretch.time = TimeShares.of(wall, step, communication, self._data, max(wall - host_step - self._data, 0.0))
        # Between epochs, what comes until the next step counts for neither stretch.
        self._began = self._stopped = now
        self._data = 0.0
        return stretch

    def step_ms(self) -> dict[str, float]:
        """``mean``, ``p50`` and ``p95`` of the steps since warm-up, in milliseconds; 0 where there were none."""
        return self._durations.milliseconds()
