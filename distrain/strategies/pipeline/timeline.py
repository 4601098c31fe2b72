"""Timelines of a pipeline: spans are recorded in every step, and drawn at the end of a run."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distrain.files.contained_folder import ContainedFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "input": "#f58518",
    "weight": "#54a24b",
    "send": "#b279a2",
    "wait": "#e8e8e8",
}
_COMMUNICATION = ("wait", "send")
#: Seconds, or a CUDA event.
_Timestamp = Any


@dataclass(frozen=True)
class Span:
    """An interval of a rank's time in a step.

    Attributes:
        kind: ``forward``, ``backward``, ``input`` or ``weight`` as in a schedule; ``send`` for starting to send what
            another stage needs, ``wait`` for waiting for what another stage sends.
        stage: Index of the stage.
        microbatch: Index of the microbatch.
        start: Seconds on the rank's clock.
        end: Seconds on the rank's clock.
    """

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class SpanRecorder:
    """Records the spans of the last few steps.

    On a GPU it records events and reads them later, so that the host does not wait for the device.

    Args:
        device: The rank's device.
        steps: Number of steps to keep.
    """

    def __init__(self, device: torch.device, steps: int = 10) -> None:
        self._cuda = device.type == "cuda"
        self._steps: deque[list[tuple[str, int, int, _Timestamp, _Timestamp]]] = deque(maxlen=steps)
        self._current: list[tuple[str, int, int, _Timestamp, _Timestamp]] = []

    def begin_step(self) -> None:
        """Starts the record of a step."""
        self._current = []

    def end_step(self) -> None:
        """Ends the step and keeps its record; a step that is not ended is not kept."""
        self._steps.append(self._current)
        # Spans between steps, such as the waits of an evaluation, are not kept.
        self._current = []

    @contextmanager
    def span(self, kind: str, stage: int, microbatch: int) -> Iterator[None]:
        """Records the block inside ``with`` as a span."""
        start = self._timestamp()
        yield
        self._current.append((kind, stage, microbatch, start, self._timestamp()))

    def _timestamp(self) -> _Timestamp:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def steps(self) -> list[list[Span]]:
        """The last steps, oldest first."""
        if not self._cuda:
            return [[Span(*row) for row in step] for step in self._steps]
        # CUDA gives only the time between two events, so all times are computed relative to a last event.
        torch.cuda.synchronize()
        last, last_seconds = self._timestamp(), time.perf_counter()
        torch.cuda.synchronize()

        def seconds(event: _Timestamp) -> float:
            return last_seconds - float(event.elapsed_time(last)) / 1000

        return [
            [Span(kind, stage, m, seconds(start), seconds(end)) for kind, stage, m, start, end in step]
            for step in self._steps
        ]


#: Each rank's spans of one step.
Lanes = Sequence[Sequence[Span]]


def align_clocks(ranks: list[dict[str, Any]]) -> list[list[list[Span]]]:
    """Moves the spans of all ranks to rank 0's clock.

    Processes of one host share a clock. Other hosts' clocks are aligned by the time at which ranks left a barrier.

    Args:
        ranks: For each rank its ``host``, the ``clock`` in seconds when it left the barrier, and the spans of its
            ``steps`` as dictionaries.

    Returns:
        For each step that all ranks recorded, each rank's spans.
    """
    first = ranks[0]
    shifts = [0.0 if rank["host"] == first["host"] else first["clock"] - rank["clock"] for rank in ranks]
    count = min(len(rank["steps"]) for rank in ranks)
    steps = []
    for position in range(-count, 0):
        lanes = []
        for rank, shift in zip(ranks, shifts, strict=True):
            spans = (Span(**span) for span in rank["steps"][position])
            lanes.append([replace(span, start=span.start + shift, end=span.end + shift) for span in spans])
        steps.append(lanes)
    return steps


def measured_bubble(lanes: Lanes) -> float:
    """Fraction of all ranks' time, from the first pass's start to the last one's end, in which they don't compute."""
    passes = [span for lane in lanes for span in lane if span.kind not in _COMMUNICATION]
    duration = max(span.end for span in passes) - min(span.start for span in passes)
    return 1.0 - sum(span.end - span.start for span in passes) / (duration * len(lanes))


def chrome_trace(lanes: Lanes) -> list[dict[str, Any]]:
    """The step in the format of chrome://tracing and Perfetto: each rank is a process, each stage a thread."""
    first_start = min(span.start for lane in lanes for span in lane)
    return [
        {
            "name": f"{span.kind} {span.microbatch}",
            "cat": span.kind,
            "ph": "X",
            "ts": 1e6 * (span.start - first_start),
            "dur": 1e6 * (span.end - span.start),
            "pid": rank,
            "tid": span.stage,
            "args": {"stage": span.stage, "microbatch": span.microbatch},
        }
        for rank, lane in enumerate(lanes)
        for span in lane
    ]


def write_timeline(lanes: Lanes, title: str, folder: Path) -> Figure:
    """Writes ``timeline.png`` and ``timeline.trace.json``, and returns the figure."""
    contained = ContainedFolder(folder.parent)
    contained.make_folder(folder.name)
    contained.replace_text(f"{folder.name}/timeline.trace.json", json.dumps(chrome_trace(lanes)) + "\n")
    figure = draw_timeline(lanes, title)
    with contained.create(f"{folder.name}/timeline.png") as file:
        figure.savefig(file, format="png")
    return figure


def draw_timeline(lanes: Lanes, title: str) -> Figure:
    """Draws one row per rank: passes with the index of their microbatch, and waiting in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.4 + 0.7 * len(lanes)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    first_start = min(span.start for lane in lanes for span in lane)
    duration = max(span.end for lane in lanes for span in lane) - first_start
    stages = {span.stage for lane in lanes for span in lane}
    for rank, lane in enumerate(lanes):
        for span in lane:
            start, length = 1000 * (span.start - first_start), 1000 * (span.end - span.start)
            # Later stages of the same rank are paler.
            alpha = 0.55 if span.stage >= len(lanes) and span.kind not in _COMMUNICATION else 1.0
            axes.barh(
                rank,
                length,
                left=start,
                height=0.8,
                color=_COLOURS[span.kind],
                alpha=alpha,
                edgecolor="white",
                linewidth=0.3,
            )
            if span.kind not in _COMMUNICATION and span.end - span.start > 0.012 * duration:
                axes.text(start + length / 2, rank, str(span.microbatch), ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(lanes)), [f"rank {rank}" for rank in range(len(lanes))])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    kinds = [kind for kind in _COLOURS if any(span.kind == kind for lane in lanes for span in lane)]
    names = {
        "input": "backward: input's gradient",
        "weight": "backward: weights' gradient",
        "send": "sending",
        "wait": "waiting",
    }
    handles = [Patch(color=_COLOURS[kind], label=names.get(kind, kind)) for kind in kinds]
    if len(stages) > len(lanes):
        handles.append(Patch(color="#bbbbbb", label="paler: the rank's later stages"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=len(handles), fontsize=8)
    return figure
