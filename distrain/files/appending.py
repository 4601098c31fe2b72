"""A file that a run appends to while it trains, and that outlives errors of its disk and the loss of its folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from distrain.files.contained_folder import ContainedFolder, UnsafePath

#: Most bytes that wait for a disk that can't be written.
_MAX_WAITING_BYTES = 1 << 20
_COPY_BYTES = 1 << 20


class AppendedFile:
    """Appends to a file. What can't be written waits in memory, and is written before what is appended later.

    If more than a mebibyte waits, the oldest of it is lost. If the file has been removed, it is made anew with the
    content that it had.

    Args:
        folder: The folder that no link may lead out of.
        name: The file in it; it is opened by :meth:`open` or at the first write.
        may_create: Asked before a file is opened, so before one that is missing is made anew. If not, the removed file
            is written on; its content is copied once a new one may be made.
    """

    def __init__(self, folder: ContainedFolder, name: str, may_create: Callable[[], bool] = lambda: True) -> None:
        self._folder, self._name = folder, name
        self._may_create = may_create
        self._descriptor: int | None = None
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder.path / self._name

    def append(self, data: bytes) -> None:
        """Takes data, and writes it together with what waits.

        Raises:
            OSError: Not all could be written. The data waits; it must not be appended again.
        """
        self.hold(data)
        self.flush()

    def hold(self, data: bytes) -> None:
        """Takes data that :meth:`flush` will write."""
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        while self._waiting_bytes > _MAX_WAITING_BYTES and len(self._waiting) > 2:
            # Not the first, which may be written in part already.
            self._waiting_bytes -= len(self._waiting[1])
            del self._waiting[1]

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: Not all could be written.
        """
        if not self._waiting:
            return
        try:
            self.open()
            while self._waiting and self._descriptor is not None:
                data = self._waiting[0]
                written = os.write(self._descriptor, data)
                self._waiting_bytes -= written
                if written < len(data):
                    self._waiting[0] = data[written:]
                else:
                    self._waiting.popleft()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Writes what waits and closes the file; the next write opens it again.

        Raises:
            OSError: Not all could be written; the file is closed all the same.
        """
        try:
            self.flush()
        finally:
            self.discard()
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def discard(self) -> None:
        """Forgets what waits."""
        self._waiting.clear()
        self._waiting_bytes = 0

    def open(self) -> None:
        """Opens the file, unless it is open and still where it was.

        Raises:
            OSError: It can't be opened.
        """
        old = self._descriptor
        if old is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self._folder.status(self._name), os.fstat(old)):
                    return
        if not self._may_create():
            return
        parent = str(PurePosixPath(self._name).parent)
        self._folder.make_folder(parent)
        if old is None:
            try:
                self._descriptor = self._folder.open(self._name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
                return
            except UnsafePath as error:
                if error.errno != errno.EMLINK:
                    raise
            # Another folder shares this file (a snapshot by hard links, say), and must not change with it.
            old = self._folder.open(self._name, os.O_RDONLY)
            try:
                self._descriptor = self._copy(old)
            finally:
                os.close(old)
            return
        # A removed file can be read as long as it is open.
        self._descriptor = self._copy(old)
        os.close(old)

    def _copy(self, old: int) -> int:
        """Makes the file anew with the content of an open one.

        Returns:
            A descriptor of the new file, at its end.

        Raises:
            OSError: It can't be made; what was there is unchanged.
        """
        temporary = str(PurePosixPath(self._name).with_name(f".{self.path.name}.{os.getpid()}"))
        self._folder.unlink(temporary, missing_ok=True)
        new = self._folder.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        try:
            os.lseek(old, 0, os.SEEK_SET)
            while chunk := os.read(old, _COPY_BYTES):
                while chunk:
                    chunk = chunk[os.write(new, chunk) :]
            self._folder.rename(temporary, self._name)
        except OSError:
            os.close(new)
            self._folder.unlink(temporary, missing_ok=True)
            raise
        return new
