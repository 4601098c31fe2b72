"""Tensors in a file: their memory can be let go, and nothing is left of the file."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

from distrain.files import mapped_memory
from distrain.files.mapped_memory import MappedFile

MIB = 2**20
STATUS, DESCRIPTORS = Path("/proc/self/status"), Path("/proc/self/fd")


def resident() -> int:
    """Bytes of files that are in this process's memory."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssFile:"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux says what is in memory")
def test_values_stay_when_their_memory_is_let_go(tmp_path: Path) -> None:
    file = MappedFile(tmp_path)
    large, odd, small = file.allocate([4 * MIB, 3, 5], [torch.float32, torch.uint8, torch.float64])
    (other,) = file.allocate([7], [torch.float32])
    begin = resident()
    assert not any(tensor.any() for tensor in (large, odd, small, other))
    for number, tensor in enumerate((large, odd, small, other), 1):
        tensor.fill_(number)
    # The code that runs is in memory too.
    assert resident() - begin > 15 * MIB
    mapped_memory.release(small)
    assert resident() - begin < 8 * MIB
    for number, tensor in enumerate((large, odd, small, other), 1):
        assert (tensor == number).all()
        assert mapped_memory.is_mapped(tensor[1:])
    assert [*tmp_path.iterdir()] == []
    plain = torch.ones(3)
    mapped_memory.release(plain)
    assert plain.all()
    assert not mapped_memory.is_mapped(plain)


def test_a_full_disk_is_noticed_when_space_is_taken_and_never_when_it_is_used(tmp_path: Path) -> None:
    file = MappedFile(tmp_path)
    file.reserve(MIB)
    with mock.patch.object(os, "posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        (tensor,) = file.allocate([MIB], [torch.uint8])
        tensor.fill_(1)
        with pytest.raises(OSError, match=r"No space left on device \(1\.0 MiB are needed\): '/") as full:
            file.allocate([MIB], [torch.uint8])
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert tensor.all()
    # A map takes addresses and a file descriptor, which may be limited too.
    with (
        mock.patch.object(mapped_memory, "_Map", side_effect=OSError(errno.EMFILE, "Too many open files")),
        pytest.raises(OSError, match=r"Too many open files \(to map 1\.0 MiB\)") as limited,
    ):
        MappedFile(tmp_path).allocate([MIB], [torch.uint8])
    assert (limited.value.errno, limited.value.filename) == (errno.EMFILE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="missing"):
        MappedFile(tmp_path / "missing")


def test_many_tensors_take_few_descriptors_and_let_their_memory_go_one_by_one(tmp_path: Path) -> None:
    file = MappedFile(tmp_path)
    # More than a process may have open files, often.
    tensors = [file.allocate([3], [torch.float32])[0] for _ in range(1200)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    mapped_memory.release(tensors[5])
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert len({tensor.data_ptr() for tensor in tensors}) == 1200
    if DESCRIPTORS.exists():
        names = [str(path.readlink()) for path in DESCRIPTORS.iterdir() if path.is_symlink()]
        assert sum(name.startswith(str(tmp_path)) for name in names) < 15
    # Space is taken from the disk for what is used alone.
    assert os.fstat(file._file.fileno()).st_blocks * 512 < 1.1 * 1200 * mmap.ALLOCATIONGRANULARITY
    assert file._map is not None
    last = weakref.ref(file._map)
    del tensors, tensor, file
    assert last() is None


def test_a_folder_in_memory_is_recognised(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    mounts = tmp_path / "mountinfo"
    for kind, known in (("tmpfs", True), ("ext4", False)):
        mounts.write_text(f"1 0 0:1 / / rw - ext4 a rw\n2 1 {numbers} / /tmp rw shared:5 - {kind} none rw,size=1k\n")
        assert mapped_memory.is_in_memory(tmp_path, mounts) is known
    assert not mapped_memory.is_in_memory(tmp_path, tmp_path / "missing")
