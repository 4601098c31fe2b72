"""Memory that one rank writes and its peers on the host read; it never has a name, so nothing can be left behind.

An arena is an anonymous file (memfd_create(2)) that peers map by way of ``/proc/<pid>/fd``. It doesn't count against
the size of ``/dev/shm``, and the kernel frees it with the last process that has it mapped, however that one ends. It
has far more addresses than memory: all of them are mapped when the ranks meet, and there is memory behind those that
were reserved. Where that is short, reserving is an error; what was reserved can be read and written without a fault,
since nobody can make the file shorter.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: Addresses of an arena, in bytes: more than may ever be under way at once.
SIZE = 1 << 34
#: A free slot serves a message of at least this part of its size.
_LEAST_USE = 4
#: Slots are multiples of this many bytes, and of a sixteenth of their size: messages of about one size share them.
_GRAIN = 4096
#: Of ``madvise(2)``.
_NOT_DUMPED = 16
#: Memory is reserved in pieces of at least this many bytes.
_PIECE = 1 << 18
_MOST_VIEWS = 256


class Views:
    """Parts of an arena as tensors; those that recur are kept.

    Args:
        everything: The arena's bytes, uint8.
    """

    def __init__(self, everything: Tensor) -> None:
        self._everything = everything
        self._kept: dict[tuple[int, torch.dtype, int], Tensor] = {}

    def at(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """``[count]`` elements from a byte on."""
        key = offset, dtype, count
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST_VIEWS:
                self._kept.clear()
            with _normal_tensors():
                found = self._everything[offset : offset + count * dtype.itemsize].view(dtype)
            self._kept[key] = found
        return found


class Memory:
    """An arena that this process has mapped, its own or a peer's.

    Args:
        pid: Whose.
        descriptor: The number that its anonymous file has there.

    Raises:
        OSError: The process is gone, or this one may not look at its files.

    Attributes:
        views: Its parts as tensors.
        words: All of it, by words of 8 bytes.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        everything = _mapped(pid, descriptor)
        self.views = Views(everything)
        self.words = everything.numpy().data.cast("q")


class Slot(NamedTuple):
    """Room for one message, in bytes from the arena's beginning."""

    offset: int
    size: int


class Arena(Memory):
    """This rank's own.

    There is always one more slot, so that whoever has something to send never waits. What was made is kept and used
    again, the slot freed last first, since it may still be in the processor's cache.

    Args:
        head: Bytes at its beginning that are used otherwise.

    Raises:
        OSError: There is not so much memory, or the system has no such files.

    Attributes:
        descriptor: Of the anonymous file; open until :meth:`close`.
        views: Its parts as tensors; what was reserved is 0 at first.
        words: See :class:`Memory`.
    """

    def __init__(self, head: int) -> None:
        self.descriptor = os.memfd_create("distrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, SIZE)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._reserved = self._used = 0
            self._reserve(head)
            super().__init__(os.getpid(), self.descriptor)
        except BaseException:
            self.close()
            raise
        self._free: list[Slot] = []

    def take(self, size: int) -> Slot:
        """A free slot of at least ``size`` bytes.

        Raises:
            OSError: There is no memory for another one.
        """
        best = -1
        for index in range(len(self._free) - 1, -1, -1):
            each = self._free[index].size
            fits = size <= each and (each <= _LEAST_USE * size or each == _GRAIN)
            if fits and (best < 0 or each < self._free[best].size):
                best = index
        return self._free.pop(best) if best >= 0 else self._make(size)

    def give_back(self, slot: Slot) -> None:
        """Nobody reads its message any more."""
        self._free.append(slot)

    def close(self) -> None:
        """From now on nobody else can map it; who has done so keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _make(self, size: int) -> Slot:
        grain = max(_GRAIN, 1 << max(size.bit_length() - 4, 0))
        slot = Slot(self._used, -(-size // grain) * grain)
        self._reserve(slot.size)
        return slot

    def _reserve(self, size: int) -> None:
        end = self._used + -(-size // _GRAIN) * _GRAIN
        if end > SIZE:
            raise OSError(f"messages of more than {SIZE >> 30} GiB would be under way at once")
        if end > self._reserved:
            more = min(max(end - self._reserved, _PIECE), SIZE - self._reserved)
            # Linux has this call do nothing of what it did before, if there is not enough.
            os.posix_fallocate(self.descriptor, self._reserved, more)
            self._reserved += more
        self._used = end


def _mapped(pid: int, descriptor: int) -> Tensor:
    """The bytes of a process's arena, uint8 ``[SIZE]``."""
    path = f"/proc/{pid}/fd/{descriptor}"
    # torch would make a file that isn't there, and lengthen a short one.
    if Path(path).stat().st_size != SIZE:
        raise OSError(f"{path} is no arena")
    try:
        # torch keeps no descriptor open, which Python's mmap does.
        with _normal_tensors():
            memory = torch.from_file(path, shared=True, size=SIZE, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"{path} can't be mapped: {error}") from error
    # The core dump of a rank that crashes would read all of these addresses, and so have memory put behind each.
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(SIZE), _NOT_DUMPED):
        raise OSError(f"{path} can't be left out of core dumps")
    return memory


def _normal_tensors() -> torch.inference_mode:
    """A context in which tensors are made that can be written to in inference mode and outside of it."""
    return torch.inference_mode(mode=False)
