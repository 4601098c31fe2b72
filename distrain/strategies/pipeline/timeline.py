"""What the ranks of a pipeline did when: recorded in every step, drawn and summed up at the end of a run."""

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
_NO_WORK = ("wait", "send")
_Mark = Any


@dataclass(frozen=True)
class Span:
    """One stretch of a rank's time in a step.

    Attributes:
        kind: ``forward``, ``backward``, ``input`` or ``weight``; ``send`` for packing and starting to send what another
            stage needs, ``wait`` for waiting for what another stage hands over.
        stage: Whose work it is.
        microbatch: Which.
        start: Seconds on the rank's clock.
        end: Likewise.
    """

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class SpanRecorder:
    """Keeps the last few steps' spans; on a GPU as events that are read later, so that nothing waits for them.

    Args:
        device: Where the rank computes.
        steps: How many steps to keep.
    """

    def __init__(self, device: torch.device, steps: int = 10) -> None:
        self._cuda = device.type == "cuda"
        self._steps: deque[list[tuple[str, int, int, _Mark, _Mark]]] = deque(maxlen=steps)
        self._now: list[tuple[str, int, int, _Mark, _Mark]] = []

    def begin(self) -> None:
        """A step begins."""
        self._now = []

    def end(self) -> None:
        """The step is over and is kept."""
        self._steps.append(self._now)
        # What comes between steps, an evaluation's waits, belongs to none.
        self._now = []

    @contextmanager
    def span(self, kind: str, stage: int, microbatch: int) -> Iterator[None]:
        """Times what happens inside."""
        start = self._mark()
        yield
        self._now.append((kind, stage, microbatch, start, self._mark()))

    def _mark(self) -> _Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def steps(self) -> list[list[Span]]:
        """The kept steps, oldest first."""
        if not self._cuda:
            return [[Span(*row) for row in step] for step in self._steps]
        # Events know only differences: all are placed relative to now.
        torch.cuda.synchronize()
        now, here = self._mark(), time.perf_counter()
        torch.cuda.synchronize()

        def seconds(event: _Mark) -> float:
            return here - float(event.elapsed_time(now)) / 1000

        return [
            [Span(kind, stage, m, seconds(start), seconds(end)) for kind, stage, m, start, end in step]
            for step in self._steps
        ]


Lanes = Sequence[Sequence[Span]]


def aligned(everyone: list[dict[str, Any]]) -> list[list[list[Span]]]:
    """For each recorded step each rank's spans, on rank 0's clock.

    Processes of one host share a clock; another host's is taken to show the same time when all left a barrier.

    Args:
        everyone: For each rank its ``host``, its ``clock`` after the barrier, and its ``steps`` as plain spans.
    """
    first = everyone[0]
    shifts = [0.0 if each["host"] == first["host"] else first["clock"] - each["clock"] for each in everyone]
    count = min(len(each["steps"]) for each in everyone)
    steps = []
    for position in range(-count, 0):
        lanes = []
        for each, shift in zip(everyone, shifts, strict=True):
            spans = (Span(**span) for span in each["steps"][position])
            lanes.append([replace(span, start=span.start + shift, end=span.end + shift) for span in spans])
        steps.append(lanes)
    return steps


def measured_bubble(lanes: Lanes) -> float:
    """Share of all ranks' time, from the step's first start to its last end, in which they don't compute."""
    work = [span for lane in lanes for span in lane if span.kind not in _NO_WORK]
    whole = max(span.end for span in work) - min(span.start for span in work)
    return 1.0 - sum(span.end - span.start for span in work) / (whole * len(lanes))


def chrome_trace(lanes: Lanes) -> list[dict[str, Any]]:
    """The step in the format of chrome://tracing and Perfetto: one process a rank, one row a stage."""
    begin = min(span.start for lane in lanes for span in lane)
    return [
        {
            "name": f"{span.kind} {span.microbatch}",
            "cat": span.kind,
            "ph": "X",
            "ts": 1e6 * (span.start - begin),
            "dur": 1e6 * (span.end - span.start),
            "pid": rank,
            "tid": span.stage,
            "args": {"stage": span.stage, "microbatch": span.microbatch},
        }
        for rank, lane in enumerate(lanes)
        for span in lane
    ]


def write(lanes: Lanes, title: str, folder: Path) -> Figure:
    """Writes ``timeline.png`` and ``timeline.trace.json`` and returns the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timeline.trace.json").write_text(json.dumps(chrome_trace(lanes)) + "\n")
    figure = draw(lanes, title)
    figure.savefig(folder / "timeline.png")
    return figure


def draw(lanes: Lanes, title: str) -> Figure:
    """One row a rank; forward and backward passes with the number of their microbatch, waiting in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.4 + 0.7 * len(lanes)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    begin = min(span.start for lane in lanes for span in lane)
    whole = max(span.end for lane in lanes for span in lane) - begin
    stages = {span.stage for lane in lanes for span in lane}
    for rank, lane in enumerate(lanes):
        for span in lane:
            start, length = 1000 * (span.start - begin), 1000 * (span.end - span.start)
            # Later stages of the same rank are paler.
            alpha = 0.55 if span.stage >= len(lanes) and span.kind not in _NO_WORK else 1.0
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
            if span.kind not in _NO_WORK and span.end - span.start > 0.012 * whole:
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
