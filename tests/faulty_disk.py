"""A disk that fails: counts a process's calls on the files below one folder, and lets chosen ones fail with an errno.

Seen are the calls that Python code makes: the functions of ``os`` in :data:`_PATH_CALLS` and
:data:`_DESCRIPTOR_CALLS` (so also those of ``pathlib``, ``shutil`` and ``tempfile``), each ``open``, ``read``,
``write`` and ``close`` of the file objects that ``open``, ``io.open`` and ``os.fdopen`` return, and the opening of a
safetensors file. Not seen are what a library in C or Rust does with an open file (reads through a memory map), and the
``stat`` of an entry of ``os.scandir``.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import safetensors.torch

#: Functions of ``os`` whose first argument is a path (or a folder's descriptor).
_PATH_CALLS = (
    *("open", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "stat", "lstat", "scandir", "listdir"),
    *("utime", "link", "symlink", "readlink", "truncate"),
)
#: Functions of ``os`` whose first argument is a descriptor.
_DESCRIPTOR_CALLS = ("write", "read", "pread", "pwrite", "fsync", "fdatasync", "fstat", "ftruncate", "close")
#: Calls that have done their work when they fail.
_FAIL_AFTERWARDS = ("close",)


@dataclass(frozen=True)
class Call:
    """A call on a file below the folder.

    Attributes:
        operation: Its name, such as ``write``; ``open_to_read`` for the opening of a file or folder to read it.
        path: The file's path below the folder.
    """

    operation: str
    path: str

    def __str__(self) -> str:
        return f"{self.operation} {self.path or '.'}"


class FaultyDisk:
    """Counts calls while it is active, and lets those fail that :attr:`fails` chooses.

    Args:
        root: The folder; need not exist.
        fails: Takes a call's number, from 0 on, and the call; returns the errno with which it fails, else 0.

    Attributes:
        calls: The calls so far.
        failed: Those of them that failed.
    """

    def __init__(self, root: Path, fails: Callable[[int, Call], int] = lambda _number, _call: 0) -> None:
        self.calls: list[Call] = []
        self.failed: list[Call] = []
        self._root = os.path.realpath(root)
        self._fails = fails
        self._lock = threading.RLock()
        self._patch = pytest.MonkeyPatch()
        self._readlink, self._fspath, self._os_open = os.readlink, os.fspath, os.open

    def __enter__(self) -> FaultyDisk:
        for name in _PATH_CALLS:
            self._patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        for name in _DESCRIPTOR_CALLS:
            self._patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        opened = functools.partial(_open, self, io.open)
        self._patch.setattr(io, "open", opened)
        self._patch.setattr(builtins, "open", opened)
        safe_open: Any = safetensors.torch.safe_open  # type: ignore[attr-defined]
        self._patch.setattr(safetensors.torch, "safe_open", self._wrap("open_to_read", safe_open))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._patch.undo()

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            where = self.below(path, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            if where is None:
                return function(path, *args, **kwargs)
            flags = args[0] if name == "open" and args and isinstance(args[0], int) else os.O_RDONLY
            to_read = function is self._os_open and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            error = self.count("open_to_read" if to_read else name, where)
            if error is None:
                return function(path, *args, **kwargs)
            if name in _FAIL_AFTERWARDS:
                function(path, *args, **kwargs)
            raise error

        return wrapped

    def below(self, path: Any, folder: int | None = None) -> str | None:
        """The path below the folder of what is called by a path or a descriptor; ``None`` if it is elsewhere."""
        try:
            if isinstance(path, int):
                name = self._readlink(f"/proc/self/fd/{path}")
            else:
                name = os.fsdecode(self._fspath(path))
                if folder is not None:
                    name = f"{self._readlink(f'/proc/self/fd/{folder}')}/{name}"
        except (OSError, TypeError):
            return None
        name = os.path.abspath(name)  # noqa: PTH100 - not through links
        if name != self._root and not name.startswith(f"{self._root}/"):
            return None
        return name[len(self._root) + 1 :]

    def count(self, operation: str, path: str) -> OSError | None:
        """Counts a call; returns the error with which it is to fail."""
        with self._lock:
            call = Call(operation, path)
            number = self._fails(len(self.calls), call)
            self.calls.append(call)
            if not number:
                return None
            self.failed.append(call)
        # As the C library's callers do: a write's error holds no path, that of other calls does.
        if operation in _DESCRIPTOR_CALLS:
            return OSError(number, os.strerror(number))
        return OSError(number, os.strerror(number), f"{self._root}/{path}")


class _File(io.FileIO):
    """A file whose calls the disk counts."""

    disk: FaultyDisk
    where: str

    def _check(self, operation: str) -> None:
        error = self.disk.count(operation, self.where)
        if error is not None:
            raise error

    def write(self, data: Any) -> Any:
        self._check("write")
        return super().write(data)

    def readinto(self, buffer: Any) -> Any:
        self._check("read")
        return super().readinto(buffer)

    def readall(self) -> Any:
        self._check("read")
        return super().readall()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        self._check("close")


def _open(
    disk: FaultyDisk,
    original: Callable[..., Any],
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    where = disk.below(file)
    if where is None or not closefd:
        return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
    if (
        not isinstance(file, int)
        and (error := disk.count("open_to_read" if mode.startswith("r") and "+" not in mode else "open", where))
        is not None
    ):
        raise error
    raw = _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    raw.disk, raw.where = disk, where
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    buffered: Any
    if "+" in mode:
        buffered = io.BufferedRandom(raw, size)
    elif "r" in mode:
        buffered = io.BufferedReader(raw, size)
    else:
        buffered = io.BufferedWriter(raw, size)
    if "b" in mode:
        return buffered
    return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
