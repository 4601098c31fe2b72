"""Small numbers as bytes: 8, 4, 2 or 1 of them in each.

The layout is planar: the numbers are cut into as many runs of one length as a byte holds numbers, and byte i holds the
i-th number of each run, the first run's in its lowest bits. So packing and unpacking are a few operations on whole
runs, which every device does at memory speed, and the bytes are the same on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs small numbers along the last dimension.

    Args:
        codes: uint8 or bool ``[..., n]``; only the lowest ``bits`` bits of each count.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 ``[..., packed_size(n, bits)]``; what is left over in the last bytes is zero.
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
    """The numbers that :func:`pack_bits` packed.

    Args:
        packed: uint8 ``[..., packed_size(count, bits)]``.
        bits: 1, 2, 4 or 8.
        count: How many numbers the last dimension held.

    Returns:
        uint8 ``[..., count]``, each below ``2**bits``.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    codes = (packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]
