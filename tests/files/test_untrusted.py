"""Untrusted files are read only if they are regular, of bounded size, and plain data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distrain.files.untrusted import UnreadableFile, read_json, read_text


def test_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"è": [1, null]}', encoding="utf-8")
    assert read_text(tmp_path / "a.json", 100) == '{"è": [1, null]}'
    assert read_json(tmp_path / "a.json", 100) == {"è": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1]", "is not a mapping"),
        (b"\xff{}", "can't be read"),
        (b'{"a": {"b": 1, "b": 2}}', r"is not JSON \(a key appears twice\)"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"{}" + b" " * 2_000_000, "has more than 1000000 bytes"),
    ],
)
def test_content_other_than_a_json_object_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UnreadableFile, match=rf"^a\.json {message}"):
        read_json(tmp_path / "a.json", 1_000_000)


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "endless"):
        with pytest.raises(UnreadableFile, match=f"^{name} is not a regular file"):
            read_text(tmp_path / name, 10)
    monkeypatch.setattr(Path, "is_file", lambda _path: True)  # as if it had been put there after the look
    with pytest.raises(UnreadableFile, match=r"^pipe is not a regular file"):
        read_text(tmp_path / "pipe", 10)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("nothing", "broken"):
        with pytest.raises(FileNotFoundError):
            read_text(tmp_path / name, 10)
