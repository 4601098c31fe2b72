"""The run folder: a new one for every launch, or the configured one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.runtime.run_dir import make_run_dir


def test_twenty_launches_in_one_second_get_twenty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(20) as pool:
        folders = list(pool.map(make_run_dir, [None] * 20))
    assert len(set(folders)) == 20
    assert all(folder.is_dir() and folder.is_relative_to(tmp_path / "outputs") for folder in folders)


def test_a_configured_folder_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    configured = tmp_path / "a" / "b"
    assert make_run_dir(str(configured)) == make_run_dir(str(configured)) == configured


@pytest.mark.parametrize("place", ["file", "file/below", "run"])
def test_a_folder_that_cannot_be_made_is_refused(place: str, tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("in the way")
    tmp_path.joinpath("run").mkdir()
    tmp_path.joinpath("run", "logs").write_text("in the way")
    with pytest.raises(ConfigError, match=rf"^run_dir={tmp_path}/{place}: can't be made: "):
        make_run_dir(str(tmp_path / place))
