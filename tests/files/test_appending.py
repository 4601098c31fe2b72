"""An appended file outlives errors of its disk and the loss of its folder, and has each line once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder
from tests.faulty_disk import Call, FaultyDisk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file"


def appended(path: Path, may_create: Callable[[], bool] = lambda: True) -> AppendedFile:
    return AppendedFile(ContainedFolder(path.parent), path.name, may_create)


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "fstat", "stat"])
def test_what_could_not_be_written_is_written_before_what_comes_later(operation: str, path: Path) -> None:
    broken = operation in ("mkdir", "open")

    def fails(_: int, call: Call) -> int:
        return errno.EIO if broken and call.operation == operation else 0

    with FaultyDisk(path.parent, fails) as disk:
        file = appended(path)
        if not broken:
            file.append(b"first\n")
            broken = True
        for line in (b"second\n", b"third\n"):
            with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
                file.append(line)
        broken = False
        file.append(b"fourth\n")
        file.close()
    assert disk.failed
    first = b"" if operation in ("mkdir", "open") else b"first\n"
    assert path.read_bytes() == first + b"second\nthird\nfourth\n"


def test_a_line_that_was_written_in_part_is_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, sizes = os.write, iter([3, 0, 99])

    def write_some(descriptor: int, data: memoryview) -> int:
        size = next(sizes)
        if not size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:size])

    file = appended(path)
    file.open()
    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(OSError, match="No space left"):
        file.append(b"a line\n")
    file.flush()
    file.close()
    assert path.read_bytes() == b"a line\n"


def remove(path: Path) -> None:
    path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def replace(path: Path) -> None:
    path.unlink()
    path.touch()


@pytest.mark.parametrize("lose", [remove, remove_folder, move_folder, replace])
def test_a_file_that_was_removed_is_made_anew_with_its_content(lose: Callable[[Path], None], path: Path) -> None:
    file = appended(path)
    file.append(b"before\n")
    lose(path)
    file.append(b"after\n")
    file.close()
    assert path.read_bytes() == b"before\nafter\n"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("operation", ["read", "write", "replace", "open"])
def test_an_error_while_a_file_is_made_anew_loses_nothing(operation: str, path: Path) -> None:
    file = appended(path)
    file.append(b"before\n")
    shutil.rmtree(path.parent)
    faulty = FaultyDisk(path.parent, lambda _, call: errno.ENOSPC if call.operation == operation else 0)
    with faulty as disk, pytest.raises(OSError, match="No space left"):
        file.append(b"during\n")
    assert disk.failed
    file.append(b"after\n")
    file.close()
    assert path.read_bytes() == b"before\nduring\nafter\n"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_removed_file_that_may_not_be_made_anew_is_kept_until_it_may(path: Path) -> None:
    allowed = True
    file = appended(path, lambda: allowed)
    file.append(b"before\n")
    allowed = False
    shutil.rmtree(path.parent)
    file.append(b"meanwhile\n")
    assert not path.parent.exists()
    allowed = True
    file.append(b"after\n")
    assert path.read_bytes() == b"before\nmeanwhile\nafter\n"
    file.close()


def test_only_a_mebibyte_waits_for_a_full_disk(path: Path) -> None:
    full = True
    with FaultyDisk(path.parent, lambda _, call: errno.ENOSPC if full and call.operation == "write" else 0):
        file = appended(path)
        for number in range(40):
            with pytest.raises(OSError, match="No space left"):
                file.append(b"%02d" % number + bytes(100_000))
        full = False
        file.close()
    content = path.read_bytes()
    assert len(content) < 1 << 21
    assert content[-100_002:-100_000] == b"39", "the newest is kept"


@pytest.mark.parametrize("operation", ["open", "write", "replace"])
def test_a_file_that_another_folder_shares_is_copied_once_the_disk_allows_it(
    operation: str, path: Path, tmp_path: Path
) -> None:
    path.parent.mkdir()
    path.write_bytes(b"before\n")
    os.link(path, tmp_path / "snapshot")
    broken = True

    def fails(_: int, call: Call) -> int:
        return errno.ENOSPC if broken and call.operation == operation else 0

    with FaultyDisk(path.parent, fails):
        file = appended(path)
        with pytest.raises(OSError, match="No space left on device"):
            file.append(b"first\n")
        broken = False
        file.append(b"second\n")
        file.close()
    assert path.read_bytes() == b"before\nfirst\nsecond\n"
    assert (tmp_path / "snapshot").read_bytes() == b"before\n"
