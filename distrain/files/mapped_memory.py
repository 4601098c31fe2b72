"""Tensors whose memory is part of a file: the system reads it when it is used, and writes it when memory is short.

The file has no name that could be left behind: its space is free again when the process ends, however that ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

#: What was mapped and is still used, by the address where its memory begins.
_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
#: Tensors in one map begin at multiples of this many bytes.
_ALIGNMENT = 64
_IN_MEMORY = ("tmpfs", "ramfs")
_MIB = 2**20


class MappedFile:
    """A file without a name, whose space is allocated to tensors.

    Space is taken from the disk when it is allocated. On a full disk, writing to a map without that would end the
    process by a signal.

    Args:
        folder: Where the file lies.

    Raises:
        OSError: No file can be made there; the error holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(prefix="distrain_", dir=folder)  # noqa: SIM115, open as long as this
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        self._used = self._reserved = 0

    def reserve(self, size: int) -> None:
        """Takes space from the disk for what will be allocated next.

        Args:
            size: Bytes.

        Raises:
            OSError: There is too little; the error holds the folder.
        """
        more = self._used + size - self._reserved
        if more <= 0:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._reserved, more)
            else:
                self._file.truncate(self._reserved + more)
        except OSError as error:
            # What was taken before the error is given back.
            self._file.truncate(self._reserved)
            problem = f"{error.strerror} ({more / _MIB:,.1f} MiB are needed)"
            raise OSError(error.errno or errno.EIO, problem, str(self._folder)) from error
        self._reserved += more

    def allocate(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """One-dimensional tensors of zeros, in one map.

        Args:
            sizes: Elements of each.
            dtypes: Type of each.

        Raises:
            OSError: As :meth:`reserve`; or the process may have no more addresses or open files.
        """
        offsets = [0]
        for size, dtype in zip(sizes, dtypes, strict=True):
            offsets.append(offsets[-1] + bytes_in_map(size * dtype.itemsize))
        length = _whole_pages(offsets[-1])
        self.reserve(length)
        try:
            memory = mmap.mmap(self._file.fileno(), length, offset=self._used)
        except OSError as error:
            problem = f"{error.strerror} (to map {length / _MIB:,.1f} MiB)"
            raise OSError(error.errno, problem, str(self._folder)) from error
        self._used += length
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        _MAPS[_address(whole)] = memory
        return [
            whole[offset : offset + size * dtype.itemsize].view(dtype)
            for offset, size, dtype in zip(offsets, sizes, dtypes, strict=False)
        ]


def bytes_in_map(size: int) -> int:
    """Bytes that a tensor of so many bytes takes in a map with others."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _whole_pages(size: int) -> int:
    """A size that can be mapped, at least one page."""
    grain = mmap.ALLOCATIONGRANULARITY
    return max(1, -(-size // grain)) * grain


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is part of a file."""
    return _address(tensor) in _MAPS


def release(tensor: Tensor) -> None:
    """Lets the system take back the memory of all tensors of a map until they are used again; their values stay.

    What was written is still to be written to the disk: the system does that when it needs the memory.

    Args:
        tensor: One of them; with another tensor nothing is done.
    """
    memory = _MAPS.get(_address(tensor))
    if memory is not None and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)


def _address(tensor: Tensor) -> int:
    """Where the memory begins that a tensor shares with others; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files in a folder are held in memory instead of on a disk, as far as Linux tells.

    Args:
        folder: The folder.
        mounts: Where Linux tells about mounted file systems.
    """
    device = folder.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        fields = line.split()
        if fields[2] == numbers:
            return fields[fields.index("-") + 1] in _IN_MEMORY
    return False
