"""Several tensors as one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Every part of a message begins at a multiple of this, so that it can be read in place whatever its dtype.
_ALIGNMENT = 8


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pack(parts: Sequence[Tensor]) -> Tensor:
    """One uint8 tensor that holds all parts (contiguous, any dtypes), each padded to a multiple of 8 bytes."""
    total = sum(_padded(part.numel() * part.element_size()) for part in parts)
    packed = torch.zeros(total, dtype=torch.uint8, device=parts[0].device)
    offset = 0
    for part in parts:
        size = part.numel() * part.element_size()
        if size:
            packed[offset : offset + size].view(part.dtype).copy_(part.reshape(-1))
        offset += _padded(size)
    return packed


def packed_size(form: Sequence[tuple[torch.dtype, int]]) -> int:
    """Bytes of what :func:`pack` makes of parts of these dtypes and numbers of elements."""
    return sum(_padded(count * dtype.itemsize) for dtype, count in form)


def unpack(packed: Tensor, form: Sequence[tuple[torch.dtype, int]]) -> list[Tensor]:
    """The parts of what :func:`pack` made, as views.

    Args:
        packed: uint8 ``[bytes]``.
        form: Dtype and number of elements of each part.

    Raises:
        ValueError: The message's size is not that of its form.
    """
    parts, offset = [], 0
    sizes = [count * dtype.itemsize for dtype, count in form]
    wanted = packed_size(form)
    if packed.numel() != wanted:
        raise ValueError(f"a message of {packed.numel()} bytes should have {wanted}")
    for (dtype, _), size in zip(form, sizes, strict=True):
        parts.append(packed[offset : offset + size].view(dtype))
        offset += _padded(size)
    return parts
