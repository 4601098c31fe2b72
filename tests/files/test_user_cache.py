"""Caches have a folder also for users without a home, and one that others prepared is not trusted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from distrain.files.user_cache import UntrustedFolder, user_cache_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / f"distrain-{os.getuid()}"


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_configured_folder_comes_first_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert user_cache_folder() == tmp_path / "home" / ".cache" / "distrain"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_folder() == tmp_path / "xdg" / "distrain"


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_a_user_without_a_writable_home_gets_a_private_temporary_folder(
    home: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home == "none":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert user_cache_folder() == temporary
    assert user_cache_folder() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["others may write", "link", "another user"])
def test_a_temporary_folder_that_others_could_have_prepared_is_refused(
    kind: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        temporary.symlink_to(tmp_path / "elsewhere")
    else:
        temporary.mkdir(mode=0o700)
    if kind == "others may write":
        temporary.chmod(0o777)
    if kind == "another user":
        other = os.getuid() + 1
        temporary.rename(tmp_path / f"distrain-{other}")
        monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UntrustedFolder, match="is not a folder that only this user may write to"):
        user_cache_folder()
