"""``distrain watch RUN``: shows a run that goes on, from another shell or another host that sees its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.config.setting import setting
from distrain.errors import EXIT_INTERRUPTED, ConfigError, config_error
from distrain.files.escaping import Lines, escaped
from distrain.files.live_text import LiveText, is_live, terminal_size
from distrain.files.terminal import show
from distrain.tools.comparison.run_files import find_runs
from distrain.tools.watching import screen
from distrain.tools.watching.job import SILENT, Job, JobReader, to_json

#: Seconds after which a run that seems silent is looked at again: its host's clock may be wrong.
_SECOND_LOOK_SECONDS = 3.0
#: Columns where standard output is no terminal.
_WIDTH_OF_A_FILE = 120
_HEIGHT_OF_A_FILE = 10_000


@dataclass
class WatchSettings:
    """Keys of ``distrain watch``."""

    run: str | None = setting("Folder of the run; the same as the argument without a key.", path=True)
    once: bool = setting("Show the run once and end, instead of until the run ends.")
    json: bool = setting("Print one JSON object per line, for scripts.")
    every: float = setting("Seconds between two looks at the folder.", at_least=0.1)


def run(settings: WatchSettings, folders: Sequence[str]) -> int:
    """Shows a run until it ends.

    Args:
        settings: The command line's ``key=value``.
        folders: What was named without a key.

    Returns:
        The exit code: 0 if the run has ended (with ``once`` also if it goes on), 75 if it was stopped and can be
        resumed, 1 if it failed or was killed, 130 after Ctrl-C.

    Raises:
        ConfigError: There is not exactly one run in the folder.
    """
    reader = _reader([*([] if settings.run is None else [settings.run]), *folders])
    display = _display(settings)
    job = _read_carefully(reader)
    try:
        display(job)
        while job.exit_code is None and not settings.once:
            time.sleep(settings.every)
            job = reader.read()
            display(job)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return job.exit_code or 0


def _reader(named: Sequence[str]) -> JobReader:
    if len(named) != 1:
        raise config_error("RUN", "name one run's folder, as in: distrain watch outputs/2026-11-30/09-00-00")
    (name,) = named
    runs = find_runs([name], "RUN").runs
    if len(runs) > 1:
        newest = max(runs, key=lambda files: files.path.stat().st_mtime)
        raise ConfigError("RUN", name, f"holds {len(runs)} runs; name one of them. The newest is {newest.path}")
    return JobReader(name, runs[0])


def _read_carefully(reader: JobReader) -> Job:
    """Reads the run for the first time. A run that seems silent may only have a host whose clock is behind."""
    job = reader.read()
    if job.state == SILENT:
        time.sleep(_SECOND_LOOK_SECONDS)
        job = reader.read()
    return job


class _Printed:
    """Prints a job where nothing can be drawn in place: once if ``once`` is set, else a line when something changes."""

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self._last: tuple[object, ...] = ()

    def __call__(self, job: Job) -> None:
        # What was logged and the state change, while times change always.
        news = (job.state, job.status and (job.status.phase, job.status.epoch), job.values, job.epoch_values)
        if news == self._last:
            return
        self._last = news
        if self._settings.json:
            show(to_json(job))
        elif self._settings.once:
            width, height = terminal_size() if is_live(sys.stdout) else (_WIDTH_OF_A_FILE, _HEIGHT_OF_A_FILE)
            # Every line is escaped; escaping all again would show colours as text.
            show(Lines("\n".join(screen.to_lines(job, width, height, sys.stdout))))
        else:
            show(escaped(screen.to_line(job)))


def _display(settings: WatchSettings) -> _Printed | _Drawn:
    if settings.once or settings.json or not is_live(sys.stdout):
        return _Printed(settings)
    return _Drawn()


class _Drawn:
    """Draws a job in place of what was drawn before."""

    def __init__(self) -> None:
        self._live = LiveText(sys.stdout)

    def __call__(self, job: Job) -> None:
        self._live.show(screen.to_lines(job, *terminal_size(), sys.stdout))
