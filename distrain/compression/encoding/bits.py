"""Small integers as bytes: 1, 2, 4 or 8 of them per byte.

The layout is planar. The integers are cut into runs of equal length, as many runs as a byte holds integers. Byte i
holds the i-th integer of each run, the first run's in its lowest bits. Packing and unpacking are thus a few operations
on whole runs, which every device does at memory speed, and the bytes are the same on all devices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_size(count: int, bits: int) -> int:
    """Number of bytes that ``count`` integers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs small integers along the last dimension.

    Args:
        codes: uint8 or bool ``[..., n]``; only the lowest ``bits`` bits of each are used.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 ``[..., packed_size(n, bits)]``; unused bits of the last bytes are zero.
    """
    runs, count = 8 // bits, codes.shape[-1]
    length = packed_size(count, bits)
    codes = codes.view(torch.uint8) & ((1 << bits) - 1)
    if count < runs * length:
        codes = F.pad(codes, (0, runs * length - count))
    packed = codes[..., (runs - 1) * length :].clone()
    for run in range(runs - 2, -1, -1):
        packed <<= bits
        packed |= codes[..., run * length : (run + 1) * length]
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The integers that :func:`pack_bits` packed.

    Args:
        packed: uint8 ``[..., packed_size(count, bits)]``.
        bits: 1, 2, 4 or 8.
        count: Number of integers along the last dimension.

    Returns:
        uint8 ``[..., count]``, each below ``2**bits``.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    codes = (packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]
