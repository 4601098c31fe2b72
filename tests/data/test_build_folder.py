"""Only one process builds at a time, and results appear completely or not at all."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from distrain.data.build_folder import locked_build_folder, publish
from distrain.errors import ConfigError


def test_only_one_thread_builds_at_a_time(tmp_path: Path) -> None:
    active, max_active = 0, 0
    guard = threading.Lock()

    def build() -> None:
        nonlocal active, max_active
        with locked_build_folder("data.cache", tmp_path) as temporary:
            with guard:
                active += 1
                max_active = max(max_active, active)
            (temporary / "file").write_text("x" * 1000)
            time.sleep(0.02)
            with guard:
                active -= 1

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max_active == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".build-old" / "cache").mkdir(parents=True)
    (tmp_path / "complete").mkdir()
    with locked_build_folder("data.cache", tmp_path):
        assert not (tmp_path / ".build-old").exists()
    assert (tmp_path / "complete").exists()


def test_publish_moves_a_folder(tmp_path: Path) -> None:
    with locked_build_folder("data.cache", tmp_path) as temporary:
        (temporary / "new" / "deep").mkdir(parents=True)
        (temporary / "new" / "deep" / "file").write_text("content")
        publish(temporary / "new", tmp_path / "new")
    assert (tmp_path / "new" / "deep" / "file").read_text() == "content"


def test_a_folder_that_cannot_be_written_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"data\.cache=.*file/cache: can't be written"),
        locked_build_folder("data.cache", tmp_path / "file" / "cache"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_an_error_of_the_disk_while_building_names_the_key_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    def build() -> None:
        with locked_build_folder("data.cache", tmp_path) as temporary:
            (temporary / "new").write_text("half")
            raise OSError(code, os.strerror(code), str(temporary / "new"))

    with pytest.raises(ConfigError, match=rf"data\.cache=.*: .*/new: {os.strerror(code)}"):
        build()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_lock_is_not_made_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(ConfigError, match=r"data\.cache=.*: can't be written"),
        locked_build_folder("data.cache", folder),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()
