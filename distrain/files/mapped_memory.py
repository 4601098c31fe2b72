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

#: Maps that are still used, by the address of each allocation in them.
_MAPS: weakref.WeakValueDictionary[int, _Map] = weakref.WeakValueDictionary()
#: Tensors in one map begin at multiples of this many bytes.
_ALIGNMENT = 64
_IN_MEMORY = ("tmpfs", "ramfs")
_MIB = 2**20


class _Map(mmap.mmap):
    """A part of a file in the process's memory.

    Attributes:
        address: Where it begins there.
        used: Bytes of it that are allocated.
    """

    address: int
    used: int


class MappedFile:
    """A file without a name, whose space is allocated to tensors.

    Space is taken from the disk when it is allocated. On a full disk, writing to a map without that would end the
    process by a signal.

    Each map keeps a file descriptor open, of which a process may have few. So a new map is at least as large as all
    that is allocated already: twenty maps hold a million times as much as the first one.

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
        #: Bytes from the file's beginning that are allocated, taken from the disk, and part of maps.
        self._used = self._reserved = self._mapped = 0
        self._map: _Map | None = None

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
                self._file.truncate(max(self._reserved + more, self._mapped))
        except OSError as error:
            # What was taken before the error is given back; the rest of the map stays, without space on the disk.
            self._file.truncate(self._reserved)
            self._file.truncate(max(self._reserved, self._mapped))
            problem = f"{error.strerror} ({more / _MIB:,.1f} MiB are needed)"
            raise OSError(error.errno or errno.EIO, problem, str(self._folder)) from error
        self._reserved += more

    def allocate(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """One-dimensional tensors of zeros, whose memory is let go together.

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
        memory = self._map
        if memory is None or memory.used + length > len(memory):
            memory = self._map = self._new_map(length)
        whole = torch.frombuffer(memory, dtype=torch.uint8, offset=memory.used, count=length)
        _MAPS[memory.address + memory.used] = memory
        memory.used += length
        self._used += length
        return [
            whole[offset : offset + size * dtype.itemsize].view(dtype)
            for offset, size, dtype in zip(offsets, sizes, dtypes, strict=False)
        ]

    def _new_map(self, length: int) -> _Map:
        """Maps what is not allocated yet: at least so many bytes, and more if the system permits that."""
        for size in (max(length, self._used), length):
            end = max(self._used + size, self._mapped, self._reserved)
            try:
                # No map may be longer than the file. What is not reserved takes no space on the disk.
                self._file.truncate(end)
                memory = _Map(self._file.fileno(), size, offset=self._used)
            except OSError as error:
                refused = error
                continue
            self._mapped = max(self._used + size, self._mapped)
            memory.address, memory.used = _address(torch.frombuffer(memory, dtype=torch.uint8)), 0
            return memory
        problem = f"{refused.strerror} (to map {length / _MIB:,.1f} MiB)"
        raise OSError(refused.errno, problem, str(self._folder)) from refused


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
    """Lets the system take back the memory of a tensor, and of those that were allocated with it; values stay.

    What was written is still to be written to the disk: the system does that when it needs the memory.

    Args:
        tensor: One that was allocated; with another tensor nothing is done.
    """
    address = _address(tensor)
    memory = _MAPS.get(address)
    if memory is not None and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, address - memory.address, tensor.untyped_storage().nbytes())


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
