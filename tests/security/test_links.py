"""A prepared run folder makes no command write outside it, whatever is put at a path that a run writes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.cli import app
from distrain.cli.run_folder import RunFolder
from distrain.errors import ConfigError, Failed
from distrain.reporting.loggers.tensorboard import TensorBoardLogger
from distrain.tools.launching.jobs import NOT_RUN, Job, JobRunner
from tests.test_disk_faults import config_for

STRAYS: dict[str, Callable[[Path, Path], None]] = {
    "a link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "a link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "a dangling link": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to /proc": lambda path, outside: path.symlink_to("/proc/self/environ"),
    "a named pipe": lambda path, outside: os.mkfifo(path),
}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorBoardLogger, "accepts_figures", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("links") / "run"
    app.train(config_for(folder, 2))
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def written_paths(folder: Path) -> list[str]:
    """Everything that a run has left, without the numbers that differ from run to run, and what it makes in between."""
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return sorted({*left, "checkpoints/.claim", "failure.json", "previous_failure.json", "stopped.json"})


def train(folder: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            app.train(config_for(folder, 3))
        except ConfigError as error:
            return str(error)
        except Failed:
            return f"failed: {said.getvalue()}"
    return ""


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_at_any_path_leaves_everything_outside_as_it_was(stray: str, tmp_path: Path, finished: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    shutil.copytree(finished, outside / "folder")
    (outside / "file").write_text("of the user")
    before = content(outside)
    problems = []
    for path in written_paths(finished):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        place = folder / path
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        STRAYS[stray](place, outside)
        said = train(folder)
        if not re.fullmatch(rf".*run_dir.*{re.escape(str(place))} is a (link|named pipe).*", said):
            problems.append(f"training with {path}: {said!r}")
        with contextlib.suppress(ConfigError):
            RunFolder.open(str(folder), ("tests",)).weights("newest")
        if content(outside) != before:
            problems.append(f"{path}: something outside changed")
            break
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("place", ["", "overrides.txt", "output.log", "summary.json"])
def test_a_sweep_writes_through_no_link(place: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("of the user")
    before = content(outside)
    job = Job("0", {}, (), tmp_path / "sweep" / "0")
    (job.folder.parent if not place else job.folder).mkdir(parents=True)
    (job.folder / place if place else job.folder).symlink_to(outside / "file" if place else outside)
    (result,), _ = JobRunner(["true"], parallel=1, minutes=None, grace_seconds=1.0).run([job])
    assert result.status == NOT_RUN
    assert "is a link to" in result.reason or "other settings" in result.reason
    assert content(outside) == before


def test_a_stray_that_no_run_writes_does_no_harm(tmp_path: Path, finished: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    shutil.copytree(finished, folder)
    (folder / "notes").symlink_to(outside)
    assert train(folder) == ""
    assert content(outside) == {}


def test_a_run_folder_behind_a_link_of_the_user_trains(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "scratch")
    assert train(tmp_path / "outputs" / "run") == ""
    assert (tmp_path / "scratch" / "run" / "summary.json").is_file()
