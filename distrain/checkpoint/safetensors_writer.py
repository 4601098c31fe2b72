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
from typing import TypedDict

import torch
from torch import Tensor

from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import flush_and_sync

#: Part of a file's content. A memory view has one dimension and elements of one byte, so its length is in bytes.
Chunk = bytes | memoryview

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


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


def serialize(tensors: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """Yields the content of a safetensors file from begin to end: the header, then one chunk for each tensor.

    A contiguous tensor on the CPU is not copied: its chunk is a view of its memory. So it must not change until that
    chunk has been used.

    Raises:
        TypeError: A tensor has a dtype for which this module has no safetensors name. Raised by the first ``next()``.
    """
    # Larger elements first, and a header padded to a multiple of 8 bytes: so each tensor's offset in the file is a
    # multiple of its element size, and a reader can map the file into memory.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        if problem := why_unsupported(tensor):
            raise TypeError(f"{name} is {problem}, which a checkpoint can't hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


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
            flush_and_sync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder.path / name)) from error
    return {"bytes": size, "sha256": checksum.hexdigest()}


def digest_of(content: bytes) -> FileDigest:
    """The manifest entry of a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
