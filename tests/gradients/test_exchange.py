"""Exchanges overlap in a fixed order, and an observer changes neither order nor content."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distrain.communication.collectives import Communicator
from distrain.communication.types import DONE, Pending
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.compression.observer import ExchangeObserver
from distrain.config.groups import CompressionConfig
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch


class LoggingCompressor(NoCompression):
    """Sends nothing, and lists what happens to each bucket, which is named by its size."""

    def __init__(self, phases: int) -> None:
        super().__init__(CompressionConfig(name="logging"))
        self.phases = phases
        self.lines: list[str] = []

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        for number in range(self.phases):
            self.lines.append(f"{bucket.flat.numel()} starts {number}")
            yield DONE
        self.lines.append(f"{bucket.flat.numel()} ends")


class EventLog(ExchangeObserver):
    """Adds the events it receives to the same list."""

    def __init__(self, lines: list[str], holds: bool) -> None:
        self.lines, self.holds_exchanges = lines, holds

    def last_backward_began(self, communicator: Communicator) -> None:
        self.lines.append("last backward")

    def bucket_ready(self, bucket: Bucket) -> None:
        self.lines.append(f"{bucket.flat.numel()} ready")

    def backward_ended(self) -> None:
        self.lines.append("backward ended")

    def exchanges_ended(self) -> None:
        self.lines.append("exchanges ended")


def events(phases: int, holds: bool | None = None) -> list[str]:
    """The events of a step with three buckets."""
    compressor = LoggingCompressor(phases)
    if holds is not None:
        compressor.observer = EventLog(compressor.lines, holds)
    exchanger = BucketExchanger(compressor, Communicator(), Stopwatch(torch.device("cpu")))
    for _ in range(2):
        compressor.lines.clear()
        exchanger.begin_last_backward()
        for size in (1, 2, 3):
            exchanger.start(Bucket(torch.zeros(size), {}))
        exchanger.finish()
    return compressor.lines


def test_an_exchange_begins_its_next_collective_with_the_next_bucket_and_ends_after_all_have_begun() -> None:
    assert events(phases=1) == ["1 starts 0", "2 starts 0", "3 starts 0", "1 ends", "2 ends", "3 ends"]
    assert events(phases=2) == [
        "1 starts 0",
        "1 starts 1",
        "2 starts 0",
        "2 starts 1",
        "3 starts 0",
        "3 starts 1",
        "1 ends",
        "2 ends",
        "3 ends",
    ]


def test_an_observer_receives_each_event_before_it_has_an_effect() -> None:
    begin = ["last backward", "1 ready", "1 starts 0", "2 ready", "2 starts 0", "3 ready", "3 starts 0"]
    assert events(1, holds=False) == [*begin, "backward ended", "1 ends", "2 ends", "3 ends", "exchanges ended"]


@pytest.mark.parametrize("phases", [1, 2])
def test_exchanges_held_back_happen_at_the_end_in_the_same_order(phases: int) -> None:
    ready = ["last backward", "1 ready", "2 ready", "3 ready", "backward ended"]
    assert events(phases, holds=True) == [*ready, *events(phases), "exchanges ended"]
