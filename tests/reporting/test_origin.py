"""A run's summary says where it comes from; asking git can neither fail, hang nor run what a repository names."""

from __future__ import annotations

import datetime
import os
import subprocess
import time
from pathlib import Path

import pytest

from distrain.reporting.origin import Origin, as_iso, git_state
from distrain.runtime import launcher, program


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_commit_and_changes_are_named(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD").strip()
    (repository / "notes.txt").write_text("not tracked")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "code.py").write_text("x = 2\n")
    (repository / "below").mkdir()
    assert git_state(repository / "below") == {"commit": commit, "dirty": True}


def test_nothing_is_named_outside_a_repository_or_before_a_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None


def test_no_git_is_no_error(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository / "empty"))
    assert git_state(repository) is None
    assert Origin(repository).collect()["git"] is None


def test_git_that_hangs_is_given_up(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = repository / "git"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(repository), prepend=os.pathsep)
    assert git_state(repository, seconds=0.1) is None


def test_repository_of_somebody_else_is_not_read(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # git's own switch for its tests: every repository counts as somebody else's.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert git_state(repository) is None


@pytest.mark.parametrize("filter_name", ["evil", "a=b", "with space"])
def test_commands_that_a_repository_names_are_not_run(filter_name: str, repository: Path) -> None:
    ran = repository / "ran"
    evil = repository / "evil.sh"
    evil.write_text(f"#!/bin/sh\ntouch {ran}\ncat\n")
    evil.chmod(0o755)
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text(f"*.py filter={filter_name}\n")
    with (repository / ".git" / "config").open("a") as config:
        config.write(f'[core]\n\tfsmonitor = {evil}\n\thooksPath = {repository}\n[filter "{filter_name}"]\n')
        config.write(f"\tclean = {evil}\n\tsmudge = {evil}\n\tprocess = {evil}\n\trequired = true\n")
    for hook in ("post-index-change", "pre-commit", "fsmonitor-watchman"):
        (repository / hook).write_text(evil.read_text())
        (repository / hook).chmod(0o755)
    # Changed in its time and not in its content, so that git must compare the content.
    os.utime(repository / "code.py", (time.time() + 10, time.time() + 10))
    state = git_state(repository)
    assert state is not None
    assert state["dirty"] in (False, None)
    assert not ran.exists()


def test_times_carry_their_zone() -> None:
    assert datetime.datetime.fromisoformat(as_iso(1e9)).timestamp() == 1e9
    assert datetime.datetime.fromisoformat(as_iso(1e9)).tzinfo is not None


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, None, "python launch/train.py 'run_dir=a b'"),
        ({}, 2, "torchrun --nproc-per-node 2 launch/train.py 'run_dir=a b'"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"},
            None,
            "torchrun --nproc-per-node 1 launch/train.py 'run_dir=a b'",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
            None,
            "torchrun --nproc-per-node 4 --nnodes 2 launch/train.py 'run_dir=a b'",
        ),
    ],
)
def test_command_can_be_typed_again(environment: dict[str, str], ranks: int | None, expected: str) -> None:
    assert launcher.command(["launch/train.py", "run_dir=a b"], environment, ranks=ranks) == expected


def test_ranks_that_the_command_starts_itself_are_started_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "DISTRAIN_LAUNCHER": "1"}
    monkeypatch.setattr(program, "_removed", ["nproc=4", "max_restarts=2"])
    expected = "python launch/train.py nproc=4 max_restarts=2 seed=1"
    assert launcher.command(["launch/train.py", "seed=1"], ranks) == expected
    monkeypatch.setattr(program, "_removed", [])
    monkeypatch.setattr(program, "_name", "train")
    monkeypatch.setenv("PATH", "/nowhere")
    assert launcher.command(["/bin/distrain", "seed=1"], {}, ranks=2) == "/bin/distrain train nproc=2 seed=1"
    # Under torchrun the user is told of torchrun.
    assert launcher.command(["/bin/distrain"], {"TORCHELASTIC_RUN_ID": "x"}, ranks=2).startswith("torchrun")
