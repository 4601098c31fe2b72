"""Writes a checkpoint's files: named tensors in the safetensors format, and any other bytes, each with a checksum.

The safetensors library copies every tensor into a Python object while it holds the global interpreter lock. That would
delay training while a thread writes a checkpoint in the background. Here the tensor's own memory is written and hashed,
and both release the lock. The format is described at https://huggingface.co/docs/safetensors: eight bytes with the
length of a JSON header, the header, the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from distrain.checkpoint.saved_tensors import DTYPES
from distrain.files import mapped_memory
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import flush_and_sync

#: Part of a file's content. A memory view has one dimension and elements of one byte, so its length is in bytes.
Chunk = bytes | memoryview

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def why_unsupported(tensor: Tensor) -> str:
    """What about a tensor a safetensors file can't hold, such as its dtype; empty if it can."""
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_complex():
        return f"a tensor of {tensor.dtype} (hold torch.view_as_real(…) of it, or register it with persistent=False)"
    return "" if tensor.dtype in _DTYPE_NAMES else f"a tensor of {tensor.dtype}"


class FileDigest(TypedDict):
    """A file's entry in a checkpoint's ``manifest.json``.

    Attributes:
        bytes: Size of the file.
        sha256: SHA-256 of its content, in hexadecimal digits.
    """

    bytes: int
    sha256: str


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Chunk]:
    """Yields the content of a safetensors file from begin to end: the header, then one chunk for each tensor.

    A contiguous tensor on the CPU is not copied: its chunk is a view of its memory. So it must not change until that
    chunk has been used.

    Args:
        tensors: By name. Each is looked up twice, and let go of between, so they may be read when they are.
        metadata: Texts by name that the header says besides.

    Raises:
        TypeError: A tensor has a dtype for which this module has no safetensors name. Raised by the first ``next()``.
    """
    entries: dict[str, dict[str, Any]] = {}
    sizes, widths = {}, {}
    for name, tensor in tensors.items():
        if problem := why_unsupported(tensor):
            raise TypeError(f"{name} is {problem}, which a checkpoint can't hold")
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        sizes[name], widths[name] = tensor.numel() * tensor.element_size(), tensor.element_size()
        del tensor
    # Larger elements first, and a header padded to a multiple of 8 bytes: so each tensor's offset in the file is a
    # multiple of its element size, and a reader can map the file into memory.
    names = sorted(tensors, key=lambda name: (-widths[name], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        header[name] = entries[name]
        begin, end = end, end + sizes[name]
        entries[name]["data_offsets"] = [begin, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        tensor = tensors[name].detach()
        flat = tensor.cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
        # Not two tensors at once.
        mapped_memory.release(tensor)
        del tensor, flat


def write(folder: ContainedFolder, name: str, content: Iterable[Chunk]) -> FileDigest:
    """Writes a file and syncs its content to the disk.

    This is not atomic: a crash leaves an incomplete file. Callers write into a temporary folder and rename that.

    Returns:
        The size and checksum of what was written.

    Raises:
        OSError: It could not be written. The error holds the path, which Python's own error for a full disk lacks.
    """
    checksum, size = hashlib.sha256(), 0
    try:
        with folder.create(name) as file:
            for chunk in content:
                file.write(chunk)
                checksum.update(chunk)
                size += len(chunk)
                del chunk
            flush_and_sync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder.path / name)) from error
    return {"bytes": size, "sha256": checksum.hexdigest()}


def write_alone(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of tensors that belongs to no checkpoint.

    Args:
        path: The file.
        tensors: As for :func:`serialize`, like ``metadata``.
        metadata: See there.

    Raises:
        OSError: It could not be written.
    """
    with path.open("wb") as file:
        for chunk in serialize(tensors, metadata):
            file.write(chunk)
            del chunk


def digest_of(content: bytes) -> FileDigest:
    """The manifest entry of a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
