"""Measurements of a run: sums of losses and counts, throughput, and how the time of a step divides."""

from __future__ import annotations

import math
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

from distrain.runtime.device import float64_device, is_mps

#: Steps whose sums a device without float64 keeps before the CPU adds them up.
_MAX_WAITING = 1024

#: Start and end of a span on a GPU.
EventPair = tuple[torch.cuda.Event, torch.cuda.Event]


class Stopwatch:
    """Measures what this rank's training time is spent on, without adding synchronisation between host and device.

    On a CPU, spans are measured on the host. On a CUDA GPU the host only queues work, so each span is a pair of events
    in the compute stream. The events are read in :meth:`collect`, which is called where the host synchronises anyway.
    Communication counts only while the compute stream waits for it (exposed communication); communication that
    overlaps with computation is not counted.

    On an Apple GPU spans are measured on the host too, and the time for which :meth:`flush` waits for the GPU counts as
    time in steps. What the host does between steps while the GPU works is not counted as time in steps.

    Args:
        device: The device of the training step.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._mps = device.type == "cuda", is_mps(device)
        self._step_events: list[EventPair] = []
        self._communication_events: list[EventPair] = []
        self._compression_events: list[EventPair] = []
        self._host_step = 0.0
        self._step = 0.0
        self._communication = 0.0
        self._compression = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager around one training step."""
        start = time.perf_counter()
        with _cuda_span(self._step_events) if self._cuda else nullcontext():
            yield
        self._host_step += time.perf_counter() - start

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Context manager around a part of a step in which the rank only waits for other ranks."""
        start = time.perf_counter()
        with _cuda_span(self._communication_events) if self._cuda else nullcontext():
            yield
        if not self._cuda:
            self._communication += time.perf_counter() - start

    @contextmanager
    def compression(self) -> Iterator[None]:
        """Context manager around a part of a step in which the rank compresses or decompresses."""
        start = time.perf_counter()
        with _cuda_span(self._compression_events) if self._cuda else nullcontext():
            yield
        if not self._cuda:
            self._compression += time.perf_counter() - start

    def flush(self) -> None:
        """Waits until the device has finished all queued work, and reads the recorded events."""
        if self._mps:
            start = time.perf_counter()
            torch.mps.synchronize()
            self._host_step += time.perf_counter() - start
        if self._cuda:
            torch.cuda.synchronize()
            self._step += _seconds(self._step_events)
            self._communication += _seconds(self._communication_events)
            self._compression += _seconds(self._compression_events)

    def compression_seconds(self) -> float:
        """Total seconds of compression and decompression; they are also part of compute or exposed communication."""
        self.flush()
        return self._compression

    def collect(self) -> tuple[float, float, float]:
        """Reads and resets the times measured since the last call.

        Returns:
            Seconds of steps on the device, seconds of exposed communication in these steps, and seconds that the host
            spent in these steps.
        """
        self.flush()
        step, communication, host = self._step if self._cuda else self._host_step, self._communication, self._host_step
        self._step = self._communication = self._host_step = 0.0
        return step, communication, host


@contextmanager
def _cuda_span(spans: list[EventPair]) -> Iterator[None]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    yield
    end.record()
    spans.append((start, end))


def _seconds(spans: list[EventPair]) -> float:
    """Total seconds of all spans; empties the list."""
    milliseconds = [float(start.elapsed_time(end)) for start, end in spans]
    spans.clear()
    return sum(milliseconds) / 1000


@dataclass
class TimeShares:
    """Seconds of a part of training, by what they were spent on; the four attributes add up to the wall time.

    Attributes:
        compute: In steps, without their exposed communication.
        communication: Exposed communication.
        data: Waiting for batches. The time between steps is divided between ``data`` and ``other`` in the ratio in
            which the host spent its time between steps.
        other: The rest.
    """

    compute: float = 0.0
    communication: float = 0.0
    data: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Wall time in seconds."""
        return self.compute + self.communication + self.data + self.other

    @classmethod
    def from_measurement(
        cls, wall: float, step: float, communication: float, host_data: float, host_other: float
    ) -> TimeShares:
        """Divides wall time among the four parts; all arguments are seconds.

        Args:
            wall: Total time.
            step: Time that the device spent in steps.
            communication: Exposed communication in these steps.
            host_data: Time that the host spent waiting for batches.
            host_other: Time that the host spent neither in steps nor waiting for batches.
        """
        between = max(wall - step, 0.0)
        host = host_data + host_other
        data = between * host_data / host if host > 0 else 0.0
        return cls(max(step - communication, 0.0), communication, data, between - data)

    def add(self, other: TimeShares) -> None:
        """Adds the times of another part of training."""
        self.compute += other.compute
        self.communication += other.communication
        self.data += other.data
        self.other += other.other

    def shares(self) -> dict[str, float]:
        """Each part's fraction of the wall time, by name; the fractions add up to 1."""
        whole = self.total or 1.0
        parts = {"compute": self.compute, "communication": self.communication, "data": self.data, "other": self.other}
        return {name: seconds / whole for name, seconds in parts.items()}


