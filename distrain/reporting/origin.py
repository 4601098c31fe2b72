"""Where a run comes from: its command, the versions it ran with, and the commit of the folder it was started in."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import distrain
from distrain.runtime import launcher

#: Seconds until git counts as hung, or the repository as too large to look at.
_GIT_SECONDS = 5.0
#: Nothing that a repository's own configuration names may run: hooks, monitors, filters, helpers that fetch.
_GIT_OPTIONS = (
    *("--no-pager", "--no-optional-locks", "--literal-pathspecs"),
    *("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "-c", "safe.bareRepository=explicit"),
)
_GIT_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
}


def as_iso(seconds: float) -> str:
    """A time in seconds since the epoch as ISO 8601 with the zone of this machine."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


class Origin:
    """Finds out where a run comes from, git's part in a thread, because a large repository takes long.

    Args:
        folder: The folder that the run was started in; ``None`` on ranks that don't write.
    """

    def __init__(self, folder: Path | None) -> None:
        self._git: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        if folder is not None:
            self._thread = threading.Thread(target=self._look_at, args=(folder,), name="git", daemon=True)
            self._thread.start()

    def _look_at(self, folder: Path) -> None:
        self._git = git_state(folder)

    def collect(self) -> dict[str, Any]:
        """``command``, ``versions`` and ``git`` for ``summary.json``; waits for git no longer than its time limit."""
        if self._thread is not None:
            self._thread.join(_GIT_SECONDS)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "distrain": distrain.__version__}
        return {"command": launcher.command(sys.argv, os.environ), "versions": versions, "git": self._git}


def git_state(folder: Path, seconds: float = _GIT_SECONDS) -> dict[str, Any] | None:
    """The commit of the repository that holds a folder.

    Args:
        folder: The folder.
        seconds: Time limit of each call of git.

    Returns:
        ``commit``, and ``dirty``: whether tracked files were changed since, ``None`` if that can't be found out.
        ``None`` without git, outside a repository, before its first commit, or in one that git refuses to read because
        somebody else owns it.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD", seconds=seconds)
    if commit is None or re.fullmatch(r"[0-9a-f]{40,64}\s*", commit) is None:
        return None
    # A filter is a command that git runs on a file's content to compare it.
    names = _git(folder, "config", "--name-only", "--get-regexp", r"^filter\.", seconds=seconds)
    filters = [name for name in (names or "").split("\n") if name]
    switches = [option for name in filters for option in ("-c", f"{name}=")]
    status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    # A name with an equals sign would switch off another key.
    is_safe = not any("=" in name for name in filters)
    changes = _git(folder, *status, seconds=seconds, options=switches) if is_safe else None
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def _git(folder: Path, *arguments: str, seconds: float, options: Sequence[str] = ()) -> str | None:
    """What git prints; ``None`` if it fails, is not there or takes too long."""
    try:
        done = subprocess.run(  # noqa: S603 - arguments of ours, and names of filters behind -c
            ["git", *_GIT_OPTIONS, *options, *arguments],  # noqa: S607
            cwd=folder,
            env={**os.environ, **_GIT_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
