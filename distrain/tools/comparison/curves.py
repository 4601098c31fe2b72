"""Curves of a run from its ``metrics.jsonl``, read in one pass and in bounded memory, however long the run was."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from distrain.files.untrusted import finite_number

#: Rows that a curve keeps before it joins neighbours; an even number.
_MOST_BUCKETS = 1024
_MOST_CURVES = 48
_MOST_KNOTS = 128
_LONGEST_NAME = 80
_MAX_LINE_BYTES = 1 << 16
_MAX_BYTES = 1 << 30
_LARGEST_STEP = 1 << 53
#: What is drawn; rows hold more.
_PREFIXES = ("train/", "epoch/val_", "epoch/train_")
_OTHERS = frozenset({"speed/images_per_second"})


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve: a row, or a stretch of consecutive rows.

    Attributes:
        step: Of the row, or the middle of the stretch.
        mean: Mean of the finite values; ``None`` if there is none, so that the line breaks.
        low: The lowest of them.
        high: The highest of them.
    """

    step: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(slots=True)
class _Bucket:
    """Consecutive rows.

    Attributes:
        first: Step of the first row.
        last: Step of the last row.
        count: Number of finite values.
        mean: Their mean.
        low: The lowest of them.
        high: The highest of them.
    """

    first: int
    last: int
    count: int
    mean: float
    low: float
    high: float

    def absorb(self, later: _Bucket) -> None:
        """Takes the rows that follow."""
        self.last = later.last
        if later.count:
            count = self.count + later.count
            # Not by sums, which could overflow.
            self.mean = self.mean * (self.count / count) + later.mean * (later.count / count)
            self.low, self.high = min(self.low, later.low), max(self.high, later.high)
            self.count = count

    def point(self) -> Point:
        """How it is drawn."""
        middle = (self.first + self.last) // 2
        return Point(middle, self.mean, self.low, self.high) if self.count else Point(middle, None, None, None)


class Curve:
    """A number over the steps of a run.

    Of a long curve it keeps stretches of consecutive rows, by their mean, their lowest and their highest value, so that
    also a peak of a single row is drawn.

    Attributes:
        rows: Number of rows.
        missing: How many of them were not finite.
        first_missing: Step of the first of these.
        last: The last finite value.
        lowest: The lowest finite value.
        highest: The highest finite value.
    """

    def __init__(self) -> None:
        self._buckets: list[_Bucket] = []
        self._per_bucket = 1
        self._in_last = 0
        self.rows = 0
        self.missing = 0
        self.first_missing: int | None = None
        self.last: tuple[int, float] | None = None
        self.lowest = math.inf
        self.highest = -math.inf

    def add(self, step: int, value: float | None) -> None:
        """Adds a row.

        Args:
            step: Larger than that of all rows before.
            value: ``None`` if it is not finite.
        """
        self.rows += 1
        if value is None:
            if self.first_missing is None:
                self.first_missing = step
            self.missing += 1
            bucket = _Bucket(step, step, 0, 0.0, math.inf, -math.inf)
        else:
            self.last = (step, value)
            self.lowest = min(self.lowest, value)
            self.highest = max(self.highest, value)
            bucket = _Bucket(step, step, 1, value, value, value)
        if self._in_last and self._in_last < self._per_bucket:
            self._buckets[-1].absorb(bucket)
            self._in_last += 1
            return
        if len(self._buckets) == _MOST_BUCKETS:
            self._buckets = _joined(self._buckets)
            self._per_bucket *= 2
        self._buckets.append(bucket)
        self._in_last = 1

    def points(self, most: int) -> list[Point]:
        """The points to draw, by step: all rows, or stretches of rows.

        Args:
            most: How many points there may be, at least 1.
        """
        buckets = [dataclasses.replace(bucket) for bucket in self._buckets]
        while len(buckets) > most:
            buckets = _joined(buckets)
        return [bucket.point() for bucket in buckets]


def _joined(buckets: list[_Bucket]) -> list[_Bucket]:
    for bucket, later in zip(buckets[::2], buckets[1::2], strict=False):
        bucket.absorb(later)
    return buckets[::2]


