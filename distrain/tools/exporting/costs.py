"""What a compressed program costs in accuracy and gains in size and time, beside the one that it was made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.data.batch import Targets
from distrain.errors import ConfigError
from distrain.tasks.base import Task
from distrain.tools.exporting.program_files import Runner

#: Images in the calls that are timed.
BATCHES = (1, 32)
#: Most calls of each program that are timed, the fewest, and seconds after which there are no more than these.
_MOST_CALLS, _FEWEST_CALLS, _SECONDS = 100, 5, 3.0


@dataclass(frozen=True)
class Cost:
    """Of one program.

    Attributes:
        name: Its number format.
        score: The task's score on the test split.
        size: Of its file, in bytes.
        milliseconds: Median time of a call, for each of :data:`BATCHES`.
    """

    name: str
    score: float
    size: int
    milliseconds: Sequence[float]


def score(task: Task, program: Runner, batches: Iterable[tuple[Tensor, Targets]]) -> float:
    """The task's score of a program's results.

    Args:
        task: What the model was trained to do.
        program: The program.
        batches: Images as it takes them, and their targets.
    """
    state, count = task.metric_state(torch.device("cpu")), 0
    for images, targets in batches:
        task.update_state(state, task.outputs_of(program(images)), targets)
        count += len(images)
    return task.results(state, count)[task.score]


def latencies(programs: Mapping[str, Runner], images: Tensor) -> dict[str, list[float]]:
    """Median milliseconds of a call of each program for each of :data:`BATCHES`, measured in turns.

    Args:
        programs: By name.
        images: At least one, as the programs take them.
    """
    found: dict[str, list[float]] = {name: [] for name in programs}
    for size in BATCHES:
        batch = images[torch.arange(size) % len(images)]
        times: dict[str, list[float]] = {name: [] for name in programs}
        for program in programs.values():
            program(batch)
        end = time.perf_counter() + _SECONDS
        for call in range(_MOST_CALLS):
            if call >= _FEWEST_CALLS and time.perf_counter() > end:
                break
            for name, program in programs.items():
                start = time.perf_counter()
                program(batch)
                times[name].append(1000 * (time.perf_counter() - start))
        for name, values in times.items():
            found[name].append(statistics.median(values))
    return found


def check_drop(task: Task, plain: Cost, compressed: Cost, limit: float) -> None:
    """Refuses a program whose score is too far below that of the one it was made of.

    Args:
        task: Says whether a larger score is better.
        plain: Of the program in float32.
        compressed: Of the other one.
        limit: Largest accepted drop: an absolute one where more is better, as of an accuracy; else a share of the
            score, as of an error.

    Raises:
        ConfigError: Says both scores.
    """
    if task.higher_is_better:
        drop, unit = plain.score - compressed.score, ""
    else:
        drop, unit = (compressed.score - plain.score) / max(abs(plain.score), torch.finfo(torch.float64).tiny), "× it"
    # NaN, which no comparison calls larger, is too far.
    if not drop <= limit:
        problem = (
            f"the test {task.score} is {plain.score:.4f} in {plain.name} and {compressed.score:.4f} in "
            f"{compressed.name}, worse by {drop:.4f}{unit}; more calibration_images may help; no file is left"
        )
        raise ConfigError("max_drop", limit, problem)


def rows(metric: str, costs: Sequence[Cost]) -> list[list[str]]:
    """A table of cells: a heading, and a row for each program."""
    heading = ["", metric, "bytes", *(f"ms for {size} image{'s' if size > 1 else ''}" for size in BATCHES)]
    return [
        heading,
        *([each.name, f"{each.score:.4f}", f"{each.size:,}", *map(_shown, each.milliseconds)] for each in costs),
    ]


def as_text(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines for a terminal, in columns."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for first, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """The same for a model card."""
    heading, *others = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([heading, f"| --- {'| --: ' * (len(table[0]) - 1)}|", *others])


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.1f}"