class MetricSums:
    """Sums of losses, metrics and samples, kept on the device so that adding to them needs no synchronisation.

    A device without float64 keeps what it is given, and the CPU adds it up when the sums are read, or when it has
    become much. So the sums are the same on every device.

    Args:
        device: Device of the steps' sums.
        metrics: Number of metrics of the task.
    """

    def __init__(self, device: torch.device, metrics: int) -> None:
        self._device = float64_device(device)
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._metrics = torch.zeros(metrics, dtype=torch.float64, device=self._device)
        self._count = 0
        self._waits = self._device != device
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, loss_sum: Tensor, metric_sums: Tensor, count: int) -> None:
        """Adds one step's sums."""
        self._count += count
        if self._waits:
            self._waiting.append((loss_sum, metric_sums))
            if len(self._waiting) >= _MAX_WAITING:
                self._add_waiting()
            return
        self._loss += loss_sum
        self._metrics += metric_sums

    def _add_waiting(self) -> None:
        """Adds on the CPU what the device keeps: one copy for all losses, one for all metrics, in their order."""
        if not self._waiting:
            return
        losses, metrics = (torch.stack(kept).to(self._device) for kept in zip(*self._waiting, strict=True))
        self._waiting.clear()
        for loss_sum, metric_sums in zip(losses, metrics, strict=True):
            self._loss += loss_sum
            self._metrics += metric_sums

    def read_and_reset(self) -> Tensor:
        """Returns ``[loss, *metrics, count]`` as float64 and sets the sums to zero; counts below 2**53 are exact."""
        self._add_waiting()
        count = self._loss.new_full((1,), self._count)
        sums = torch.cat([self._loss.unsqueeze(0), self._metrics, count])
        self._loss.zero_()
        self._metrics.zero_()
        self._count = 0
        return sums


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this rank in MiB: allocated by torch on a CUDA GPU, resident set size on a CPU.

    torch knows no peak on an Apple GPU. There it is what the system holds for this process on the GPU now; torch gives
    little of it back, so that is near the peak.

    NaN where the system doesn't tell, as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if is_mps(device):
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass
class TimedSteps:
    """Consecutive steps that are timed together.

    Attributes:
        steps: Number of steps.
        samples: Samples in their global batches.
        time: Seconds that they took, without evaluation and saving.
    """

    steps: int = 0
    samples: int = 0
    time: TimeShares = field(default_factory=TimeShares)

    def add(self, other: TimedSteps) -> None:
        """Adds other steps to these."""
        self.steps += other.steps
        self.samples += other.samples
        self.time.add(other.time)

    @property
    def samples_per_second(self) -> float:
        """Samples per second over all ranks."""
        return self.samples / self.time.total if self.time.total else 0.0

    @property
    def step_ms(self) -> float:
        """Mean milliseconds per step."""
        return 1000 * self.time.total / self.steps if self.steps else 0.0