class TrainingClock:
    """Seconds of training up to each step, from the logged durations of steps.

    Evaluation, saving, and the time in which a stopped run waited to be resumed are not part of it.
    """

    def __init__(self) -> None:
        #: Step and seconds: of every row, or of long runs every second, fourth, … one.
        self.knots: list[tuple[int, float]] = [(0, 0.0)]
        self._end = (0, 0.0)
        self._rows = 0
        self._rows_per_knot = 1

    @property
    def is_known(self) -> bool:
        """Whether any duration was logged."""
        return self._rows > 0

    def add(self, step: int, step_ms: float) -> None:
        """Adds the steps since the last call: their mean duration in milliseconds."""
        before, seconds = self._end
        self._end = step, seconds + (step - before) * step_ms / 1000
        self._rows += 1
        if self._rows % self._rows_per_knot == 0:
            self.knots.append(self._end)
            if len(self.knots) > _MOST_KNOTS:
                self.knots = self.knots[::2]
                self._rows_per_knot *= 2

    def finish(self, last_step: int) -> None:
        """Ends the knots with the run's last step; the steps behind the last logged duration take as long as before."""
        if self.knots[-1] != self._end:
            self.knots.append(self._end)
        step, seconds = self._end
        if last_step > step > 0:
            self.knots.append((last_step, seconds * last_step / step))


@dataclass
class Metrics:
    """What ``metrics.jsonl`` says.

    Attributes:
        curves: By name, as in the file.
        clock: Seconds over steps.
        last_step: The last row's step.
        last_time: When the last row was written, in seconds since the epoch.
        invalid_lines: Lines that are cut or no rows.
        repeated_rows: Rows whose step is not behind the one before.
        complete: Whether the file was read to its end.
        omitted_names: Whether the file has more curves than are kept.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    clock: TrainingClock = field(default_factory=TrainingClock)
    last_step: int = 0
    last_time: float | None = None
    invalid_lines: int = 0
    repeated_rows: int = 0
    complete: bool = True
    omitted_names: bool = False


def read_metrics(file: IO[bytes]) -> Metrics:
    """Reads rows until the file ends or is larger than any run writes."""
    metrics = Metrics()
    last_steps: dict[str, int] = {}
    for line in _lines(file, metrics):
        row = parse_row(line)
        if row is None:
            metrics.invalid_lines += 1
            continue
        step, kind = row["step"], row["kind"]
        if step <= last_steps.get(kind, -1):
            metrics.repeated_rows += 1
            continue
        last_steps[kind] = step
        metrics.last_step = max(metrics.last_step, step)
        metrics.last_time = finite_number(row.get("time")) or metrics.last_time
        if kind == "step":
            step_ms = finite_number(row.get("speed/step_ms"))
            if step_ms is not None and step_ms >= 0:
                metrics.clock.add(step, step_ms)
        _add_to_curves(metrics, step, row)
    metrics.clock.finish(metrics.last_step)
    return metrics


def _lines(file: IO[bytes], metrics: Metrics) -> Iterator[bytes]:
    """The file's lines; of one that is too long only the beginning, which is then no valid row."""
    total = 0
    while line := file.readline(_MAX_LINE_BYTES):
        yield line
        total += len(line)
        while line and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE_BYTES) if total <= _MAX_BYTES else b""
            total += len(line)
        if total > _MAX_BYTES:
            metrics.complete = False
            return


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A row; ``None`` if the line is not a complete, valid one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("kind") not in ("step", "epoch"):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _LARGEST_STEP else None


def _add_to_curves(metrics: Metrics, step: int, row: dict[str, Any]) -> None:
    for name, value in row.items():
        curve = metrics.curves.get(name)
        if curve is None:
            if not (name.startswith(_PREFIXES) or name in _OTHERS) or len(name) > _LONGEST_NAME:
                continue
            if len(metrics.curves) == _MOST_CURVES:
                metrics.omitted_names = True
                continue
            curve = metrics.curves[name] = Curve()
        elif curve.last is not None and curve.last[0] >= step:
            # Rows of steps and of epochs may hold the same name.
            continue
        curve.add(step, finite_number(value))
