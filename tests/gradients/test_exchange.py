"""Exchanges overlap in a fixed order, and whoever observes them changes neither order nor content."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distrain.communication.collectives import Communicator
from distrain.communication.types import DONE, Pending
from distrain.compression.autotune import step_trace
from distrain.compression.autotune.step_trace import Observer, Recorder, Segment, Step, typical
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.schema import CompressionConfig
from distrain.gradients.exchange import Exchanges
from distrain.reporting.metrics import Stopwatch


class Diary(NoCompression):
    """Sends nothing; writes down what happens to each bucket, which is called by its size."""

    def __init__(self, collectives: int) -> None:
        super().__init__(CompressionConfig(name="diary"))
        self.phases = collectives
        self.lines: list[str] = []

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        for number in range(self.phases):
            self.lines.append(f"{bucket.flat.numel()} starts {number}")
            yield DONE
        self.lines.append(f"{bucket.flat.numel()} ends")


class Told(Observer):
    """Writes down what it is told, in the same diary."""

    def __init__(self, lines: list[str], holds: bool) -> None:
        self.lines, self.holds = lines, holds

    def armed(self, communicator: Communicator) -> None:
        self.lines.append("armed")

    def ready(self, bucket: Bucket) -> None:
        self.lines.append(f"{bucket.flat.numel()} ready")

    def closed(self) -> None:
        self.lines.append("closed")

    def done(self) -> None:
        self.lines.append("done")


def diary(collectives: int, holds: bool | None = None) -> list[str]:
    """What happens in a step of three buckets."""
    compressor = Diary(collectives)
    if holds is not None:
        compressor.observer = Told(compressor.lines, holds)
    exchanges = Exchanges(compressor, Communicator(), Stopwatch(torch.device("cpu")))
    for _ in range(2):
        compressor.lines.clear()
        exchanges.begin_last_backward()
        for size in (1, 2, 3):
            exchanges.start(Bucket(torch.zeros(size), {}))
        exchanges.finish()
    return compressor.lines


def test_an_exchange_begins_its_next_collective_with_the_next_bucket_and_ends_after_all_have_begun() -> None:
    assert diary(collectives=1) == ["1 starts 0", "2 starts 0", "3 starts 0", "1 ends", "2 ends", "3 ends"]
    assert diary(collectives=2) == [
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


def test_an_observer_is_told_each_thing_before_it_has_an_effect() -> None:
    begin = ["armed", "1 ready", "1 starts 0", "2 ready", "2 starts 0", "3 ready", "3 starts 0"]
    assert diary(1, holds=False) == [*begin, "closed", "1 ends", "2 ends", "3 ends", "done"]


@pytest.mark.parametrize("collectives", [1, 2])
def test_exchanges_that_are_held_back_happen_at_the_end_in_the_same_order(collectives: int) -> None:
    ready = ["armed", "1 ready", "2 ready", "3 ready", "closed"]
    assert diary(collectives, holds=True) == [*ready, *diary(collectives), "done"]


def test_a_recorder_keeps_the_times_of_steps_that_exchanged_something(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(step_trace, "now", lambda device: float(next(clock)))
    compressor, recorder = Diary(1), Recorder()
    compressor.observer = recorder
    exchanges = Exchanges(compressor, Communicator(), Stopwatch(torch.device("cpu")))
    for sizes in ([1, 2], [], [3]):
        recorder.close()
        recorder.open()
        if sizes:
            exchanges.begin_last_backward()
            for size in sizes:
                exchanges.start(Bucket(torch.zeros(size), {}))
            exchanges.finish()
    recorder.close()
    assert recorder.take() == [
        Step(0, [Segment(armed=1, ready=[2, 3], closed=4, done=5)], left=6),
        Step(8, [Segment(armed=9, ready=[10], closed=11, done=12)], left=13),
    ]
    assert recorder.take() == []


def test_a_step_without_its_exchanges() -> None:
    first = Segment(armed=12, ready=[13, 15], closed=18, done=30)
    second = Segment(armed=31, ready=[31, 31], closed=33, done=40)
    step = Step(10, [first, second], left=45)
    assert step.compute() == [[2, 1, 2, 3], [1, 0, 0, 2]]
    assert step.bare == 11
    assert step.span == 30
    assert step.rest == 5


def test_the_typical_span_is_a_median_with_two_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    medians = []
    for _ in range(400):
        spans = (10 + torch.randn(101, generator=generator)).tolist()
        # One that has nothing to do with it.
        spans[7] = 500.0
        medians.append(typical(spans))
    off = sum(abs(middle - 10) > error for middle, error in medians)
    assert 0.01 * 400 < off < 0.1 * 400
    assert typical([3.0]) == (3.0, 0.0)
