"""``distrain compare DIR…``: runs side by side, as a table in the terminal and as one HTML page."""

from __future__ import annotations

import datetime
import shutil
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import distrain
from distrain.cli import output
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import print_to_stderr, show
from distrain.tools.comparison.differences import name_runs
from distrain.tools.comparison.final_figures import ordered
from distrain.tools.comparison.page import to_html
from distrain.tools.comparison.run import Run, read_run
from distrain.tools.comparison.run_files import find_runs
from distrain.tools.comparison.text_table import to_text

#: Columns of the table where standard output is no terminal, so that nothing is left out of a file.
_WIDTH_OF_A_FILE = 400
_STANDARD_OUTPUT = "-"


@dataclass
class CompareSettings:
    """Keys of ``distrain compare``."""

    output: str | None = setting(
        "The page, one HTML file; -: on standard output, without the table; null: only the table.",
        path=True,
    )
    metric: str | None = setting(
        "Order the runs by this number of summary.json, the best first; null: the order of the command line."
    )
    baseline: str | None = setting(
        "The run that differences refer to, by its folder or its name in the table; null: the first one.", path=True
    )
    open: bool = setting("Show the page in the browser.")


def run(settings: CompareSettings, folders: Sequence[str]) -> list[Run]:
    """Prints the table and writes the page.

    Args:
        settings: The command line's ``key=value``.
        folders: Run folders, and folders that hold runs.

    Returns:
        The runs, in the order in which they are shown.

    Raises:
        ConfigError: There is no run in a folder, a setting can't be used, or the page can't be written.
    """
    if not folders:
        raise config_error("DIR", "name at least one folder of a run or a sweep, as in: distrain compare outputs")
    target = None if settings.output in (None, _STANDARD_OUTPUT) else Path(str(settings.output))
    if target is not None:
        output.check_writable(target)
    found = find_runs(folders)
    runs = [read_run(files) for files in found.runs]
    name_runs(runs)
    if settings.metric is not None:
        runs = ordered(runs, settings.metric)
    baseline = runs[0] if settings.baseline is None else _find(settings.baseline, runs)
    for notice in found.notices:
        print_to_stderr(f"distrain: {notice}")
    if settings.output != _STANDARD_OUTPUT:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_OF_A_FILE
        show(to_text(runs, width))
    if settings.output is not None:
        made = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
        page = to_html(runs, baseline, made, distrain.__version__)
        output.write_text(target, page)
        if target is not None:
            _announce(target, len(page), len(runs), in_browser=settings.open)
    return runs


def _announce(page: Path, size: int, runs: int, *, in_browser: bool) -> None:
    show(f"{page}: {'1 run' if runs == 1 else f'{runs} runs'}, {max(round(size / 1000), 1)} kB")
    if in_browser and not webbrowser.open(page.resolve().as_uri()):
        print_to_stderr(f"distrain: no browser was found; open {page} in one")


def _find(wanted: str, runs: Sequence[Run]) -> Run:
    named = [run for run in runs if run.name == wanted]
    at_path = [run for run in runs if run.path.resolve() == Path(wanted).resolve()]
    if not (named or at_path):
        raise ConfigError("baseline", wanted, "is none of the runs", [run.name for run in runs])
    return (named or at_path)[0]
