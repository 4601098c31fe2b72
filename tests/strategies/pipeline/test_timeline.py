"""Timelines of a step: what counts as idle, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distrain.strategies.pipeline.timeline import (
    Span,
    SpanRecorder,
    align_clocks,
    chrome_trace,
    measured_bubble,
    write_timeline,
)

LANES = [
    [Span("forward", 0, 0, 0.0, 1.0), Span("send", 1, 0, 1.0, 1.1), Span("backward", 0, 0, 4.0, 6.0)],
    [Span("wait", 1, 0, 0.0, 1.0), Span("forward", 1, 0, 1.0, 2.0), Span("backward", 1, 0, 2.0, 4.0)],
]


def test_waiting_and_sending_count_as_idle() -> None:
    # Two ranks for 6 seconds, of which each works 3.
    assert measured_bubble(LANES) == pytest.approx(0.5)


def test_spans_between_steps_are_not_kept() -> None:
    recorder = SpanRecorder(torch.device("cpu"), steps=2)
    for microbatch in range(3):
        recorder.begin_step()
        with recorder.span("forward", 0, microbatch):
            pass
        recorder.end_step()
        with recorder.span("wait", 0, 99):
            pass
    assert [[span.microbatch for span in step] for step in recorder.steps()] == [[1], [2]]


def test_another_hosts_clock_is_aligned() -> None:
    spans = [{"kind": "forward", "stage": 0, "microbatch": 0, "start": 1.0, "end": 2.0}]
    here, there = {"host": "a", "clock": 10.0, "steps": [spans]}, {"host": "b", "clock": 110.0, "steps": [spans, spans]}
    lanes = align_clocks([here, {**here, "clock": 10.5}, there])
    assert len(lanes) == 1
    assert [lane[0].start for lane in lanes[0]] == [1.0, 1.0, -99.0]


def test_figure_and_trace_are_written(tmp_path: Path) -> None:
    write_timeline(LANES, "a step", tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "pipeline" / "timeline.trace.json").read_text())
    assert events == chrome_trace(LANES)
    assert events[-1] == {
        "name": "backward 0",
        "cat": "backward",
        "ph": "X",
        "ts": 2e6,
        "dur": 2e6,
        "pid": 1,
        "tid": 1,
        "args": {"stage": 1, "microbatch": 0},
    }
