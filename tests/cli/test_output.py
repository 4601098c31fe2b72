"""Result files are checked beforehand and replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distrain.cli import output
from distrain.errors import ConfigError


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old, and longer than the new one")
    output.write_text(path, "new: \u00e9\n")
    assert path.read_bytes() == b"new: \xc3\xa9\n"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail(built: Path) -> None:
        built.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"output=.*result\.json: can't be written \(No space left on device\)"):
        output.write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evaluation_test.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    output.write_text(path, "result")
    assert victim.read_text() == "precious"
    assert path.read_text() == "result"


def test_path_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        output.check_writable(tmp_path / "nowhere" / "x.json")
    with pytest.raises(ConfigError, match="is not a plain file"):
        output.check_writable(tmp_path)
    output.check_writable(tmp_path / "x.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is read-only"):
        output.check_writable(tmp_path / "x.json")
