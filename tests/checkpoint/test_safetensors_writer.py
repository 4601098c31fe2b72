"""The files are valid safetensors, and tensors are written without copies."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distrain.checkpoint import safetensors_writer
from distrain.files.contained_folder import ContainedFolder

GENERATOR = torch.Generator().manual_seed(0)
KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
TENSORS = {
    **{f"of {kind}": (10 * torch.randn(3, 5, generator=GENERATOR)).to(kind) for kind in KINDS},
    "a scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "a part": torch.arange(12.0)[::3],
    "transposed": torch.randn(4, 3, generator=GENERATOR).t(),
    "channels last": torch.randn(2, 3, 4, 4, generator=GENERATOR).contiguous(memory_format=torch.channels_last),
    "trained": torch.nn.Parameter(torch.randn(3, generator=GENERATOR)),
    'quote " and é': torch.ones(1),
}


def test_library_reads_the_written_file(tmp_path: Path) -> None:
    safetensors_writer.write(ContainedFolder(tmp_path), "file", safetensors_writer.serialize(TENSORS))
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        # float8 has no comparison, so the bits are compared.
        bits = [each.detach().contiguous().flatten().view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*bits), name


def test_file_has_the_size_that_the_library_writes(tmp_path: Path) -> None:
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in TENSORS.items()}
    save_file(plain, tmp_path / "theirs")
    safetensors_writer.write(ContainedFolder(tmp_path), "ours", safetensors_writer.serialize(TENSORS))
    theirs, ours = ((tmp_path / name).read_bytes() for name in ("theirs", "ours"))
    sizes = [int.from_bytes(each[:8], "little") for each in (theirs, ours)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in plain.values()) == len(ours) - 8 - sizes[1]
    # Tensors of the same element size may be in another order.
    assert len(theirs) - sizes[0] == len(ours) - sizes[1]


def test_file_without_tensors_is_valid(tmp_path: Path) -> None:
    safetensors_writer.write(ContainedFolder(tmp_path), "file", safetensors_writer.serialize({}))
    assert load_file(tmp_path / "file") == {}


def test_tensors_are_written_without_a_copy() -> None:
    tensor = torch.zeros(4)
    _, memory = safetensors_writer.serialize({"tensor": tensor})
    tensor.fill_(1)
    assert bytes(memory) == torch.ones(4).numpy().tobytes()


def test_digest_holds_size_and_checksum_of_the_file(tmp_path: Path) -> None:
    content = safetensors_writer.write(ContainedFolder(tmp_path), "file", [b"some", memoryview(b"thing")])
    assert (tmp_path / "file").read_bytes() == b"something"
    assert content == {"bytes": 9, "sha256": hashlib.sha256(b"something").hexdigest()}
    assert safetensors_writer.digest_of(b"something") == content


def test_unsupported_dtype_is_refused_with_the_name_of_the_tensor() -> None:
    with pytest.raises(TypeError, match=r"phase is a tensor of torch\.complex64"):
        list(safetensors_writer.serialize({"phase": torch.zeros(2, dtype=torch.complex64)}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_error_of_a_full_disk_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContainedFolder, "create", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'") as caught:
        safetensors_writer.write(ContainedFolder(tmp_path), "file", [bytes(1 << 20)])
    assert caught.value.errno == errno.ENOSPC
