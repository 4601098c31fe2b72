"""Files of named tensors in the safetensors format, written piece by piece.

The library's own writer copies every tensor into an object of Python's and keeps the interpreter's lock meanwhile,
which holds up training while a file is written in the background. Here the bytes go from the tensor's memory to the
disk and into the checksum, both of which let other threads run. The format is described at
https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header, the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

Chunk = bytes | memoryview

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class Content(TypedDict):
    """What a manifest says of a file.

    Attributes:
        bytes: Its size.
        sha256: SHA-256 of its content, in hexadecimal digits.
    """

    bytes: int
    sha256: str


def chunks(tensors: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """The bytes of a file that holds the tensors, in order; no tensor is copied that lies contiguous on the CPU.

    Raises:
        TypeError: A tensor's type has no place in the format.
    """
    # Larger elements first, so that each tensor is aligned in a file that is mapped into memory.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} is of {tensor.dtype}, which a checkpoint can't hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def write(path: Path, content: Iterable[Chunk]) -> Content:
    """Writes a file and syncs it to the disk.

    Raises:
        OSError: With the path, which a write that finds the disk full does not tell by itself.
    """
    total, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in content:
                file.write(chunk)
                total.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": size, "sha256": total.hexdigest()}


def content_of(packed: bytes) -> Content:
    """What a manifest says of a file with these bytes."""
    return {"bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
