"""Runs the whole suite on several processes of pytest-xdist, file by file.

Tests of ranks wait for each other's messages most of their time, and tests of one process use one core. Two files side
by side take the time that either of them leaves unused. A file stays on one process: its tests share fixtures that
train.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: More files than this side by side would make waiting ranks wait for a core.
_MOST_WORKERS = 4
#: Files that take longest, below ``tests/``, longest first. They begin first, so that no process ends with one of them
#: while the others have nothing left to do. Their order is the only thing that is wrong if this list is out of date.
_LONGEST = (
    "strategies/pipeline/test_strategy.py",
    "api/test_ranks.py",
    "strategies/parameter_server/test_strategy.py",
    "test_disk_faults.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Chooses the number of processes where the whole suite is run and no number is given (``-n 0``: one process)."""
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None or options.tx:
        return
    # Chosen files, markers (a SLURM cluster on this machine) and what needs the terminal are run as they always were.
    is_whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    has_own_marker = any(argument.startswith("-m") for argument in config.invocation_params.args)
    if not is_whole_suite or has_own_marker or options.usepdb or options.collectonly or options.capture == "no":
        return
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    if workers > 1:
        options.numprocesses, options.dist, options.loadscopereorder = workers, "loadfile", False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files that take longest to the front."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
