"""Steps with exchanges are recorded with the times of their events."""

from __future__ import annotations

import pytest
import torch

from distrain.communication.collectives import Communicator
from distrain.compression.autotune import step_trace
from distrain.compression.autotune.step_trace import SegmentTrace, StepRecorder, StepTrace, median_with_error
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch


def test_a_recorder_keeps_the_times_of_steps_with_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(step_trace, "synchronised_time", lambda device: float(next(clock)))
    compressor, recorder = NoCompression(CompressionConfig(name="none")), StepRecorder()
    compressor.observer = recorder
    exchanger = BucketExchanger(compressor, Communicator(), Stopwatch(torch.device("cpu")))
    for sizes in ([1, 2], [], [3]):
        recorder.close_step()
        recorder.open_step()
        if sizes:
            exchanger.begin_last_backward()
            for size in sizes:
                exchanger.start(Bucket(torch.zeros(size), {}))
            exchanger.finish()
    recorder.close_step()
    assert recorder.take_traces() == [
        StepTrace(
            0,
            segments=[SegmentTrace(last_backward_began=1, buckets_ready=[2, 3], backward_ended=4, exchanges_ended=5)],
            bucket_bytes=[4, 8],
            ended=6,
        ),
        StepTrace(
            8,
            segments=[SegmentTrace(last_backward_began=9, buckets_ready=[10], backward_ended=11, exchanges_ended=12)],
            bucket_bytes=[12],
            ended=13,
        ),
    ]
    assert recorder.take_traces() == []


def test_a_step_splits_into_compute_and_exchanges() -> None:
    first = SegmentTrace(last_backward_began=12, buckets_ready=[13, 15], backward_ended=18, exchanges_ended=30)
    second = SegmentTrace(last_backward_began=31, buckets_ready=[31, 31], backward_ended=33, exchanges_ended=40)
    step = StepTrace(10, segments=[first, second], ended=45)
    assert step.compute_intervals() == [[2, 1, 2, 3], [1, 0, 0, 2]]
    assert step.compute_seconds == 11
    assert step.exchange_span == 30
    assert step.after_exchange == 5


def test_the_uncertainty_of_a_median_is_two_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    medians = []
    for _ in range(400):
        spans = (10 + torch.randn(101, generator=generator)).tolist()
        # An outlier.
        spans[7] = 500.0
        medians.append(median_with_error(spans))
    off = sum(abs(middle - 10) > error for middle, error in medians)
    assert 0.01 * 400 < off < 0.1 * 400
    assert median_with_error([3.0]) == (3.0, 0.0)
