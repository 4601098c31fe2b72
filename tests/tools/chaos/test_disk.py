"""Writes fail while a disk is full, and succeed again afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.tools.chaos import disk

if sys.platform != "linux":
    pytest.skip("needs prlimit", allow_module_level=True)

#: For each line of input, appends 1,000 bytes to a file and prints the outcome.
WRITER = """
import sys
for _ in sys.stdin:
    try:
        with open(sys.argv[1], "ab", buffering=0) as file:
            file.write(bytes(1000))
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


class Writer:
    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_limited_file_can_not_grow_until_the_limit_is_lifted(tmp_path: Path) -> None:
    tmp_path.joinpath("step_00000010").mkdir()
    tmp_path.joinpath("step_00000010", "model").write_bytes(bytes(1800))
    limited = disk.FileSizeLimit(tmp_path)
    with Writer(tmp_path / "file") as writer:
        assert writer.write() == "written"
        limited.fill([writer.process.pid])
        limited.fill([writer.process.pid])
        assert writer.write() in disk.FULL_MESSAGES
        limited.clear()
        assert writer.write() == "written"


def test_small_disk_is_full_until_it_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    try:
        small = disk.SmallDisk(folder, 1 << 20)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        with Writer(folder / "file") as writer:
            assert writer.write() == "written"
            small.fill([])
            while (outcome := writer.write()) == "written":
                pass
            assert outcome in disk.FULL_MESSAGES
            small.clear()
            assert writer.write() == "written"
    finally:
        small.remove(keep=True)
    assert not os.path.ismount(folder)
    assert folder.joinpath("file").stat().st_size >= 2000, "keep=True keeps the content"
