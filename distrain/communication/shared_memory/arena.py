"""Memory that one rank writes and the other ranks of its host read.

An arena is an anonymous file (memfd_create(2)), which the other ranks map through ``/proc/<pid>/fd``. It has no name
that could be left behind, it doesn't count against the size of ``/dev/shm``, and the kernel frees it with the last
process that has it mapped, however that process ends.

All of its address range, far more than it ever uses, is mapped when the ranks connect. Memory is reserved in it when it
is needed. If memory is short, reserving raises an error; what was reserved can be read and written without a fault,
because the file is sealed against shrinking.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: Address range of an arena, in bytes: more than the messages that are ever in flight at once.
ARENA_BYTES = 1 << 34
#: A free slot is reused for messages of at least its size divided by this.
_MAX_SLACK_FACTOR = 4
#: A slot's size is a multiple of this many bytes, or of a sixteenth of its size, so that similar messages can share it.
_GRAIN_BYTES = 4096
#: ``MADV_DONTDUMP`` of madvise(2).
_MADV_DONTDUMP = 16
#: Memory is reserved in steps of at least this many bytes.
_RESERVE_STEP_BYTES = 1 << 18
_MAX_CACHED_VIEWS = 256


class ViewCache:
    """Parts of an arena as tensors. Views are cached, because the same ones recur in every step.

    Args:
        arena: All bytes of the arena, uint8.
    """

    def __init__(self, arena: Tensor) -> None:
        self._arena = arena
        self._views: dict[tuple[int, torch.dtype, int], Tensor] = {}

    def at(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """``count`` elements that begin at byte ``offset``, as a tensor ``[count]``."""
        key = offset, dtype, count
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            with _normal_tensors():
                view = self._arena[offset : offset + count * dtype.itemsize].view(dtype)
            self._views[key] = view
        return view


class MappedArena:
    """An arena that this process has mapped: its own or another rank's.

    Args:
        pid: Process that owns the arena.
        descriptor: File descriptor of the anonymous file in that process.

    Raises:
        OSError: The process is gone, or this one may not open its files.

    Attributes:
        views: Parts of the arena as tensors.
        words: The whole arena as 8-byte integers.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        arena = _mapped(pid, descriptor)
        self.views = ViewCache(arena)
        self.words = arena.numpy().data.cast("q")


class Slot(NamedTuple):
    """Room for one message.

    Attributes:
        offset: First byte, counted from the beginning of the arena.
        size: Bytes.
    """

    offset: int
    size: int


class Arena(MappedArena):
    """This rank's own arena, which allocates slots for messages.

    Allocating never waits for other ranks: if no free slot fits, a new one is made. Slots are kept and reused, the most
    recently freed first, because it may still be in the processor's cache.

    Args:
        header_bytes: Bytes at the beginning that hold something else than messages.

    Raises:
        OSError: There is not enough memory, or the system has no anonymous files.

    Attributes:
        descriptor: File descriptor of the anonymous file; open until :meth:`close`.
        views: See :class:`MappedArena`; newly reserved memory is zero.
        words: See :class:`MappedArena`.
    """

    def __init__(self, header_bytes: int) -> None:
        import fcntl  # not on every system; this class is only for Linux

        self.descriptor = os.memfd_create("distrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, ARENA_BYTES)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._reserved = self._used = 0
            self._reserve(header_bytes)
            super().__init__(os.getpid(), self.descriptor)
        except BaseException:
            self.close()
            raise
        self._free_slots: list[Slot] = []

    def allocate(self, size: int) -> Slot:
        """A slot of at least ``size`` bytes.

        Raises:
            OSError: No free slot fits, and there is no memory for a new one.
        """
        best = -1
        for index in range(len(self._free_slots) - 1, -1, -1):
            slot_size = self._free_slots[index].size
            fits = size <= slot_size and (slot_size <= _MAX_SLACK_FACTOR * size or slot_size == _GRAIN_BYTES)
            if fits and (best < 0 or slot_size < self._free_slots[best].size):
                best = index
        return self._free_slots.pop(best) if best >= 0 else self._new_slot(size)

    def free(self, slot: Slot) -> None:
        """Makes a slot available again; no rank may still read its message."""
        self._free_slots.append(slot)

    def close(self) -> None:
        """Closes the file. No process can map the arena from now on; those that have mapped it keep it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _new_slot(self, size: int) -> Slot:
        grain = max(_GRAIN_BYTES, 1 << max(size.bit_length() - 4, 0))
        slot = Slot(self._used, -(-size // grain) * grain)
        self._reserve(slot.size)
        return slot

    def _reserve(self, size: int) -> None:
        end = self._used + -(-size // _GRAIN_BYTES) * _GRAIN_BYTES
        if end > ARENA_BYTES:
            raise OSError(f"messages of more than {ARENA_BYTES >> 30} GiB would be in flight at once")
        if end > self._reserved:
            more = min(max(end - self._reserved, _RESERVE_STEP_BYTES), ARENA_BYTES - self._reserved)
            # If there is not enough memory, Linux undoes the whole call.
            os.posix_fallocate(self.descriptor, self._reserved, more)
            self._reserved += more
        self._used = end


def _mapped(pid: int, descriptor: int) -> Tensor:
    """The bytes of a process's arena, uint8 ``[ARENA_BYTES]``."""
    path = f"/proc/{pid}/fd/{descriptor}"
    # Checked first, because torch would create a missing file and extend a short one.
    if Path(path).stat().st_size != ARENA_BYTES:
        raise OSError(f"{path} is not an arena")
    try:
        # Unlike Python's mmap, torch keeps no descriptor open.
        with _normal_tensors():
            memory = torch.from_file(path, shared=True, size=ARENA_BYTES, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"{path} can't be mapped: {error}") from error
    # The core dump of a crashed rank would otherwise read the whole range, and so allocate all of its memory.
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(ARENA_BYTES), _MADV_DONTDUMP):
        raise OSError(f"{path} can't be excluded from core dumps")
    return memory


def _normal_tensors() -> torch.inference_mode:
    """A context whose new tensors can be written to in inference mode and outside of it."""
    return torch.inference_mode(mode=False)
