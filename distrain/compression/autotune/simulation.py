"""Predicts a training step's duration with some compressor, by simulating its exchanges on a timeline."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.compression.autotune.compressor_cost import BucketCost, CompressorCost
from distrain.compression.autotune.link_model import LinkModel
from distrain.compression.autotune.step_trace import StepTrace


@dataclass(frozen=True)
class ComputeTimes:
    """A step without its exchanges, on one rank.

    Attributes:
        intervals: For each set of buckets, seconds of compute before its last backward pass, before each bucket is
            complete, and until the end of the backward pass.
        after_exchange: Seconds after the last exchange.
    """

    intervals: list[list[float]]
    after_exchange: float

    @classmethod
    def of(cls, trace: StepTrace) -> ComputeTimes:
        """From a step whose exchanges were held back."""
        return cls(trace.compute_intervals(), trace.after_exchange)


def predict_step(steps: Sequence[Sequence[ComputeTimes]], costs: Sequence[CompressorCost], link: LinkModel) -> float:
    """The median of :func:`simulate_step` over several steps, in each of which another rank may be the slowest.

    Args:
        steps: For each rank its steps.
        costs: For each rank the compressor's cost.
        link: Times of collectives.

    Returns:
        Seconds.
    """
    return statistics.median(simulate_step(step, costs, link) for step in zip(*steps, strict=True))


def simulate_step(compute: Sequence[ComputeTimes], costs: Sequence[CompressorCost], link: LinkModel) -> float:
    """Simulates a step's exchanges in the order in which :mod:`distrain.gradients.exchange` runs them.

    The link carries one collective after the other, each from the moment when the last rank has started it. A backward
    pass that runs meanwhile is delayed by the time that the processors spend on the transfer.

    Args:
        compute: For each rank the step without exchanges.
        costs: For each rank the compressor's cost.
        link: Times of collectives.

    Returns:
        Seconds from the begin of the step to the begin of the next one, on the slowest rank.
    """
    timeline = _Timeline(len(compute), link)
    bucket_indices = iter(range(len(costs[0].buckets)))
    for segment in range(len(compute[0].intervals)):
        intervals = np.array([each.intervals[segment] for each in compute])
        timeline.clocks += intervals[:, 0]
        under_way: list[_SimulatedExchange] = []
        for column in range(1, intervals.shape[1] - 1):
            timeline.clocks += intervals[:, column]
            index = next(bucket_indices)
            timeline.begin_next(under_way)
            under_way.append(_SimulatedExchange([cost.buckets[index] for cost in costs]))
            timeline.advance(under_way[-1])
        timeline.clocks += intervals[:, -1]
        while any(exchange.phases_left for exchange in under_way):
            timeline.begin_next(under_way)
        for exchange in under_way:
            timeline.advance(exchange)
    timeline.clocks += [each.after_exchange for each in compute]
    return float(timeline.clocks.max())


class _SimulatedExchange:
    """One bucket's exchange, on all ranks."""

    def __init__(self, costs: Sequence[BucketCost]) -> None:
        self.work: Iterator[NDArray[np.float64]] = iter(np.array([cost.work for cost in costs]).T)
        self.collectives = iter(costs[0].collectives)
        self.phases_left = len(costs[0].collectives)
        self.done = 0.0


class _Timeline:
    """The clock of each rank, and the time from which the link is free."""

    def __init__(self, ranks: int, link: LinkModel) -> None:
        self.clocks = np.zeros(ranks)
        self._link = link
        self._link_free = 0.0

    def begin_next(self, under_way: Sequence[_SimulatedExchange]) -> None:
        for exchange in under_way:
            if exchange.phases_left:
                self.advance(exchange)

    def advance(self, exchange: _SimulatedExchange) -> None:
        self.clocks = np.maximum(self.clocks, exchange.done) + next(exchange.work)
        for kind, sent in next(exchange.collectives, ()):
            self._link_free = max(self._link_free, float(self.clocks.max())) + self._link.seconds(kind, sent)
            exchange.done = self._link_free
            # Without computation meanwhile this makes no difference: the rank then waits for the transfer, which is
            # longer.
            self.clocks += self._link.processor_seconds(kind, sent)
        exchange.phases_left -= 1
