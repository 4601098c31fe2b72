"""One run of a comparison: what its folder says, and what is wrong with the folder."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.files.untrusted import UnreadableFile, finite_number
from distrain.health.mesh_place import place_in_words, sizes_in_words
from distrain.tools.comparison.curves import Metrics, read_metrics
from distrain.tools.comparison.run_files import RunFiles
from distrain.tools.launching.jobs import DONE

#: States of a run.
FINISHED, FAILED, STOPPED, UNFINISHED, EMPTY = "finished", "failed", "stopped", "not finished", "no results"
_LONGEST_TEXT = 300


@dataclass
class Run:
    """What a run's folder says.

    Attributes:
        path: The folder.
        state: One of the states above.
        reason: More about the state, in one line; may be empty.
        config: The configuration, with dotted keys and values as text; ``None`` without one.
        summary: ``summary.json``; empty without one.
        metrics: Its curves.
        problems: What can't be read, in one line each.
        name: Short, and different from those of the other runs.
    """

    path: Path
    state: str = EMPTY
    reason: str = ""
    config: dict[str, str] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    problems: list[str] = field(default_factory=list)
    name: str = ""

    def number(self, path: str) -> float | None:
        """A finite number of the summary by its dotted path, or ``None``."""
        return finite_number(self._value(path))

    def text(self, path: str) -> str | None:
        """A text of the summary by its dotted path, or ``None``."""
        value = self._value(path)
        return value if isinstance(value, str) else None

    @property
    def mesh(self) -> str | None:
        """The mesh of the run's ranks in words; ``None`` where they have one dimension, or nothing is known of it."""
        sizes = self._value("mesh")
        if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
            return None
        return shortened(sizes_in_words(sizes), _LONGEST_TEXT) or None

    def _value(self, path: str) -> Any:
        value: Any = self.summary
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def training_seconds(self) -> float | None:
        """Seconds of training, without evaluation and saving, over all starts of the run; ``None`` if not logged."""
        knots = self.seconds_over_steps()
        return knots[-1][1] if knots else None

    def seconds_over_steps(self) -> list[tuple[int, float]]:
        """Steps and seconds of training between which time is linear; empty if nothing is known of it."""
        if self.metrics.clock.is_known:
            return self.metrics.clock.knots
        # A run shorter than trainer.log_every_steps logs epochs only.
        step_ms, last = self.number("step_ms.mean"), self.metrics.last_step or int(self.number("steps") or 0)
        return [(0, 0.0), (last, last * step_ms / 1000)] if step_ms is not None and last > 0 else []


def read_run(files: RunFiles) -> Run:
    """Reads a run's folder; what is missing or can't be read is told by the run's state and problems."""
    run = Run(files.path)
    run.config = _read_config(files, run.problems)
    run.summary = _read_json(files, "summary.json", run.problems) or {}
    try:
        file = files.open("metrics.jsonl")
        if file is not None:
            with file:
                run.metrics = read_metrics(file)
    except (UnreadableFile, OSError) as error:
        run.problems.append(str(error))
    run.problems += _problems_of_metrics(run.metrics)
    run.state, run.reason = _state(files, run)
    return run


def _read_json(files: RunFiles, name: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        return files.json(name)
    except UnreadableFile as error:
        problems.append(str(error))
        return None


def _read_config(files: RunFiles, problems: list[str]) -> dict[str, str] | None:
    try:
        content = files.yaml("config.yaml")
    except UnreadableFile as error:
        problems.append(str(error))
        return None
    if content is None:
        return None
    return dict(_flattened("", content))


def _flattened(prefix: str, content: dict[Any, Any]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            pairs += _flattened(f"{prefix}{key}.", value)
        else:
            pairs.append((f"{prefix}{key}", show_value(value)))
    return pairs


def show_value(value: object) -> str:
    """A value as it is typed on the command line, on one line of bounded length."""
    if isinstance(value, list):
        text = f"[{', '.join(map(show_value, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {show_value(item)}' for key, item in value.items())}}}"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shortened(text, _LONGEST_TEXT)


def shortened(text: str, longest: int) -> str:
    """Text without its middle if it is too long, since names often differ at their ends."""
    if len(text) <= longest:
        return text
    kept = longest - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _problems_of_metrics(metrics: Metrics) -> list[str]:
    problems = []
    if metrics.invalid_lines:
        lines = "1 line" if metrics.invalid_lines == 1 else f"{metrics.invalid_lines:,} lines"
        problems.append(f"metrics.jsonl: {lines} cut off or not valid, left out")
    if metrics.repeated_rows:
        rows = "1 row" if metrics.repeated_rows == 1 else f"{metrics.repeated_rows:,} rows"
        problems.append(f"metrics.jsonl: {rows} not in the order of steps, left out")
    if not metrics.complete:
        problems.append("metrics.jsonl is too large, so only its beginning was read")
    if metrics.omitted_names:
        problems.append("metrics.jsonl has more curves than are drawn")
    for name, curve in metrics.curves.items():
        if curve.missing:
            rows = f"{curve.missing:,} of {curve.rows:,} rows"
            problems.append(f"{name} is not finite in {rows}, first at step {curve.first_missing:,}")
    return problems


def _state(files: RunFiles, run: Run) -> tuple[str, str]:
    failure = _read_json(files, "failure.json", run.problems)
    if failure is not None:
        return FAILED, describe_failure(failure)
    stopped = _read_json(files, "stopped.json", run.problems)
    if stopped is not None:
        reason, step = show_value(stopped.get("reason", "request")), show_value(stopped.get("step", "?"))
        return STOPPED, f"by {reason} at step {step}; the same command resumes it"
    if run.summary:
        return FINISHED, ""
    outcome = ""
    if files.outcome is not None and files.outcome[0] != DONE:
        outcome = f"the sweep says {': '.join(part for part in files.outcome if part)}"
    if run.metrics.curves:
        return UNFINISHED, outcome or _describe_last_row(run.metrics)
    return EMPTY, outcome or "nothing is logged yet"


def describe_failure(failure: dict[str, Any]) -> str:
    """What ``failure.json`` says, in one line."""
    parts = []
    for name in ("rank", "host", "step"):
        if failure.get(name) is not None:
            parts.append(f"{name} {show_value(failure[name])}")
            place = failure.get("place")
            # Empty where the ranks have one dimension.
            if name == "rank" and isinstance(place, dict) and place:
                parts[-1] += f" ({shortened(place_in_words(place), _LONGEST_TEXT)})"
    error = " ".join(show_value(failure.get("error") or failure.get("reason") or "").split())
    return ", ".join(parts) + (f": {error}" if error and parts else error)


def _describe_last_row(metrics: Metrics) -> str:
    when = ""
    if metrics.last_time is not None:
        try:
            written = datetime.datetime.fromtimestamp(metrics.last_time).astimezone()
            when = f", written {written.isoformat(' ', 'seconds')}"
        except (ValueError, OverflowError, OSError):  # no time that a clock shows
            when = ""
    return f"no summary.json: it runs or was killed; last row at step {metrics.last_step:,}{when}"
