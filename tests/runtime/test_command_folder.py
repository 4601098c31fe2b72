"""The folder of a command that trains for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.runtime.command_folder import RUNS, agreed_folder, short_runs
from distrain.runtime.world import World
from tests.runs import small

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, host="here")


def test_short_runs_are_removed_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = agreed_folder(small(), ALONE, "find", None)
    assert folder.parent == tmp_path / "outputs" / "find"

    def fail() -> None:
        with short_runs(folder, ALONE) as runs:
            runs.mkdir()
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        fail()
    assert list(folder.iterdir()) == []


def test_a_folder_whose_content_would_be_removed_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / RUNS / "mine.txt"
    kept.parent.mkdir()
    kept.touch()
    line = rf"holds runs, where short runs would be; name another folder, or remove .* plan has left: rm -r {tmp_path}"
    with pytest.raises(ConfigError, match=line):
        agreed_folder(small(), ALONE, "plan", tmp_path)
    assert kept.exists()
    with pytest.raises(ConfigError, match=r"can't be made"):
        agreed_folder(small(), ALONE, "plan", kept / "folder")
