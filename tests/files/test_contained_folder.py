"""What is done in a folder never leaves it through a link, whichever component is one and whenever it appears."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder, UnsafePath


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


#: What a stranger may put at a path, given a file and a folder outside.
STRAYS: dict[str, Callable[[Path, Path], None]] = {
    "a link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "a link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "a relative link": lambda path, outside: path.symlink_to(os.path.relpath(outside / "file", path.parent)),
    "a link to a link": lambda path, outside: path.symlink_to(outside / "link"),
    "a dangling link": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to itself": lambda path, outside: path.symlink_to(path),
    "a link to /proc": lambda path, outside: path.symlink_to("/proc/self/fd"),
    "a link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a named pipe": lambda path, outside: os.mkfifo(path),
    "a socket": lambda path, outside: _socket(path),
}

#: What a run does with a file "f", also in a folder.
ACTIONS: dict[str, Callable[[ContainedFolder, str], object]] = {
    "append": lambda folder, name: AppendedFile(folder, name).append(b"more"),
    "replace": lambda folder, name: folder.replace_text(name, "new"),
    "read": lambda folder, name: folder.open_file(name, "rb").read(),
    "write": lambda folder, name: folder.open_file(name, "wb").write(b"new"),
    "list": lambda folder, name: folder.names(name),
    "remove": lambda folder, name: folder.remove_tree(name),
    "make": lambda folder, name: folder.make_folder(name),
    "check": lambda folder, name: folder.check([name.split("/")[0]]),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    for name in ("file", "folder/file"):
        (folder / name).write_text("of the user")
    (folder / "link").symlink_to(folder / "file")
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("place", ["f", "a/f", "a"])
@pytest.mark.parametrize("stray", STRAYS)
def test_no_action_leaves_the_folder_or_waits(
    stray: str, place: str, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(outside)
    for number, action in enumerate(ACTIONS):
        folder = ContainedFolder(tmp_path / f"run{number}")
        path = folder.path / place
        path.parent.mkdir(parents=True)
        STRAYS[stray](path, outside)
        name = "a/file" if place == "a" else place
        with pytest.raises(OSError, match=r"(?s)is a (link|named pipe|socket)|Not a directory") as caught:
            ACTIONS[action](folder, name)
        assert str(path) in str(caught.value)
        assert content(outside) == before, action
        assert path.is_symlink() or not path.is_file()


def test_a_new_file_takes_the_place_of_a_link(tmp_path: Path, outside: Path) -> None:
    before, folder = content(outside), ContainedFolder(tmp_path)
    (tmp_path / "f").symlink_to(outside / "file")
    with folder.create("f") as file:
        file.write(b"own")
    assert content(outside) == before
    assert not (tmp_path / "f").is_symlink()
    # The temporary name is known in advance, too.
    (tmp_path / f".f.{os.getpid()}").symlink_to(outside / "file")
    folder.replace_text("f", "new")
    assert content(outside) == before
    assert (tmp_path / "f").read_text() == "new"


def test_removing_a_tree_removes_links_and_not_their_targets(tmp_path: Path, outside: Path) -> None:
    before, tree = content(outside), tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "link").symlink_to(outside / "folder")
    (tree / "file").write_text("own")
    ContainedFolder(tmp_path).remove_tree("tree")
    assert content(outside) == before
    assert not tree.exists()


def test_a_file_with_a_second_name_is_copied_before_it_is_appended_to(tmp_path: Path, outside: Path) -> None:
    before = content(outside)
    os.link(outside / "file", tmp_path / "f")
    file = AppendedFile(ContainedFolder(tmp_path), "f")
    file.append(b", and more")
    file.close()
    assert content(outside) == before
    assert (tmp_path / "f").read_text() == "of the user, and more"
    os.link(outside / "file", tmp_path / "g")
    with pytest.raises(UnsafePath, match="has a second name"):
        ContainedFolder(tmp_path).open_file("g", "wb")


@pytest.mark.parametrize("name", ["../f", "a/../../f", "/etc/f", "/".join(["a"] * 50)])
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafePath):
        ContainedFolder(tmp_path).replace_text(name, "new")


def test_the_folder_itself_may_be_reached_through_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "mine").symlink_to(outside / "folder")
    ContainedFolder(tmp_path / "mine").replace_text("new", "content")
    assert (outside / "folder" / "new").read_text() == "content"
