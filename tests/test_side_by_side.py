"""The whole suite runs on several processes, and what was asked for otherwise as it was asked for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import side_by_side

ArgsSource = pytest.Config.ArgsSource


def configuration(*arguments: str, source: ArgsSource = ArgsSource.TESTPATHS, plugin: bool = True, **given: Any) -> Any:
    """The part of pytest's configuration that counts."""
    options: dict[str, Any] = {"numprocesses": None, "tx": [], "dist": "no", "loadscopereorder": True}
    options |= {"usepdb": False, "collectonly": False, "capture": "fd"}
    return SimpleNamespace(
        option=SimpleNamespace(**{**options, **given}),
        pluginmanager=SimpleNamespace(hasplugin=lambda _: plugin),
        args_source=source,
        invocation_params=SimpleNamespace(args=arguments),
    )


def processes(config: Any) -> int | None:
    side_by_side.pytest_cmdline_main(config)
    count: int | None = config.option.numprocesses
    return count


@pytest.mark.parametrize(("cores", "expected"), [(1, None), (2, 2), (64, 4), (None, None)])
def test_the_whole_suite_runs_on_as_many_processes_as_there_are_cores_up_to_four(
    cores: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert processes(config := configuration("-q", "--maxfail=1", "-k", "ddp")) == expected
    assert config.option.dist == ("loadfile" if expected else "no")
    assert config.option.loadscopereorder == (expected is None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (configuration(source=ArgsSource.ARGS), None),
        (configuration("-m", "slurm"), None),
        (configuration("-msoak"), None),
        (configuration(plugin=False), None),
        (configuration(usepdb=True), None),
        (configuration(capture="no"), None),
        (configuration(collectonly=True), None),
        (configuration(tx=["popen"]), None),
        (configuration(numprocesses=0), 0),
        (configuration(numprocesses=3), 3),
    ],
    ids=["files", "marker", "joined marker", "no xdist", "debugger", "terminal", "list", "hosts", "none", "three"],
)
def test_what_is_asked_for_otherwise_stays(config: Any, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert processes(config) == expected
    assert config.option.dist == "no"


def test_a_process_of_xdist_starts_none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = configuration()
    config.workerinput = {"workerid": "gw0"}
    assert processes(config) is None
    assert config.option.dist == "no"


def test_files_that_take_longest_come_first_and_the_others_keep_their_order() -> None:
    tests = Path(side_by_side.__file__).parent
    longest = [tests / name for name in side_by_side._LONGEST]
    assert all(path.is_file() for path in longest)
    others = [tests / "cli" / "test_b.py", tests / "cli" / "test_a.py"]
    items: list[Any] = [SimpleNamespace(path=path) for path in (others[0], *longest[::-1], longest[0], others[1])]
    first, *_, last = numbered = list(enumerate(items))
    side_by_side.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [longest[0], *longest, *others]
    # Two tests of one file stay in order.
    assert items[0] is numbered[len(longest)][1]
    assert (items[-2], items[-1]) == (first[1], last[1])


def test_a_report_is_sent_whatever_the_test_has_written() -> None:
    report = {"sections": [("stdout", "a\udcff.jpg")], "longrepr": {"\ud800": ["\udcff", 1, None]}, "user": "é"}
    sent = side_by_side.sendable(report)
    assert sent == {
        "sections": [("stdout", "a\\udcff.jpg")],
        "longrepr": {"\\ud800": ["\\udcff", 1, None]},
        "user": "é",
    }
    str(sent).encode()
