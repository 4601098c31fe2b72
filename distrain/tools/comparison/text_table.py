"""Runs as a table for the terminal, as wide as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distrain.files.escaping import Lines
from distrain.files.live_text import display_width
from distrain.tools.comparison.final_figures import (
    best_validation,
    bytes_sent,
    show_bytes,
    show_number,
    steps,
    test_metrics,
    train_loss,
    validation_metrics,
)
from distrain.tools.comparison.run import FINISHED, Run, shortened

_GAP = "  "
#: A name is not made shorter than this to make room for another column.
_SHORTEST_NAME = 16


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Attributes:
        title: Its first line.
        cells: One for each run.
        importance: Columns of low importance are left out where the table is too wide.
        is_number: Whether cells are aligned at the right.
    """

    title: str
    cells: list[str]
    importance: int
    is_number: bool = True

    @property
    def width(self) -> int:
        return max(map(display_width, (self.title, *self.cells)))


def to_text(runs: Sequence[Run], width: int) -> Lines:
    """The table, and below it a line for each run that did not finish or has files that can't be read.

    Args:
        runs: In the order of the rows.
        width: Of the terminal, in columns. Columns that don't fit are left out, and named below the table.
    """
    columns = _columns(runs)
    names = [run.name for run in runs]
    longest = max(3, *map(display_width, names))

    def rest() -> int:
        return width - sum(len(_GAP) + column.width for column in columns)

    left_out = []
    while columns and rest() < min(longest, _SHORTEST_NAME):
        least = min(columns, key=lambda column: column.importance)
        columns.remove(least)
        left_out.append(least.title)
    room = max(min(rest(), longest), 3)
    names = [_fit(name, room) for name in names]
    room = max(3, *map(display_width, names))
    lines = [_line("run", [column.title for column in columns], columns, room)]
    for row, name in enumerate(names):
        lines.append(_line(name, [column.cells[row] for column in columns], columns, room))
    if left_out:
        lines.append(f"(too narrow for: {', '.join(reversed(left_out))})")
    for run in runs:
        if run.state != FINISHED:
            lines.append(f"{run.name}: {run.state}" + (f": {run.reason}" if run.reason else ""))
        lines += [f"{run.name}: {problem}" for problem in run.problems]
    return Lines.of(lines)


def _line(name: str, cells: Sequence[str], columns: Sequence[_Column], room: int) -> str:
    text = name + " " * (room - display_width(name))
    for cell, column in zip(cells, columns, strict=True):
        space = " " * (column.width - display_width(cell))
        text += _GAP + (space + cell if column.is_number else cell + space)
    return text.rstrip()


def _fit(name: str, room: int) -> str:
    longest = room
    while display_width(name) > room and longest > 1:
        name = shortened(name, longest)
        longest -= 1
    return name


def _columns(runs: Sequence[Run]) -> list[_Column]:
    """The columns that say something, from left to right."""

    def numbers(values: Sequence[float | None], decimals: int | None = None) -> list[str]:
        return ["–" if value is None else show_number(value, decimals) for value in values]

    def choice(path: str, key: str) -> list[str]:
        return [shortened(run.text(path) or (run.config or {}).get(key) or "–", 20) for run in runs]

    columns = [
        _Column("state", [run.state for run in runs], 90, is_number=False),
        _Column("strategy", choice("strategy", "strategy.name"), 60, is_number=False),
        _Column("compression", choice("compression", "compression.name"), 40, is_number=False),
        _Column("ranks", numbers([run.number("world_size") for run in runs]), 50),
    ]
    for rank, name in enumerate(validation_metrics(runs)):
        cells = numbers([best_validation(run, name) for run in runs], 4)
        columns.append(_Column(shortened(f"best val {name}", 24), cells, 100 if rank == 0 else 30 - rank))
    for rank, name in enumerate(test_metrics(runs)):
        cells = numbers([run.number(name) for run in runs], 4)
        columns.append(_Column(shortened(name.replace("_", " "), 24), cells, 95 if rank == 0 else 29 - rank))
    shares = [run.number("time_share.communication") for run in runs]
    columns += [
        _Column("train loss", numbers([train_loss(run) for run in runs], 4), 55),
        _Column("steps", numbers([steps(run) for run in runs]), 70),
        _Column("seconds", numbers([run.training_seconds for run in runs], 1), 80),
        _Column("images/s", numbers([run.number("images_per_second") for run in runs], 0), 85),
        _Column("comm.", ["–" if share is None else f"{100 * share:.0f}%" for share in shares], 75),
        _Column("sent", [show_bytes(bytes_sent(run)) for run in runs], 65),
    ]

    def says_something(column: _Column) -> bool:
        if column.title == "state":
            return any(run.state != FINISHED for run in runs)
        return any(cell != "–" for cell in column.cells) and not (
            column.title == "compression" and len(set(column.cells)) == 1
        )

    return [column for column in columns if says_something(column)]
