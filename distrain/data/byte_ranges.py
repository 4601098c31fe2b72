"""Where encoded images lie: in files of their own, in a tar, or one after the other in a cache.

Imports no torch, since the decoding processes use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from distrain.files.untrusted import open_regular

#: Files that are kept open, the longest unused one is closed first; a process may open 1,024 files on many systems.
_MOST_OPEN = 64


class ByteRanges:
    """Pieces of files. A file is opened when it is first read, in each process anew.

    The bytes are read, not mapped: a file that somebody truncates during a run then raises an error, where a memory map
    would end the process by a signal.

    Args:
        paths: The files.
        file: Index in ``paths`` of each piece's file, [N].
        start: Offset of each piece in its file, in bytes, [N].
        size: Bytes of each piece, [N].
    """

    def __init__(self, paths: Sequence[Path], file: npt.ArrayLike, start: npt.ArrayLike, size: npt.ArrayLike) -> None:
        self.paths = tuple(paths)
        # Arrays of numbers, which millions of pieces need, are pickled for a worker process within milliseconds.
        self.file = np.asarray(file, dtype=np.int32)
        self.start = np.asarray(start, dtype=np.int64)
        self.size = np.asarray(size, dtype=np.int64)
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, index: int) -> bytes:
        """Reads a piece.

        Raises:
            OSError: The file can't be read.
            ValueError: It is no regular file, or ends before the piece does.
        """
        file = self._file(int(self.file[index]))
        start, size = int(self.start[index]), int(self.size[index])
        file.seek(start)
        data = file.read(size)
        if len(data) < size:
            raise ValueError(f"ends after {start + len(data)} bytes; it was larger when it was listed")
        return data

    def close(self) -> None:
        """Closes the open files; a later :meth:`read` opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        # The constructor may have raised.
        for file in self.__dict__.get("_open", {}).values():
            file.close()

    def _file(self, number: int) -> IO[bytes]:
        found = self._open.get(number)
        if found is None:
            found = open_regular(self.paths[number])
            self._open[number] = found
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return found


def end_to_end(path: Path, sizes: npt.ArrayLike) -> ByteRanges:
    """Pieces of these sizes, one after the other in one file."""
    size = np.asarray(sizes, dtype=np.int64)
    return ByteRanges([path], np.zeros(len(size), dtype=np.int32), np.cumsum(size) - size, size)
