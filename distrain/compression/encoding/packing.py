"""Several tensors as one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Every part of a message starts at a multiple of this many bytes, so that it can be viewed in place with any dtype.
_ALIGNMENT = 8


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Copies contiguous tensors of any dtypes into one uint8 tensor, each padded to a multiple of 8 bytes."""
    total = sum(_padded(part.numel() * part.element_size()) for part in parts)
    packed = torch.zeros(total, dtype=torch.uint8, device=parts[0].device)
    offset = 0
    for part in parts:
        size = part.numel() * part.element_size()
        if size:
            packed[offset : offset + size].view(part.dtype).copy_(part.reshape(-1))
        offset += _padded(size)
    return packed


def packed_size(layout: Sequence[tuple[torch.dtype, int]]) -> int:
    """Size in bytes of what :func:`pack` returns for parts of these dtypes and numbers of elements."""
    return sum(_padded(count * dtype.itemsize) for dtype, count in layout)


def unpack(packed: Tensor, layout: Sequence[tuple[torch.dtype, int]]) -> list[Tensor]:
    """The parts that :func:`pack` packed, as views.

    Args:
        packed: uint8 ``[bytes]``.
        layout: Dtype and number of elements of each part.

    Raises:
        ValueError: The message's size differs from its layout's.
    """
    parts, offset = [], 0
    expected = packed_size(layout)
    if packed.numel() != expected:
        raise ValueError(f"a message of {packed.numel()} bytes should have {expected}")
    for dtype, count in layout:
        size = count * dtype.itemsize
        parts.append(packed[offset : offset + size].view(dtype))
        offset += _padded(size)
    return parts


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
