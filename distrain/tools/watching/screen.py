"""A run as it is now, as lines that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

from distrain.files.escaping import escaped
from distrain.files.live_text import BAD, DOUBTFUL, GOOD, bar, clock, coloured, cut, display_width
from distrain.health.mesh_place import place_in_words, sizes_in_words
from distrain.health.run_status import RankStatus, RunStatus
from distrain.reporting.end_table import end_table
from distrain.tools.watching.job import (
    ENDED,
    FAILED,
    HANGING,
    KILLED,
    RUNNING,
    SILENT,
    STARTING,
    STOPPED,
    SUSPENDED,
    Job,
)

_COLOURS = {
    **dict.fromkeys((RUNNING, ENDED), GOOD),
    **dict.fromkeys((STARTING, HANGING, SUSPENDED, SILENT, STOPPED), DOUBTFUL),
    **dict.fromkeys((FAILED, KILLED), BAD),
}
_LONGEST_BAR = 30
_LONGEST_HOST = 20
_LONGEST_PLACE = 40
#: Titles of columns of words.
_WORDS = frozenset({"place", "host", "phase"})
#: The reason of a failure may be long.
_MOST_STATE_LINES = 3
#: Fewest rows of ranks that are shown in a low terminal.
_FEWEST_RANKS = 3
_GAP = "  "
#: What is not of interest from second to second.
_HIDDEN = frozenset({"train/gradient_norm", "train/learning_rate"})


def to_lines(job: Job, width: int, height: int, stream: TextIO) -> list[str]:
    """The lines to show.

    Args:
        job: The run.
        width: Columns of the terminal; no line is longer.
        height: Rows of the terminal; there are fewer lines, unless it is very low.
        stream: The terminal, which may show no colours.
    """
    ended = job.state == ENDED and bool(job.summary)
    lines = [_title(job), *_progress(job, width), *(end_table(job.summary, job.name, width) if ended else _values(job))]
    # A problem is one line, whatever a stranger's file made of it.
    problems = [escaped(problem) for problem in job.problems]
    # Where the ranks of a run were that ended as it should says nothing.
    if job.status is not None and job.state not in (ENDED, STOPPED):
        room = max(height - len(lines) - len(problems) - 4 - _MOST_STATE_LINES, _FEWEST_RANKS)
        lines += ["", *_ranks(job, job.status, room)]
    lines += problems
    state = textwrap.wrap(_state_line(job), max(width, 10), max_lines=_MOST_STATE_LINES, placeholder=" …")
    title, first, *rest = [cut(line, width) for line in (lines[0], *state, *lines[1:])]
    return [title, first.replace(job.state, coloured(job.state, _COLOURS[job.state], stream), 1), *rest]


def to_line(job: Job) -> str:
    """The same in one line, for files and pipes."""
    parts = [_state_line(job)]
    if job.status is not None and job.status.total_steps:
        parts.append(f"step {job.status.step}/{job.status.total_steps}")
    return ", ".join([*parts, *_values(job)[:1]])


def _title(job: Job) -> str:
    ranks = job.status.ranks if job.status else []
    # The last rank has the largest number along each dimension.
    mesh = sizes_in_words({name: number + 1 for name, number in ranks[-1].place.items()}) if ranks else ""
    strategy, number = _name(job, "strategy") + (f" ({mesh})" if mesh else ""), len(ranks)
    parts = [strategy, f"{number} rank{'s' * (number != 1)}" if number else ""]
    parts += [_name(job, "model"), _name(job, "data")]
    return escaped(f"{job.name}: {', '.join(filter(None, parts))}".removesuffix(": "))


def _name(job: Job, group: str) -> str:
    name = job.setting(group, "name")
    return name if isinstance(name, str) else ""


def _state_line(job: Job) -> str:
    if job.state != RUNNING or job.status is None:
        return escaped(f"{job.state}: {job.reason}".removesuffix(": "))
    status, parts = job.status, [f"{RUNNING}: {job.status.phase}"]
    if status.epochs:
        parts.append(f"epoch {min(status.epoch + 1, status.epochs)} of {status.epochs}")
    if status.training_seconds:
        parts.append(f"{clock(status.training_seconds)} so far")
    if status.seconds_left is not None and status.step < status.total_steps:
        parts.append(f"about {clock(status.seconds_left)} left")
    return escaped(", ".join(parts))


def _progress(job: Job, width: int) -> list[str]:
    status = job.status
    if status is None or not status.total_steps:
        return []
    share = min(status.step / status.total_steps, 1.0)
    text = f"step {status.step:,} of {status.total_steps:,}, {share:.0%}"
    return [f"{bar(share, min(_LONGEST_BAR, max(width - len(text) - 2, 4)))}{_GAP}{text}"]


def _values(job: Job) -> list[str]:
    """Last loss and metrics, those of the validation, speed, and time shares, a line each."""
    lines = []
    training = [*_listed(job.values, "train/")] or [*_listed(job.epoch_values, "epoch/train_")]
    if training:
        lines.append(", ".join(training))
    if validation := _listed(job.epoch_values, "epoch/val_"):
        lines.append(f"validation: {', '.join(validation)}")
    speed = [
        form.format(value)
        for name, form in (("speed/images_per_second", "{:,.0f} images/s"), ("speed/step_ms", "{:,.1f} ms a step"))
        if (value := job.values.get(name)) is not None
    ]
    shares = [f"{escaped(name.removeprefix('time/'))} {share:.0%}" for name, share in _of(job.values, "time/")]
    return [*lines, *(", ".join(each) for each in (speed, shares) if each)]


def _listed(values: Mapping[str, float | None], prefix: str) -> list[str]:
    named = [(name.removeprefix(prefix), value) for name, value in _of(values, prefix) if name not in _HIDDEN]
    return [f"{escaped(name)} {value:.4f}" for name, value in named]


def _of(values: Mapping[str, float | None], prefix: str) -> list[tuple[str, float]]:
    return [(name, value) for name, value in values.items() if name.startswith(prefix) and value is not None]


def _ranks(job: Job, status: RunStatus, room: int) -> list[str]:
    """The table of ranks: all, or as many as there is room for, those first that made no progress for longest."""
    ranks: Sequence[RankStatus] = status.ranks
    if len(ranks) > room:
        by_idleness = sorted(ranks, key=lambda rank: (rank.has_left, -rank.idle_seconds))
        ranks = sorted(by_idleness[: room - 1], key=lambda rank: rank.rank)
    goes_on = job.exit_code is None
    placed = any(rank.place for rank in ranks)
    titles = ["rank", *(("place",) if placed else ()), "host", "phase", "step", "steps/s"]
    rows = [[*titles, *(("last moved", "last heard") if goes_on else ())]]
    for rank in ranks:
        moved, heard = (seconds + job.age_seconds for seconds in (rank.idle_seconds, rank.silent_seconds))
        phase = "left" if rank.has_left else status.phase_of(rank)
        rows.append(
            [
                str(rank.rank),
                *((cut(escaped(place_in_words(rank.place)), _LONGEST_PLACE),) if placed else ()),
                cut(escaped(rank.host), _LONGEST_HOST),
                cut(escaped(phase), _LONGEST_HOST),
                f"{rank.step:,}",
                f"{rank.steps_per_second:,.1f}",
                *((f"{_ago(moved)} ago", f"{_ago(heard)} ago") if goes_on else ()),
            ]
        )
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = [_GAP.join(map(_padded, row, widths, rows[0])).rstrip() for row in rows]
    left_out = len(status.ranks) - len(ranks)
    if left_out:
        steps = [rank.step for rank in status.ranks]
        lines.append(f"and {left_out:,} more; all are between step {min(steps):,} and {max(steps):,}")
    return lines


def _padded(cell: str, width: int, title: str) -> str:
    space = " " * (width - display_width(cell))
    # The other columns are numbers.
    return cell + space if title in _WORDS else space + cell


def _ago(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else clock(seconds)
