"""An arena has no name and a fixed size, and its memory is reused."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from distrain.communication.shared_memory.arena import Arena, MappedArena

OPEN = Path("/proc/self/fd")


def failing(*_: object) -> int:
    raise OSError("planted")


def test_arena_has_no_name_and_a_fixed_size() -> None:
    arena = Arena(8192)
    seen = MappedArena(os.getpid(), arena.descriptor)
    arena.words[5] = 7
    assert seen.words[5] == 7
    assert str(Path(f"/proc/self/fd/{arena.descriptor}").readlink()).endswith("(deleted)")
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, 0)
    descriptor = arena.descriptor
    arena.close()
    with pytest.raises(FileNotFoundError):
        MappedArena(os.getpid(), descriptor)
    # A process that has mapped it can still read it.
    assert seen.words[5] == 7


def test_other_files_are_not_accepted_as_arenas() -> None:
    other = os.memfd_create("other")
    with pytest.raises(OSError, match="is not an arena"):
        MappedArena(os.getpid(), other)
    assert os.fstat(other).st_size == 0
    os.close(other)


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate"])
def test_arena_that_cannot_be_made_leaves_no_descriptor(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, failing)
    before = len(list(OPEN.iterdir()))
    with pytest.raises(OSError, match="planted"):
        Arena(4096)
    assert len(list(OPEN.iterdir())) == before


def test_allocation_fails_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(4096)
    monkeypatch.setattr(os, "posix_fallocate", failing)
    with pytest.raises(OSError, match="planted"):
        arena.allocate(1 << 20)
    arena.close()


def test_only_allocated_slots_take_memory() -> None:
    arena = Arena(4096)
    arena.allocate(3_000_000)
    # st_blocks counts blocks of 512 bytes.
    assert 3_000_000 <= 512 * os.fstat(arena.descriptor).st_blocks < 4_000_000
    arena.close()


def test_slots_do_not_overlap_and_the_last_freed_is_reused_first() -> None:
    arena = Arena(5000)
    slots = [arena.allocate(size) for size in (8, 4096, 3_000_000, 1)]
    assert slots[0].offset >= 5000
    for slot, after in itertools.pairwise(slots):
        assert slot.offset + slot.size <= after.offset
    assert [slot.offset % 64 for slot in slots] == [0] * 4
    for slot in slots:
        arena.free(slot)
    assert arena.allocate(100) is slots[3]
    assert arena.allocate(2_900_000) is slots[2]
    # A small message does not take a large slot.
    arena.free(slots[2])
    assert arena.allocate(100_000) not in slots
    arena.close()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_views_cover_the_given_bytes(dtype: torch.dtype) -> None:
    arena = Arena(4096)
    view = arena.views.at(1024, dtype, 3)
    view.fill_(1)
    assert (view.dtype, view.shape) == (dtype, (3,))
    assert arena.views.at(1024, torch.uint8, 3 * dtype.itemsize).any()
    assert not arena.views.at(1024 + 3 * dtype.itemsize, torch.uint8, 2048).any()
    assert arena.views.at(1024, dtype, 3) is view
    for offset in range(0, 4096, 8):
        arena.views.at(offset, torch.uint8, 1)
    assert arena.views.at(1024, dtype, 3).tolist() == view.tolist()
    arena.close()