class StepDurations:
    """Durations of steps: the exact mean, and percentiles of an evenly spaced sample of bounded size.

    At first the duration of every step is stored. Each time the sample is full, every second stored duration is removed
    and the distance between stored steps doubles.

    Args:
        max_samples: Largest number of stored durations, an even number.
    """

    def __init__(self, max_samples: int = 1 << 16) -> None:
        self._max_samples = max_samples
        self._sample = array("d")
        self._every = 1
        self._count = 0
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Adds one step."""
        if self._count % self._every == 0:
            if len(self._sample) == self._max_samples:
                del self._sample[1::2]
                self._every *= 2
            self._sample.append(seconds)
        self._count += 1
        self._sum += seconds

    def milliseconds(self) -> dict[str, float]:
        """``mean`` of all steps, ``p50`` and ``p95`` of the sample, in milliseconds; 0 without steps."""
        p50, p95 = np.percentile(self._sample or [0.0], [50, 95])
        return {"mean": 1000 * self._sum / max(self._count, 1), "p50": 1000 * float(p50), "p95": 1000 * float(p95)}


class _HasGlobalCount(Protocol):
    @property
    def global_count(self) -> int: ...


BatchT = TypeVar("BatchT", bound=_HasGlobalCount)


class StepClock:
    """Times a loop over batches, without evaluation and saving.

    Args:
        stopwatch: The strategy's stopwatch, which times what happens inside the steps.
        warmup_steps: Number of first steps (with allocation and compilation) that :attr:`overall` leaves out.

    Attributes:
        overall: All steps since the warm-up.
        epoch: The steps of this epoch since the warm-up; the caller replaces it at the end of an epoch.
    """

    def __init__(self, stopwatch: Stopwatch, warmup_steps: int) -> None:
        self._stopwatch = stopwatch
        self._warmup_steps = warmup_steps
        self._finished_steps = 0
        self._durations = StepDurations()
        self._data_seconds = 0.0
        self._current = TimedSteps()
        #: Start of the current lap, end of the last step, and end of the time that was last counted.
        self._lap_start = self._last_step_end = self._counted_until = time.perf_counter()
        self.overall = TimedSteps()
        self.epoch = TimedSteps()

    def steps(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """Yields the batches; a step lasts until the loop asks for the next batch."""
        self._last_step_end = time.perf_counter()
        # The time since the last loop over batches is not training time.
        self._lap_start += self._last_step_end - self._counted_until
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                self._data_seconds += time.perf_counter() - start
                self._current.steps += 1
                self._current.samples += batch.global_count
                yield batch
                end = time.perf_counter()
                self._finished_steps += 1
                if self._finished_steps > self._warmup_steps:
                    self._durations.add(end - self._last_step_end)
                self._last_step_end = end
                if self._finished_steps == self._warmup_steps:
                    self._end_lap()
        finally:
            self._counted_until = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside the context; first waits until the device has finished the steps."""
        self._stopwatch.flush()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._lap_start += seconds
        self._last_step_end += seconds

    def lap(self) -> TimedSteps:
        """Ends the current lap and returns its steps, those since the last lap."""
        lap = self._end_lap()
        if self._finished_steps >= self._warmup_steps:
            self.overall.add(lap)
            self.epoch.add(lap)
        return lap

    def _end_lap(self) -> TimedSteps:
        step, communication, host_step = self._stopwatch.collect()
        now = time.perf_counter()
        wall = now - self._lap_start
        host_other = max(wall - host_step - self._data_seconds, 0.0)
        lap, self._current = self._current, TimedSteps()
        lap.time = TimeShares.from_measurement(wall, step, communication, self._data_seconds, host_other)
        # Between two epochs, the time until the next step belongs to neither lap.
        self._lap_start = self._counted_until = now
        self._data_seconds = 0.0
        return lap

    def step_ms(self) -> dict[str, float]:
        """``mean``, ``p50`` and ``p95`` of the steps since the warm-up, in milliseconds; 0 without steps."""
        return self._durations.milliseconds()
