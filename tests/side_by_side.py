"""Runs the whole suite on several processes of pytest-xdist, file by file.

Tests of ranks wait for each other's messages most of their time, and tests of one process use one core. Two files side
by side take the time that either of them leaves unused. A file stays on one process: its tests share fixtures that
train.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

#: With more files side by side than this, what waits for an answer in time might wait for a core.
_MOST_PROCESSES = 4
#: Files that take longest. They begin first, so that no process is still busy with one of them when the others have
#: nothing left to do. Where this list is out of date, the suite takes a little longer.
_LONGEST = (
    "health/test_watch.py",
    "training/test_resume.py",
    "strategies/pipeline/test_strategy.py",
    "strategies/parameter_server/test_strategy.py",
    "test_disk_faults.py",
    "api/test_ranks.py",
    "compression/test_contract.py",
    "strategies/test_parity.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Chooses the number of processes where the whole suite is run and no number is given (``-n 0``: one process)."""
    options = config.option
    # xdist calls this in each of its processes too, which must not start processes of their own.
    if hasattr(config, "workerinput"):
        return
    if not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None or options.tx:
        return
    # Not for a few files, which start sooner in this process; nor for markers, since a machine can run only one SLURM
    # cluster; nor for what needs the terminal.
    is_whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    has_own_marker = any(argument.startswith("-m") for argument in config.invocation_params.args)
    if not is_whole_suite or has_own_marker or options.usepdb or options.collectonly or options.capture == "no":
        return
    processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    if processes > 1:
        options.numprocesses, options.dist, options.loadscopereorder = processes, "loadfile", False


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escapes what no UTF-8 text can hold in a test's output: xdist can't send it, and would end the whole run."""
    return sendable((yield))


def sendable(value: Any) -> Any:
    """The same lists, dictionaries and texts without lone surrogates."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {sendable(key): sendable(content) for key, content in value.items()}
    return type(value)(map(sendable, value)) if isinstance(value, list | tuple) else value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files that take longest to the front."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
